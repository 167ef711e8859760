"""A fused network has the logits of the network at every exit, and the network is not changed."""

import copy

import pytest
import torch
from helpers import BACKBONES, TINY, images, settled, tiny_msdnet, tiny_vgg, wrapped
from torch import nn

from timm_dfs import ExitPolicy, fuse, predict
from timm_dfs.inference.fusion import _pairs


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def assert_same_logits(ours, theirs, batch):
    for mine, its in zip(ours.forward_exits(batch), theirs.forward_exits(batch), strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=TINY)
def native(request):
    return settled(TINY[request.param]())


@torch.no_grad()
def test_a_native_networks_exits_have_the_same_logits(native):
    assert_same_logits(fuse(native), native, images(4))


@torch.no_grad()
@pytest.mark.parametrize("layout", BACKBONES)
def test_a_wrapped_networks_exits_have_the_same_logits(layout):
    model = settled(wrapped(layout))
    fused = fuse(model)
    assert_same_logits(fused, model, images(4, size=64))
    assert torch.equal(fused(images(4, size=64)), fused.forward_exits(images(4, size=64))[-1])


def test_a_network_is_fused_under_autocast_as_without_it():
    model = settled(wrapped())
    with torch.autocast("cpu"):
        within = fuse(model)
    expected = fuse(model).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in within.state_dict().items())


def test_norms_behind_convolutions_are_gone():
    assert norms(settled(TINY["msdnet"]())) and not norms(fuse(settled(TINY["msdnet"]())))
    assert not norms(fuse(settled(wrapped())))


def test_norms_behind_something_else_stay():
    model = settled(TINY["vgg"]())  # whose first block has a ReLU, in place, between convolution and norm
    assert len(norms(fuse(model))) == len(norms(model)) > 0


def test_the_network_stays_as_it_is(native):
    native.train()
    before = copy.deepcopy(native.state_dict())
    fused = fuse(native)
    assert native.training and not fused.training
    assert native.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in native.state_dict().items())
    assert all(parameter.requires_grad for parameter in native.parameters())
    assert not any(parameter.requires_grad for parameter in fused.parameters())


@torch.no_grad()
def test_samples_leave_a_fused_network_where_they_leave_the_network(native):
    batch = images(16)
    first = native.forward_exits(batch)[0].softmax(-1).amax(-1).sort().values
    policy = ExitPolicy([first[7:9].mean().item(), *[None] * (native.num_exits - 2), 0.0])
    ours, theirs = predict(fuse(native), batch, policy), predict(native, batch, policy)
    assert torch.equal(ours.exit_index, theirs.exit_index)
    assert set(ours.exit_index.tolist()) == {0, native.num_exits - 1}
    assert torch.allclose(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_features_stay_channels_last_when_samples_leave():
    model, seen = fuse(settled(TINY["msdnet"]())), []
    walk = model.advance
    model.advance = lambda state, k: seen.append(state) or walk(state, k)
    first = model.forward_exits(images(16))[0].softmax(-1).amax(-1).median().item()
    seen.clear()
    predict(model, images(16), ExitPolicy([first, None, 0.0]))
    features = [tensor for state in seen[1:] for tensor in state]
    assert features and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in features)


class Shortcut(nn.Module):
    """A norm's input that something else reads, too."""

    def __init__(self, inner):
        super().__init__()
        self.conv, self.norm, self.inner = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), inner

    def forward(self, x):
        x = self.conv(x)
        return self.inner(x + self.norm(x))


def test_a_network_that_reads_a_convolution_twice_is_refused():
    model = settled(wrapped())
    model.backbone.conv1 = Shortcut(model.backbone.conv1)
    nn.init.constant_(model.backbone.conv1.norm.running_mean, 3.0)
    with pytest.raises(ValueError, match="MultiExit cannot be fused"):
        fuse(model.eval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_fused_as_precisely_as_it_can_be(native, dtype):
    half = copy.deepcopy(native).to(dtype)
    fused = fuse(half)
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    precise = fuse(copy.deepcopy(half).float())
    for ours, its in zip(fused.parameters(), precise.parameters(), strict=True):
        assert torch.equal(ours, its.to(dtype))


def test_a_folded_weight_that_does_not_fit_is_refused():
    model = settled(tiny_msdnet())
    conv, norm = _pairs(model, (3, 32, 32))[0]
    model.get_submodule(norm).weight.data.fill_(6e4)
    model.get_submodule(conv).weight.data.mul_(100)
    with pytest.raises(ValueError, match="a folded weight does not fit into it"):
        fuse(model.half())


def test_a_network_whose_logits_are_not_finite_is_refused():
    model = settled(tiny_vgg())
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="its own logits are not finite"):
        fuse(model)


def test_what_has_no_exits_is_refused():
    with pytest.raises(ValueError, match="has no exits"):
        fuse(nn.Conv2d(3, 3, 1))
