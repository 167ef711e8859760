"""The smallest network of each of timm's modules exports, exits as ``predict`` does and shrinks its batch."""

import pytest
import torch
from helpers import CLASSES, images
from models.test_every_module import SIZE, SIZES, SMALLEST, made
from torch import nn
from torch.torch_version import TorchVersion

from timm_dfs import ExitPolicy
from timm_dfs.export import export_onnx
from timm_dfs.export.verify import mixed

pytest.importorskip("onnx", reason="needs the extra deploy")
pytest.importorskip("onnxruntime", reason="needs the extra deploy")

QUICK = {"byobnet", "convnext", "efficientnet", "mambaout", "maxxvit", "mobilenetv3", "nfnet", "resnet", "regnet"}
QUICK |= {"vision_transformer", "vision_transformer_relpos", "starnet"}
"""Modules whose networks are exported in every test run."""

WHOLE: dict[str, str] = {}
"""Modules whose batch does not shrink in ONNX, and why."""

UNEXPORTABLE = {
    "convmixer": "logits differ",  # rounding grows from layer to layer beyond what the verification allows
    "gemma4_vit": "not valid ONNX",  # torch's exporter loses bounds of clamps that it names alike
    "inception_v4": "logits differ",
}
"""Modules whose networks cannot be exported, and a part of the error."""

TRANSLATED = {"convnext", "mambaout", "maxxvit", "vision_transformer_sam"}
"""Modules whose export needs a translation of an operator that older versions of torch do not take."""

BATCH = 6


def trained_like(module):
    """A network with norms that know the images, and early exits that tell them apart, as they do when trained."""
    torch.manual_seed(0)
    model = made(module)
    size = SIZES.get(module, SIZE)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        model.train().forward_exits(images(16, size=size))
        model.eval()
        batch = images(BATCH, size=size)
        for head, logits in zip(model.heads, model.forward_exits(batch)):
            head.fc.weight.div_(spread := (logits - logits.mean(0)).std())
            head.fc.bias.copy_(-logits.mean(0) / spread)
    return model, batch


@pytest.mark.parametrize(
    "module", [module if module in QUICK else pytest.param(module, marks=pytest.mark.slow) for module in SMALLEST]
)
def test_a_network_of_the_module_is_exported_with_its_exits(module, tmp_path):
    if module in TRANSLATED and torch.__version__ < TorchVersion("2.11"):
        pytest.skip("needs an exporter that takes our translations of operators: torch 2.11 does, 2.9.1 does not")
    model, batch = trained_like(module)
    with torch.no_grad():
        logits = torch.stack(model.forward_exits(batch))
    policy = mixed(ExitPolicy([0.0] * model.num_exits), logits)
    if module in UNEXPORTABLE:
        with pytest.raises(ValueError, match=UNEXPORTABLE[module]):
            export_onnx(model, tmp_path / "out", policy, images=batch)
        assert not list(tmp_path.iterdir())
        return
    result = export_onnx(model, tmp_path / "out", policy, images=batch)
    assert logits.shape[-1] == CLASSES and len(result.exits) == model.num_exits
    as_exported = next(check for check in result.checks if check.batch_size == BATCH)
    assert sum(count > 0 for count in as_exported.exit_counts) > 1
    assert all(result.shrinks) == (module not in WHOLE)
