"""Overlap of splits, as far as their names show it."""

import math
import re

from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM

_SPLIT = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<start>-?\d*%?):(?P<stop>-?\d*%?)\])?")


def overlap(first: str, second: str) -> bool | None:
    """Whether two splits of one data set, e.g. ``train[:45000]`` and ``train[44000:]``, share samples.

    Returns:
        ``None`` where the names alone do not show it: ends counted in different ways (from the start, from the end, in
        percent), or several slices joined by ``+``.
    """
    parsed = [_SPLIT.fullmatch(split) for split in (first, second)]
    if parsed[0] is None or parsed[1] is None:
        return None
    names = [_folder(match["name"]) for match in parsed if match]
    if names[0] != names[1]:
        return False
    ends = [(match["start"] or "", match["stop"] or "") for match in parsed if match]
    given = [text for pair in ends for text in pair if text]
    kinds = {(text.startswith("-"), text.endswith("%")) for text in given}
    if len(kinds) > 1:
        return None
    from_end = any(negative for negative, _ in kinds)
    lowest, highest = (-math.inf, 0) if from_end else (0, math.inf)
    starts = [int(start.rstrip("%")) if start else lowest for start, _ in ends]
    stops = [int(stop.rstrip("%")) if stop else highest for _, stop in ends]
    return max(starts) < min(stops)


def _folder(name: str) -> str:
    """One name for all by which timm finds the same folder."""
    return "train" if name in _TRAIN_SYNONYM else "validation" if name in _EVAL_SYNONYM else name
