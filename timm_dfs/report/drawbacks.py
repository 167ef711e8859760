"""Disadvantages of early exit, in sentences, from the measurements."""

from collections.abc import Iterable, Sequence

from ..evaluation.bench import Timing
from .findings import Findings, Point

SHORTFALL = 0.85
"""Share of the speed-up that the saved multiply-adds promise; methods below it are named."""


def where_it_loses(findings: Findings, timings: Sequence[Timing] = ()) -> list[str]:
    """Sentences on the disadvantages of early exit; empty if the measurements show none."""
    sentences = [*_cost(findings), *_accuracy(findings), *_untrained(findings)]
    for size in sorted({timing.batch_size for timing in timings}):
        sentences += _time(findings, [timing for timing in timings if timing.batch_size == size], f"At batch {size} ")
    return sentences


def _cost(findings: Findings) -> list[str]:
    sentences = []
    more = findings.flops[-1] / findings.last_exit_flops - 1
    if more > 0:
        sentences.append(
            f"An image that reaches the last exit costs {100 * more:.0f} % more than in a network without early exits, "
            "if all exits are enabled: their heads are computed, and layers that only they read."
        )
    dear = [name for name, point in findings.points.items() if _flops(point) >= findings.last_exit_flops]
    if dear:
        sentences.append(f"No cheaper on average than the last exit alone: {_listed(dear)}.")
    return sentences


def _accuracy(findings: Findings) -> list[str]:
    sentences = []
    less = {
        name: point.measured.last_exit_accuracy - point.measured.accuracy
        for name, point in findings.points.items()
        if point.measured.accuracy < point.measured.last_exit_accuracy
    }
    if less:
        by = _listed(f"{name} by {loss:.2f} points" for name, loss in less.items())
        sentences.append(f"Less accurate than the last exit: {by}.")
    harmed = {name: point.harmed for name, point in findings.points.items() if point.harmed > 0}
    if harmed:
        shares = _listed(f"{name} {share:.2f} %" for name, share in harmed.items())
        sentences.append(f"Images that the last exit predicts correctly and the exit taken does not: {shares}.")
    for name, point in findings.points.items():
        rivals = [
            (alone.accuracy, k)
            for k, alone in enumerate(findings.exits)
            if alone.flops <= _flops(point) and alone.accuracy >= point.measured.accuracy
        ]
        if rivals:
            accuracy, k = max(rivals)
            sentences.append(
                f"{name} is no better than the network that ends at exit {k}, which has {accuracy:.2f} % at "
                f"{findings.exits[k].flops / 1e6:,.1f} M against {point.measured.accuracy:.2f} % at "
                f"{_flops(point) / 1e6:,.1f} M."
            )
    return sentences


def _untrained(findings: Findings) -> list[str]:
    chance = 100 / findings.classes
    poor = [str(k) for k, alone in enumerate(findings.exits) if alone.accuracy <= chance]
    return [f"Right no more often than chance ({chance:.3g} %), perhaps untrained: exit {_listed(poor)}."] * bool(poor)


def _time(findings: Findings, timings: Sequence[Timing], where: str) -> list[str]:
    slow = [f"{t.way} ({t.speedup:.2f} times its images per second)" for t in timings if t.speedup < 1]
    short = [
        f"{t.way} is {t.speedup:.2f} times as fast, with {t.cost_ratio:.2f} times fewer multiply-adds"
        for t in timings
        if t.way in findings.points and t.speedup >= 1 and t.achieved < SHORTFALL
    ]
    return [f"{where}slower than the last exit alone: {_listed(slow)}."] * bool(slow) + [
        f"{where}less time is saved than arithmetic: {_listed(short)}."
    ] * bool(short)


def _flops(point: Point) -> float:
    return point.measured.average_flops


def _listed(parts: Iterable[str]) -> str:
    return "; ".join(parts)
