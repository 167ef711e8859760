"""How far the exits pull the weights they share in different directions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..base.evaluating import as_images, evaluating, require_exits
from ..base.model import MultiExitModel


@dataclass(frozen=True)
class GradientConflict:
    """Cosines between the gradients of the exits' losses.

    Attributes:
        layers: Names of the L modules whose own parameters at least two exits train, in the network's order.
        cosine: Cosine for each of them and each pair of exits, the mean over batches (L, E, E); NaN where not both
            exits train the layer.
        conflicting: Share of pairs that conflict (cosine below 0) among all pairs of different exits that train a
            layer together, over layers and batches.
    """

    layers: tuple[str, ...]
    cosine: torch.Tensor
    conflicting: float


def gradient_conflict(model: MultiExitModel, loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> GradientConflict:
    """Compare the gradients that the exits' cross-entropies give the weights they share (DFS, section 3.1).

    Runs in eval mode, so that no statistics change, and leaves every parameter's ``.grad`` as it was. Keep batches
    as large as training's: the gradients of small ones are mostly noise. Memory is that of one backward pass and one
    gradient for each exit.

    Args:
        model: A network with exits.
        loader: Batches of images (B, in_chans, H, W) and labels (B,).

    Raises:
        ValueError: If the model has no exits, the loader is empty, a gradient is not finite, or no layer is trained
            by two exits.
    """
    require_exits(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("No parameter is trained (all are frozen): nothing conflicts.")
    layer_of = [name.rpartition(".")[0] for name, _ in named]
    layers = list(dict.fromkeys(layer_of))
    batches = []
    with evaluating(model), torch.enable_grad():
        for x, target in loader:
            x = as_images(model, x)
            logits = model.forward_exits(x)
            gradients = []
            for k, exit_logits in enumerate(logits):
                loss = F.cross_entropy(exit_logits, target.to(x.device))
                raw = torch.autograd.grad(
                    loss, [p for _, p in named], retain_graph=k < model.num_exits - 1, allow_unused=True
                )
                gradients.append(_by_layer(raw, layer_of))
            batches.append(torch.stack([_cosines([gradient.get(layer) for gradient in gradients]) for layer in layers]))
    if not batches:
        raise ValueError("The loader gave no batch; check the data set and its split.")
    cosine = torch.stack(batches)
    first, second = torch.triu_indices(model.num_exits, model.num_exits, offset=1)
    pairs = cosine[:, :, first, second]
    shared = ~pairs.isnan().all(0).all(-1)
    if not shared.any():
        raise ValueError(
            "No layer is trained by two exits (beta 0, two exits or a frozen backbone): nothing conflicts."
        )
    return GradientConflict(
        layers=tuple(name for name, is_shared in zip(layers, shared.tolist()) if is_shared),
        cosine=cosine.nanmean(0)[shared],
        conflicting=(pairs[~pairs.isnan()] < 0).double().mean().item(),
    )


def _by_layer(gradients: Sequence[torch.Tensor | None], layer_of: Sequence[str]) -> dict[str, torch.Tensor]:
    """The gradients joined to one vector a layer; layers that the loss does not reach are absent.

    A stop-gradient inside a layer's feature (referencing) leaves zeros rather than nothing: absent, too.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for layer, gradient in zip(layer_of, gradients):
        if gradient is not None:
            if not gradient.isfinite().all():
                raise ValueError(f"The gradient of {layer} is not finite; check the weights and the images.")
            parts.setdefault(layer, []).append(gradient.flatten())
    vectors = {layer: torch.cat(part) for layer, part in parts.items()}
    return {layer: vector for layer, vector in vectors.items() if vector.any()}


def _cosines(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Cosine of each pair (E, E), on the CPU; NaN where one is absent."""
    cosine = torch.full((len(gradients), len(gradients)), float("nan"))
    present = [k for k, gradient in enumerate(gradients) if gradient is not None]
    vectors = [gradient for gradient in gradients if gradient is not None]
    if present:
        unit = F.normalize(torch.stack(vectors).double(), dim=1, eps=0.0)
        cosine[torch.tensor(present)[:, None], torch.tensor(present)] = (unit @ unit.T).float().cpu()
    return cosine
