"""Accuracy of exits on a split of which one half fitted the thresholds and the other half was measured.

Exits on their own were fitted on neither half, so that what they reach on both together is comparable with what others
measure on the whole split; presets are not.
"""

from typing import Any

MEANS = ("top1", "top5", "top1_ensemble", "disagreement")
"""Means over samples, exit by exit: those of both halves together are their weighted means."""


def both_halves(results: dict[str, Any]) -> dict[str, Any] | None:
    """Accuracies on both halves together, of a model's measured results.

    Returns:
        ``split``, ``samples`` and :data:`MEANS` as in ``results["test"]``; ``None`` if held-out and test samples are of
        different splits.
    """
    held_out, test = results.get("held_out"), results["test"]
    names = [part["split"].partition("[")[0] for part in (held_out, test) if part]
    if len(names) < 2 or names[0] != names[1]:
        return None
    samples = held_out["samples"] + test["samples"]
    share = held_out["samples"] / samples
    means = {
        key: [share * a + (1 - share) * b for a, b in zip(held_out[key], test[key], strict=True)]
        for key in MEANS
        if key in held_out and key in test
    }
    return dict(split=names[0], samples=samples, **means)
