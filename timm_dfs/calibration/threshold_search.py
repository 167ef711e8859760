"""Search for the thresholds that do best on given samples.

A set of thresholds is represented by counts, one per early exit: the number of samples, by falling confidence, that
reach its threshold. With all other thresholds fixed, accuracy and cost at every value of one threshold are two
cumulative sums, so its best value is found exactly. The exits take turns, from deep to shallow, until none improves.
The search starts from geometric exit fractions, from all samples at one exit, and from what is best at each of many
prices of a multiply-add. There are many optima in which no single change helps. A search at one price that starts from
the optimum at the price before finds better ones than one that starts anew, so prices are followed up and down.
"""

import math
from collections.abc import Callable, Sequence

import torch

from .budgeted_batch import geometric_exit_fractions, official_thresholds

Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Value of choices, given their accuracies (M,), percent, and mean costs (M,): float64 (M,), minus infinity where a
choice is not allowed."""

GEOMETRIC_RATIOS = tuple(p / 40 for p in range(1, 121))
"""The ratios of :func:`timm_dfs.budgeted_batch`, and as many between and beyond them."""

PRICES = (0.0, *(10 ** (p / 24 - 1) for p in range(97)))
"""Prices of as many multiply-adds as the last exit costs, in percentage points of accuracy: from 0.1 to 1000. With a
third as many, up to a percentage point is missed at some budgets (MSDNet on CIFAR-100); more gain nothing."""

ROUNDS = 20


class ThresholdSearch:
    """Search on samples whose confidences and correct predictions are known.

    Args:
        confidences: Confidences (E, N) in [0, 1].
        correct: Whether each exit's prediction is correct, bool (E, N).
        flops: Multiply-adds up to and including each exit (E,).
        exits: The exits that may be active, the last one among them.
        keep_active: Choose no threshold above 1, which would switch an exit off: where exits predict together, an exit
            counts even if no sample leaves at it. Samples of confidence 1 then leave.
    """

    def __init__(
        self,
        confidences: torch.Tensor,
        correct: torch.Tensor,
        flops: Sequence[float],
        exits: Sequence[int],
        keep_active: bool = False,
    ):
        self.last, self.samples = len(confidences) - 1, confidences.shape[1]
        self.early = sorted(set(exits) - {self.last})
        self.confidences = confidences
        self.correct = correct.double()
        self.cost = torch.tensor(flops, dtype=torch.float64)
        self.sorted, self.order = confidences.sort(dim=1, descending=True, stable=True)
        self.rank = self.order.argsort(1)
        # Counts that a threshold can produce: none, all, and those after which the next sample is less confident.
        never = torch.ones(len(confidences), 1, dtype=torch.bool)
        self.possible = torch.cat([never, self.sorted[:, :-1] > self.sorted[:, 1:], never], 1)
        self.highest = 1.0 if keep_active else math.inf
        self.least = (confidences >= self.highest).sum(1)  # counts of the highest thresholds
        self.least[[k for k in range(len(confidences)) if k not in self.early]] = 0
        self.possible &= torch.arange(self.samples + 1) >= self.least[:, None]
        self.starts = self._starts()
        self._measured_starts = self._measure(self.starts)

    def best(self, value: Value, starts: int = 8) -> tuple[float, ...] | None:
        """The best thresholds found from the ``starts`` best starts; ``None`` if none are allowed."""
        counts = self._best(value, starts)
        return None if counts is None else self.thresholds(counts)

    def frontier(self, points: int) -> list[tuple[float, ...]]:
        """Thresholds within as many budgets, by falling cost; none cost more than others and are no more accurate.

        The first let no sample exit early, and are among them in any case; with ``keep_active`` there are no such.
        """
        cheapest = min(self.cost[k].item() for k in (*self.early, self.last))
        budgets = torch.linspace(cheapest, self.cost.max().item(), points, dtype=torch.float64)[:-1]
        within = [self._best(within_budget(budget, self.cost[-1].item()), 1) for budget in budgets.tolist()]
        counts = torch.stack([self.starts[0], *(found for found in within if found is not None)])
        accuracy, cost = (values.tolist() for values in self._measure(counts))
        first = [0] if self.highest == math.inf else []
        kept: list[int] = []
        for i in sorted(range(len(first), len(counts)), key=lambda i: (cost[i], -accuracy[i])):
            if not kept or accuracy[i] > accuracy[kept[-1]]:
                kept.append(i)
        return [self.thresholds(counts[i]) for i in (*first, *reversed(kept))]

    def _best(self, value: Value, starts: int) -> torch.Tensor | None:
        values = value(*self._measured_starts)
        chosen = values.topk(min(starts, len(values))).indices
        chosen = self.starts[chosen[values[chosen] > -math.inf]]
        if not len(chosen):
            return None
        ends = torch.cat([chosen, *(self.improve(counts, value)[None] for counts in chosen)])
        return ends[value(*self._measure(ends)).argmax()]

    def thresholds(self, counts: torch.Tensor) -> tuple[float, ...]:
        """Thresholds that ``counts`` (E,) of the samples reach: halfway between the last that does and the next."""
        found = []
        for k, count in enumerate(counts.tolist()):
            if k == self.last or count == self.samples:
                found.append(0.0)
            elif count == 0:
                found.append(self.highest if k in self.early else math.inf)
            else:
                leaves, stays = self.sorted[k, count - 1], self.sorted[k, count]
                halfway = (leaves + stays) / 2
                found.append((halfway if halfway > stays else leaves).item())
        return tuple(found)

    def improve(self, counts: torch.Tensor, value: Value) -> torch.Tensor:
        """Counts (E,) that no change of a single count improves, starting from given ones."""
        counts = counts.clone()
        for _ in range(ROUNDS):
            before = counts.clone()
            for k in reversed(self.early):
                counts[k] = self._best_count(k, counts, value)
            if torch.equal(counts, before):
                break
        return counts

    def _best_count(self, k: int, counts: torch.Tensor, value: Value) -> int:
        leaves = self._leaves(counts)
        reach = ~leaves[:k].any(0)
        leaves[k] = False
        stays = leaves.int().argmax(0)  # each sample's exit if none leaves at exit k
        correct, cost = self._of(self.correct, stays), self.cost[stays]
        gain = (self.correct[k] - correct) * reach
        spent = (self.cost[k] - cost) * reach
        values = value(
            100 * (self._from(correct, gain[self.order[k]]) / self.samples),
            self._from(cost, spent[self.order[k]]) / self.samples,
        )
        values[~self.possible[k]] = -math.inf
        best = int(values.argmax())
        return best if values[best] > values[counts[k]] else int(counts[k])

    @staticmethod
    def _from(start: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        """The sum of ``start``, then that sum after each of the ``changes``; whole numbers stay exact in float64."""
        return start.sum() + torch.cat([changes.new_zeros(1), changes.cumsum(0)])

    def _leaves(self, counts: torch.Tensor) -> torch.Tensor:
        leaves = self.rank < counts[:, None]
        leaves[-1] = True
        return leaves

    @staticmethod
    def _of(values: torch.Tensor, exits: torch.Tensor) -> torch.Tensor:
        return values.gather(0, exits[None])[0]

    def _measure(self, many_counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Accuracy (M,), percent, and mean cost (M,) of counts (M, E)."""
        exits = [self._leaves(counts).int().argmax(0) for counts in many_counts]  # the first that is true
        correct = torch.stack([self._of(self.correct, row).sum() for row in exits])
        return 100 * (correct / self.samples), torch.stack([self.cost[row].sum() for row in exits]) / self.samples

    def _starts(self) -> torch.Tensor:
        """Distinct counts (M, E) that the search starts from."""
        none = torch.zeros(self.last + 1, dtype=torch.int64)
        found = [none]
        for k in self.early:
            found.append(none.clone())
            found[-1][k] = self.samples
        allowed = torch.tensor([*self.early, self.last])
        for ratio in GEOMETRIC_RATIOS:
            fractions = geometric_exit_fractions(ratio, len(allowed))
            thresholds = official_thresholds(self.confidences[allowed], fractions)
            found.append(none.clone())
            found[-1][allowed] = (self.confidences[allowed] >= thresholds[:, None]).sum(1)
        found[:] = [counts.where(torch.arange(len(counts)) < self.last, 0).maximum(self.least) for counts in found]
        for prices in (PRICES, PRICES[::-1]):
            values = [_priced(price / self.cost[-1].item()) for price in prices]
            counts = self._if_each_saw_all(values[0])
            for value in values:
                counts = self.improve(counts, value)
                found.append(counts)
        return torch.stack(found).unique(dim=0)  # sorted: in the first, no sample exits early

    def _if_each_saw_all(self, value: Value) -> torch.Tensor:
        """The best count of each exit, deep to shallow, if no sample had exited before it."""
        counts = self.least.clone()
        for k in reversed(self.early):
            counts[k] = self._best_count(k, counts, value)
        return counts


def _priced(price: float) -> Value:
    return lambda accuracy, cost: accuracy - price * cost


def within_budget(budget: float, last: float) -> Value:
    """Value of accuracy at a cost of at most ``budget``; of equally accurate choices the cheaper is better."""
    budget *= 1 + _ROUNDING
    return lambda accuracy, cost: torch.where(cost <= budget, accuracy - _TIE * cost / last, -math.inf)


def at_accuracy(least: float, last: float) -> Value:
    """Value of low cost at an accuracy of at least ``least``; of equally cheap choices the more accurate is better."""
    least -= _ROUNDING
    return lambda accuracy, cost: torch.where(accuracy >= least, _TIE * accuracy - cost / last, -math.inf)


_TIE = 1e-9

_ROUNDING = 1e-9
"""Percentage points by which an accuracy may be short, and share of a budget by which it may be exceeded: in floating
point, 57 of 100 samples are less than 57 %, and the mean of three costs of 0.1 is more than 0.1."""
