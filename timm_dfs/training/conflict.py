"""Gradient conflict: the angle between the exits' gradients of the weights that they share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..base.caches import forget
from ..base.evaluating import as_images, evaluating, require_exits
from ..base.model import MultiExitModel


@dataclass(frozen=True)
class GradientConflict:
    """Cosines between the gradients of the exits' losses.

    Attributes:
        layers: Names of the L modules whose own parameters at least two exits train, in the network's order.
        cosine: Cosine (L, E, E) for each layer and pair of exits, averaged over batches; NaN where not both exits train
            the layer.
        conflicting: Share, in [0, 1], of pairs with a cosine below 0, among all pairs of different exits that both
            train a layer, over layers and batches.

    Example:
        >>> import torch, timm_dfs
        >>> found = timm_dfs.GradientConflict(("stem",), torch.tensor([[[1.0, -0.5], [-0.5, 1.0]]]), conflicting=1.0)
        >>> found.cosine[0, 0, 1].item()  # between exits 0 and 1, for the first layer
        -0.5
    """

    layers: tuple[str, ...]
    cosine: torch.Tensor
    conflicting: float


def gradient_conflict(model: MultiExitModel, loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> GradientConflict:
    """Measure the angle between the gradients of the exits' cross-entropies (DFS, arXiv 2407.13986, section 3.1).

    The model is evaluated in eval mode, so that no statistics change, and keeps every parameter's ``.grad``. Use
    batches as large as in training, because the gradients of small batches are mostly noise. Memory is that of one
    backward pass plus one gradient for each exit.

    Args:
        model: A network with exits.
        loader: Batches of images (B, in_chans, H, W) and labels (B,).

    Returns:
        Cosines between the exits' gradients, by layer, and the share of pairs that conflict.

    Raises:
        ValueError: If the model has no exits, the loader is empty, a gradient is not finite, or no layer is trained
            by two exits.

    Example:
        >>> import timm, torch, timm_dfs
        >>> model = timm.create_model("dfs_vgg7_cifar100", beta="joint", depths=(1, 2), widths=(6, 8), num_classes=5)
        >>> batch = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
        >>> found = timm_dfs.gradient_conflict(model, [batch])
        >>> found.layers  # the layers that at least two exits train
        ('stages.0.conv', 'stages.0.bn', 'stages.1.conv', 'stages.1.bn')
        >>> tuple(found.cosine.shape), 0 <= found.conflicting <= 1
        ((4, 3, 3), True)
    """
    require_exits(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("All parameters are frozen, so there are no gradients to compare; unfreeze the model.")
    layers = list(dict.fromkeys(_layer(name) for name, _ in named))
    batches = []
    with evaluating(model), torch.enable_grad():
        for x, target in loader:
            gradients = _gradients_of_exits(model, x, target, named)
            batches.append(torch.stack([_cosines([gradient.get(layer) for gradient in gradients]) for layer in layers]))
    if not batches:
        raise ValueError("The loader has no batches; check the data set and its split.")
    cosine = torch.stack(batches)
    first, second = torch.triu_indices(model.num_exits, model.num_exits, offset=1)
    pairs = cosine[:, :, first, second]
    shared = ~pairs.isnan().all(0).all(-1)
    if not shared.any():
        raise ValueError(
            "No layer is trained by two exits (beta is 0, or the backbone is frozen), so there are no gradients to "
            "compare."
        )
    return GradientConflict(
        layers=tuple(name for name, is_shared in zip(layers, shared.tolist()) if is_shared),
        cosine=cosine.nanmean(0)[shared],
        conflicting=(pairs[~pairs.isnan()] < 0).double().mean().item(),
    )


def _gradients_of_exits(
    model: MultiExitModel, x: torch.Tensor, target: torch.Tensor, named: Sequence[tuple[str, torch.nn.Parameter]]
) -> list[dict[str, torch.Tensor]]:
    """For each exit, the gradient of its cross-entropy on a batch, by layer."""
    gradients: list[dict[str, torch.Tensor]] = []
    x = as_images(model, x)
    try:
        forget(model)  # what layers keep may be of no graph
        for k, exit_logits in enumerate(model.forward_exits(x)):
            loss = F.cross_entropy(exit_logits, target.to(x.device))
            if not loss.requires_grad:  # all that this exit reaches is frozen
                gradients.append({})
                continue
            raw = torch.autograd.grad(
                loss, [p for _, p in named], retain_graph=k < model.num_exits - 1, allow_unused=True
            )
            gradients.append(_by_layer(raw, named))
    finally:
        forget(model)  # what they keep now is part of this batch's graph
    return gradients


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _by_layer(
    gradients: Sequence[torch.Tensor | None], named: Sequence[tuple[str, torch.nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """The gradient of each layer as one vector, for the layers that the loss reaches.

    Layers whose gradient is all zero, which a stop-gradient (referencing) causes, are left out too. Of a layer that the
    loss reaches in part, the gradient of the rest is zero.
    """
    parts: dict[str, list[torch.Tensor]] = {
        _layer(name): [] for (name, _), gradient in zip(named, gradients) if gradient is not None
    }
    for (name, parameter), gradient in zip(named, gradients):
        if (layer := _layer(name)) in parts:
            if gradient is not None and not gradient.isfinite().all():
                raise ValueError(f"The gradient of {layer} is not finite; check the weights and the images.")
            parts[layer].append((torch.zeros_like(parameter) if gradient is None else gradient).flatten())
    vectors = {layer: torch.cat(part) for layer, part in parts.items()}
    return {layer: vector for layer, vector in vectors.items() if vector.any()}


def _cosines(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Cosine of each pair (E, E), on the CPU; NaN where one is ``None``."""
    cosine = torch.full((len(gradients), len(gradients)), float("nan"))
    present = [k for k, gradient in enumerate(gradients) if gradient is not None]
    vectors = [gradient for gradient in gradients if gradient is not None]
    if present:
        unit = F.normalize(torch.stack(vectors).double(), dim=1, eps=0.0)
        cosine[torch.tensor(present)[:, None], torch.tensor(present)] = (unit @ unit.T).float().cpu()
    return cosine
