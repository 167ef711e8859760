"""Aggregation of the exits' gradients into one, by PCGrad and similar methods of torchjd."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import distributed, nn

from ..base.objective import Objective
from .losses import Criterion, ExitsLoss
from .teacher import TeacherTerm

Aggregate = Callable[[torch.Tensor], torch.Tensor]


def make_aggregator(name: str, losses: int) -> Aggregate:
    """torchjd's aggregator called ``name``, a function from a Jacobian (``losses``, P) to a gradient (P,).

    Args:
        name: One of :data:`~timm_dfs.base.objective.AGGREGATORS`.
        losses: Number of losses.

    Raises:
        ModuleNotFoundError: If torchjd, or a package that it needs for this aggregator, is not installed.
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
    """Loss whose value is the sum of the exits' losses and whose gradient is an aggregate of their gradients.

    The aggregator combines the exits' gradients of the parameters that at least two exits train, as one vector for each
    exit. A parameter that one exit trains gets its gradient unchanged. Every exit's gradient is computed in the forward
    pass, by one backward pass each; peak memory is that of one backward pass plus, for each exit, one copy of the
    shared gradients. Under DistributedDataParallel, each exit's gradient is averaged over the processes before
    aggregation, so the result is that of the global batch.

    Args:
        criterion: Loss of one exit.
        objective: Settings; ``objective.aggregator`` names the aggregator.
        parameters: Function that gives the model's parameters, asked at each step: they may be replaced.
        num_exits: Number of exits of the model.
        recomputed: Function that gives the buffers that a backward pass may change; the backward passes here, one for
            each exit, leave them as they were.

    Raises:
        ModuleNotFoundError: If torchjd is not installed.
        ValueError: In training, if the model is compiled; in the backward pass, if parameters have gradients already,
            because aggregates of partial batches do not add up to the aggregate of the batch.
    """

    def __init__(
        self,
        criterion: Criterion,
        objective: Objective,
        parameters: Callable[[], Iterable[nn.Parameter]],
        num_exits: int,
        recomputed: Callable[[], Iterable[torch.Tensor]] = tuple,
    ):
        super().__init__(criterion, objective)
        self._of_model, self._recomputed = parameters, recomputed
        weights = objective.loss_weights or [1.0] * num_exits
        self._counting = [k for k, weight in enumerate(weights) if weight > 0]  # exits of weight 0 are left out
        self._aggregate = make_aggregator(str(objective.aggregator), len(self._counting))

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._of_model() if parameter.requires_grad]

    def forward(
        self,
        outputs: torch.Tensor | Sequence[torch.Tensor],
        target: torch.Tensor,
        teacher: TeacherTerm | None = None,
    ) -> torch.Tensor:
        if isinstance(outputs, torch.Tensor) or not torch.is_grad_enabled():
            return super().forward(outputs, target, teacher)
        losses, trained = self.of_each_exit(outputs, target, teacher), self._trained
        value = torch.stack(losses).sum().detach()
        earlier = [parameter for parameter in trained if _has_gradient(parameter)]
        before = [(buffer, buffer.clone()) for buffer in self._recomputed()]
        gradients = self._gradients(losses, trained)
        for buffer, unchanged in before:
            buffer.copy_(unchanged)
        return _WithGradient.apply(value, gradients, earlier, self.objective.aggregator, *trained)

    def _gradients(self, losses: Sequence[torch.Tensor], trained: list[nn.Parameter]) -> list[torch.Tensor | None]:
        """The gradient of every trained parameter; ``None`` where no loss reaches it."""
        rows = [self._gradients_of(losses[k], trained, last=k == self._counting[-1]) for k in self._counting]
        self._drop_zeros(rows)
        counts = [sum(row[i] is not None for row in rows) for i in range(len(trained))]
        shared = [i for i, count in enumerate(counts) if count > 1]
        jacobian = self._jacobian(rows, shared, trained)
        gradients = [next((row[i] for row in rows if row[i] is not None), None) for i in range(len(trained))]
        if not shared:
            return gradients
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(jacobian)
            jacobian /= distributed.get_world_size()
        # Gradients that are not finite stay so, for the training script's own check.
        with torch.autocast(jacobian.device.type, enabled=False):
            aggregated = self._aggregate(jacobian) if jacobian.isfinite().all() else jacobian.sum(0)
        for i, gradient in zip(shared, aggregated.split([trained[i].numel() for i in shared])):
            gradients[i] = gradient.view_as(trained[i]).to(trained[i].dtype)
        return gradients

    @staticmethod
    def _drop_zeros(rows: list[list[torch.Tensor | None]]) -> None:
        """Replace gradients that are all zero by ``None`` in ``rows``, except a parameter's first if all are zero.

        A stop-gradient, a compiled model and the adapters of other exits give zeros instead of no gradient.
        """
        places = [(row, i, gradient) for row in rows for i, gradient in enumerate(row) if gradient is not None]
        if not places:
            return
        norms = torch._foreach_norm([gradient for *_, gradient in places], float("inf"))
        trains = (torch.stack(norms) != 0).int()  # true for NaN too
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

    @staticmethod
    def _jacobian(
        rows: list[list[torch.Tensor | None]], shared: list[int], trained: list[nn.Parameter]
    ) -> torch.Tensor:
        """The shared parameters' gradients, one row for each exit. Moved out of ``rows`` one by one, to save memory."""
        sizes = [trained[i].numel() for i in shared]
        jacobian = trained[0].new_empty(len(rows), sum(sizes), dtype=torch.float32)
        for i, columns in zip(shared, jacobian.split(sizes, dim=1)):
            for row, part in zip(rows, columns):
                gradient, row[i] = row[i], None
                if gradient is None:  # this loss does not reach the parameter
                    part.zero_()
                else:
                    part.copy_(gradient.flatten())
        return jacobian

    def _gradients_of(self, loss: torch.Tensor, trained: list[nn.Parameter], last: bool) -> list[torch.Tensor | None]:
        if not loss.requires_grad:  # all that it reaches is frozen
            return [None] * len(trained)
        try:
            return list(torch.autograd.grad(loss, trained, retain_graph=not last, allow_unused=True))
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            raise ValueError(
                f"aggregator={self.objective.aggregator!r} needs one backward pass for each exit, which a compiled "
                "model does not allow; train without --torchcompile."
            ) from error


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


class _WithGradient(torch.autograd.Function):
    """A value whose gradients with respect to some parameters are given."""

    @staticmethod
    def forward(ctx, value, gradients, earlier, aggregator, *parameters):
        ctx.gradients, ctx.earlier, ctx.aggregator = gradients, earlier, aggregator
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"aggregator={ctx.aggregator!r} has no second derivatives (create_graph=True, which AdaHessian needs); "
                "use another optimizer, or leave the aggregator out."
            )
        if any(_has_gradient(parameter) for parameter in ctx.earlier):  # not set to zero since the forward pass
            raise ValueError(
                f"aggregator={ctx.aggregator!r} found gradients of an earlier batch. Aggregated gradients cannot be "
                "accumulated over batches: train without --grad-accum-steps, and call optimizer.zero_grad() between "
                "two backward passes."
            )
        return None, None, None, None, *(None if gradient is None else scale * gradient for gradient in ctx.gradients)
