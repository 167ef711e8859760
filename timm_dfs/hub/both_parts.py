"""Accuracy of exits on two parts of a split, of which one fitted the thresholds and the other was measured.

Exits on their own were fitted on neither, so that what they reach on both together is comparable with what others
measure on the whole split; presets are not.
"""

from typing import Any

MEANS = ("top1", "top5", "top1_ensemble", "disagreement")
"""Means over samples, exit by exit: those of both parts together are their weighted means."""


def both_parts(results: dict[str, Any]) -> dict[str, Any] | None:
    """Accuracies on both parts together, of a model's measured results.

    Returns:
        ``split`` (``test[:5000]+test[5000:]``), ``samples`` and :data:`MEANS` as in ``results["test"]``; ``None`` if
        held-out and test samples are of different splits.
    """
    held_out, test = results.get("held_out"), results["test"]
    if not held_out or held_out["split"].partition("[")[0] != test["split"].partition("[")[0]:
        return None
    samples = held_out["samples"] + test["samples"]
    share = held_out["samples"] / samples
    means = {
        key: [share * a + (1 - share) * b for a, b in zip(held_out[key], test[key], strict=True)]
        for key in MEANS
        if key in held_out and key in test
    }
    return dict(split=f"{held_out['split']}+{test['split']}", samples=samples, **means)
