"""One gradient out of the exits' gradients: PCGrad and its kind, by torchjd."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import distributed, nn

from ..base.objective import Objective
from .losses import Criterion, ExitsLoss

Aggregate = Callable[[torch.Tensor], torch.Tensor]


def make_aggregator(name: str, losses: int) -> Aggregate:
    """torchjd's aggregator called ``name``: from a Jacobian (``losses``, P) to a gradient (P,).

    Raises:
        ModuleNotFoundError: If torchjd, or what it needs for this aggregator, is not installed.
    """
    try:
        from torchjd import aggregation

        settings: dict[str, dict] = {"CAGrad": dict(c=0.4), "NashMTL": dict(n_tasks=losses)}  # c as in CAGrad's paper
        return getattr(aggregation, name)(**settings.get(name, {}))
    except ImportError as error:
        raise ModuleNotFoundError(
            f"aggregator={name!r} needs torchjd with all its solvers ({error}): pip install 'timm-dfs[aggregation]'."
        ) from error


class AggregatedExitsLoss(ExitsLoss):
    """The exits' losses summed as a value, with an aggregate of their gradients as the gradient.

    ``backward()`` leaves in ``.grad`` what the aggregator makes of the exits' gradients of those parameters that
    several exits train, together; the others, which one exit trains, get their gradient as it is. Every exit's
    gradient is computed in the forward pass, by one backward pass each, so the peak is that of one backward pass
    and one copy of the shared gradients for each exit. Under DistributedDataParallel, gradients are averaged over
    the processes before they are aggregated: what is aggregated is the global batch's.

    Args:
        criterion: Loss of one exit.
        objective: Settings; ``objective.aggregator`` names the aggregator.
        parameters: The model's parameters.
        num_exits: How many exits it has.

    Raises:
        ModuleNotFoundError: If torchjd is missing.
        ValueError: In training, if the model is compiled, or gradients are already there: the aggregate of parts of a
            batch is not the batch's.
    """

    def __init__(self, criterion: Criterion, objective: Objective, parameters: Iterable[nn.Parameter], num_exits: int):
        super().__init__(criterion, objective)
        self._of_model = list(parameters)
        weights = objective.loss_weights or [1.0] * num_exits
        self._counting = [k for k, weight in enumerate(weights) if weight > 0]  # an exit of weight 0 has no say
        self._aggregate = make_aggregator(str(objective.aggregator), len(self._counting))

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._of_model if parameter.requires_grad]

    def forward(self, outputs: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        if isinstance(outputs, torch.Tensor) or not torch.is_grad_enabled():
            return super().forward(outputs, target)
        if any(parameter.grad is not None and parameter.grad.any() for parameter in self._trained):
            raise ValueError(
                f"aggregator={self.objective.aggregator!r} found gradients of an earlier batch: gradients cannot be "
                "accumulated over batches and then aggregated. Train without --grad-accum-steps."
            )
        losses = self.of_each_exit(outputs, target)
        value = torch.stack(losses).sum().detach()
        return _WithGradient.apply(value, self._gradients(losses), *self._trained)

    def _gradients(self, losses: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The gradient of every trained parameter."""
        rows = [self._gradients_of(losses[k], last=k == self._counting[-1]) for k in self._counting]
        self._drop_zeros(rows)
        counts = [sum(row[i] is not None for row in rows) for i in range(len(self._trained))]
        shared = [i for i, count in enumerate(counts) if count > 1]
        jacobian = self._jacobian(rows, shared)
        gradients = [next((row[i] for row in rows if row[i] is not None), None) for i in range(len(self._trained))]
        if not shared:
            return gradients
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(jacobian)
            jacobian /= distributed.get_world_size()
        # Where a loss is not finite, so are the gradients: for the training script to deal with, as always.
        with torch.autocast(jacobian.device.type, enabled=False):
            aggregated = self._aggregate(jacobian) if jacobian.isfinite().all() else jacobian.sum(0)
        for i, gradient in zip(shared, aggregated.split([self._trained[i].numel() for i in shared])):
            gradients[i] = gradient.view_as(self._trained[i]).to(self._trained[i].dtype)
        return gradients

    @staticmethod
    def _drop_zeros(rows: list[list[torch.Tensor | None]]) -> None:
        """Take zeros out of ``rows`` where another exit has more: a stop-gradient leaves them rather than nothing.

        So do gradients through a compiled model, and those of other exits' adapters.
        """
        places = [(row, i, gradient) for row in rows for i, gradient in enumerate(row) if gradient is not None]
        if not places:
            return
        norms = torch._foreach_norm([gradient for *_, gradient in places], float("inf"))
        trains = (torch.stack(norms) != 0).int()  # what is not a number counts
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(trains, distributed.ReduceOp.MAX)
        by_parameter: dict[int, list[tuple[list, int]]] = {}
        for (row, i, _), some in zip(places, trains.tolist()):
            by_parameter.setdefault(i, []).append((row, some))
        for i, column in by_parameter.items():
            kept = [row for row, some in column if some] or [column[0][0]]
            for row, _ in column:
                if not any(row is other for other in kept):
                    row[i] = None

    def _jacobian(self, rows: list[list[torch.Tensor | None]], shared: list[int]) -> torch.Tensor:
        """The shared parameters' gradients, one row for each exit; taken out of ``rows``, never there twice."""
        sizes = [self._trained[i].numel() for i in shared]
        jacobian = self._trained[0].new_empty(len(rows), sum(sizes), dtype=torch.float32)
        for i, columns in zip(shared, jacobian.split(sizes, dim=1)):
            for row, part in zip(rows, columns):
                gradient, row[i] = row[i], None
                if gradient is None:  # this loss does not reach the parameter
                    part.zero_()
                else:
                    part.copy_(gradient.flatten())
        return jacobian

    def _gradients_of(self, loss: torch.Tensor, last: bool) -> list[torch.Tensor | None]:
        try:
            return list(torch.autograd.grad(loss, self._trained, retain_graph=not last, allow_unused=True))
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            raise ValueError(
                f"aggregator={self.objective.aggregator!r} needs one backward pass for each exit, which a compiled "
                "model does not allow. Train without --torchcompile."
            ) from error


class _WithGradient(torch.autograd.Function):
    """A value with given gradients with respect to given parameters."""

    @staticmethod
    def forward(ctx, value, gradients, *parameters):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        return None, None, *(None if gradient is None else scale * gradient for gradient in ctx.gradients)
