"""Official checkpoints load, and give the official implementation's logits and gradients.

The weights come from a formula (formula_fill.py), the expected values from the official code run on them.
"""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from formula_fill import fill, image
from helpers import GOLDEN_DATA
from safetensors.torch import load_file, save_file

import timm_dfs  # noqa: F401  registers the models

DATA = GOLDEN_DATA
OFFICIAL_SHAPES = json.loads((DATA / "official_state_dict_keys.json").read_text())

# case: (model, official network, settings)
CASES = {
    "vgg7_cifar100_beta0.5": ("dfs_vgg7_cifar100", "vgg7_64_cifar100", dict(beta=0.5)),
    "vgg7_cifar100_joint": ("dfs_vgg7_cifar100", "vgg7_64_cifar100", dict(beta="joint")),
    "resnet18_cifar100_beta0.5": ("dfs_resnet18_cifar100", "resnet18", dict(beta=0.5)),
    "msdnet_cifar100_beta0.5": ("dfs_msdnet_cifar100", "msdnet_cifar100", dict(beta=0.5)),
    "msdnet_cifar100_beta0.3_noref": ("dfs_msdnet_cifar100", "msdnet_cifar100", dict(beta=0.3, referencing="off")),
    "msdnet_cifar100_joint": ("dfs_msdnet_cifar100", "msdnet_cifar100", dict(beta="joint")),
    "msdnet_imagenet_beta0.5": ("dfs_msdnet_imagenet", "msdnet_imagenet", dict(beta=0.5)),
    "vit_tiny_beta0.5_start6": (
        "dfs_vit_tiny_patch16_224",
        "vit_tiny_patch16_224",
        dict(beta=0.5, referencing="one_sided", exits=tuple(f"blocks.{k}" for k in range(6, 11))),
    ),
}


def official_model(case, folder, weights=None):
    """The case's model, loaded from an official checkpoint file through timm's own route."""
    name, network, settings = CASES[case]
    golden = json.loads((DATA / "parity" / f"{case}.json").read_text())
    shapes = golden.get("shapes", OFFICIAL_SHAPES[network])
    weights = fill(shapes) if weights is None else {key: weights(i, shapes[key]) for i, key in enumerate(shapes)}
    file = folder / "official.safetensors"
    save_file(weights, file)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **settings)
    return model.eval(), golden, list(shapes)


@pytest.mark.parametrize("case", CASES)
def test_official_checkpoint_gives_the_official_logits_and_gradients(case, tmp_path, record_property):
    model, golden, keys = official_model(case, tmp_path)
    expected = load_file(DATA / "parity" / f"{case}.safetensors")["logits"]

    x = image(tuple(golden["input_shape"]))
    with torch.no_grad():
        logits = model.forward_exits(x)
    logit_error = ((torch.stack(logits) - expected).abs().max() / expected.abs().max()).item()
    record_property("logit_error", logit_error)
    assert logit_error <= 1e-4

    # In float64: in float32 an activation that is zero but for rounding passes its gradient on one machine
    # (or number of threads) and not on another, which moves some gradients by 0.5 %.
    model.double()
    target = torch.tensor(golden["target"])
    sum(F.cross_entropy(exit_logits, target) for exit_logits in model.forward_exits(x.double())).backward()

    # A checkpoint whose tensors hold their own key's number shows where each official element went.
    origin = official_model(case, tmp_path, lambda i, shape: torch.full(shape, float(i)))[0].state_dict()
    gradients = {}
    for name, parameter in model.named_parameters():
        for i in origin[name].unique().int().tolist():
            gradients[same_in_golden(keys[i], golden["grads"])] = parameter.grad[origin[name] == i]

    assert gradients.keys() == {key for key, value in golden["grads"].items() if value is not None}
    worst = 0.0
    for key, gradient in gradients.items():
        norm, dot = golden["grads"][key]
        direction = torch.cos(0.11 * torch.arange(gradient.numel(), dtype=torch.float64))
        difference = max(abs(gradient.double().norm().item() - norm), abs((gradient.double() @ direction).item() - dot))
        worst = max(worst, difference / norm)
        assert difference <= 1e-3 * norm, f"{key}: differs by {difference / norm:.2e} of its norm {norm}"
    record_property("gradient_error", worst)


def same_in_golden(key, grads):
    """The official ViT has some blocks twice under two names, and its golden gradients under one of them."""
    return key if grads.get(key) is not None else f"backbone_model.{key}"


def test_every_official_network_has_the_keys_its_model_expects(tmp_path):
    model = official_model("vgg7_cifar100_beta0.5", tmp_path)[0]
    assert timm.create_model("dfs_vgg7_cifar100").state_dict().keys() == model.state_dict().keys()
    save_file(fill(OFFICIAL_SHAPES["vgg16_64_imagenet"]), tmp_path / "vgg16.safetensors")
    timm.create_model(
        "dfs_vgg16_imagenet", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "vgg16.safetensors"))
    )


def test_our_own_checkpoint_loads_too(tmp_path):
    model = timm.create_model("dfs_vgg7_cifar100")
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    again = timm.create_model(
        "dfs_vgg7_cifar100", pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "ours.safetensors"))
    )
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
