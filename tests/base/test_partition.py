"""Gradients at a partition: which side trains which channels of an exit's feature."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from timm_dfs import Partition
from timm_dfs.base.heads import ExitHead
from timm_dfs.base.partition import PartitionedConv2d

BETAS = st.integers(0, 40).map(lambda n: n / 40)
REFERENCING = st.sampled_from(["two_sided", "one_sided", "off"])

# referencing: which channels get a gradient (from the deeper layers, from the exit's head)
GRADIENT_TABLE = {
    "two_sided": ("shared", "own"),
    "one_sided": ("shared", "all"),
    "off": ("shared", "own"),
}


@st.composite
def features(draw):
    """A feature of 1 to 4 axes and one of them, counted from either end, as its channels."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return 1 + torch.rand(shape, generator=generator), dim


def channels_of(feature, dim):
    """The feature with its channels first, everything else flat."""
    return feature.movedim(dim, 0).reshape(feature.shape[dim], -1)


def trained_channels(output, feature, dim):
    """Which channels of the feature get a gradient from the output; all or none of a channel's values must."""
    if not output.requires_grad:
        return [False] * feature.shape[dim]
    (gradient,) = torch.autograd.grad(output.sum(), feature, retain_graph=True, allow_unused=True)
    if gradient is None:
        return [False] * feature.shape[dim]
    assert ((gradient == 0) | (gradient == 1)).all()
    per_channel = channels_of(gradient, dim)
    assert (per_channel == per_channel[:, :1]).all()
    return (per_channel[:, 0] == 1).tolist()


@given(features(), BETAS, REFERENCING)
def test_sizes_are_the_rounded_share_of_the_channels(feature_and_dim, beta, referencing):
    feature, dim = feature_and_dim
    partition = Partition(feature.shape[dim], beta, referencing, dim)
    assert partition.shared == round(beta * feature.shape[dim])


@given(features(), BETAS, st.sampled_from(["two_sided", "one_sided"]), st.booleans())
def test_values_pass_unchanged_unless_referencing_is_off(feature_and_dim, beta, referencing, with_grad):
    feature, dim = feature_and_dim
    with torch.set_grad_enabled(with_grad):
        onward, own = Partition(feature.shape[dim], beta, referencing, dim)(feature.requires_grad_())
    assert torch.equal(onward, feature)
    assert torch.equal(own, feature)


@given(features(), BETAS, st.booleans())
def test_off_zeroes_the_other_sides_channels_with_and_without_gradients(feature_and_dim, beta, with_grad):
    feature, dim = feature_and_dim
    partition = Partition(feature.shape[dim], beta, "off", dim)
    with torch.set_grad_enabled(with_grad):
        onward, own = partition(feature)
    values = channels_of(feature, dim)
    onward, own = channels_of(onward, dim), channels_of(own, dim)
    shared = partition.shared
    assert torch.equal(onward[:shared], values[:shared]) and not onward[shared:].any()
    assert torch.equal(own[shared:], values[shared:]) and not own[:shared].any()


@given(features(), BETAS, REFERENCING)
def test_gradients_follow_the_table_of_the_design(feature_and_dim, beta, referencing):
    feature, dim = feature_and_dim
    feature.requires_grad_()
    partition = Partition(feature.shape[dim], beta, referencing, dim)
    is_shared = [c < partition.shared for c in range(partition.channels)]
    expected = {"shared": is_shared, "own": [not s for s in is_shared], "all": [True] * partition.channels}
    from_onward, from_head = GRADIENT_TABLE[referencing]
    onward, own = partition(feature)
    assert trained_channels(onward, feature, dim) == expected[from_onward]
    assert trained_channels(own, feature, dim) == expected[from_head]


@given(features(), REFERENCING)
def test_without_beta_both_sides_train_every_channel(feature_and_dim, referencing):
    feature, dim = feature_and_dim
    feature.requires_grad_()
    onward, own = Partition(feature.shape[dim], None, referencing, dim)(feature)
    assert all(trained_channels(onward * 1, feature, dim))
    assert all(trained_channels(own * 1, feature, dim))
    assert torch.equal(onward, feature) and torch.equal(own, feature)


@given(BETAS, REFERENCING, st.booleans())
def test_averaging_inside_the_partition_is_averaging_behind_it(beta, referencing, in_parts):
    torch.manual_seed(0)
    leaf, weight, deeper = torch.randn(2, 12, 3, 5), torch.randn(2, 12, 1, 1), PartitionedConv2d(12, 3, 3)
    results = []
    for averaged in (False, True):
        feature = leaf.clone().requires_grad_()
        onward, exit_feature = Partition(12, beta, referencing, in_parts=in_parts)(feature, averaged)
        pooled = exit_feature.mean((2, 3), keepdim=True)
        ((pooled * weight).sum() + deeper(onward).sin().sum()).backward()
        results.append((pooled.detach(), feature.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


@pytest.mark.parametrize("pool_type", ["avg", "fast", "fastavg", "max", "avgmax", "catavgmax"])
@pytest.mark.parametrize("body", [None, nn.ReLU()])
def test_a_head_that_averages_gives_the_same_logits_from_averages(pool_type, body):
    head = ExitHead(4, 3, body, pool_type)
    feature = torch.randn(2, 4, 5, 6)
    if head.averages:
        assert torch.equal(head(feature), head(feature.mean((2, 3), keepdim=True)))
    assert head.averages == (pool_type == "avg" and body is None)


@given(features())
def test_one_sided_at_beta_one_is_joint_training(feature_and_dim):
    feature, dim = feature_and_dim
    weight = torch.rand_like(feature)
    gradients = []
    for beta in (1, None):
        leaf = feature.clone().requires_grad_()
        onward, own = Partition(leaf.shape[dim], beta, "one_sided", dim)(leaf)
        ((onward * weight).sum() + (own * weight**2).sum()).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("beta", "shared"), [(0, 0), (0.1, 1), (0.24, 2), (0.26, 3), (0.5, 5), (0.96, 10), (1, 10)])
def test_of_ten_channels_the_nearest_whole_number_is_shared(beta, shared):
    assert Partition(10, beta).shared == shared


@pytest.mark.parametrize("referencing", GRADIENT_TABLE)
def test_beta_zero_lets_deeper_layers_train_nothing(referencing):
    feature = torch.rand(2, 5, 3, requires_grad=True)
    onward, own = Partition(5, 0, referencing)(feature)
    assert trained_channels(onward, feature, 1) == [False] * 5
    assert trained_channels(own, feature, 1) == [True] * 5


def test_two_sided_at_beta_one_lets_the_head_train_nothing():
    feature = torch.rand(2, 5, 3, requires_grad=True)
    onward, own = Partition(5, 1, "two_sided")(feature)
    assert trained_channels(onward, feature, 1) == [True] * 5
    assert trained_channels(own, feature, 1) == [False] * 5


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan, math.inf, True, "0.5", "Joint"])
def test_a_beta_outside_zero_to_one_is_refused_by_its_value(beta):
    with pytest.raises(ValueError, match="beta is ") as error:
        Partition(4, beta)
    assert repr(beta) in str(error.value)


@pytest.mark.parametrize("referencing", ["both", "", None, "Two_Sided", True])
def test_an_unknown_referencing_is_refused_by_its_value(referencing):
    with pytest.raises(ValueError, match="'two_sided', 'one_sided', 'off'") as error:
        Partition(4, 0.5, referencing)
    assert repr(referencing) in str(error.value)


def test_yaml_s_reading_of_off_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="in quotation marks"):
        Partition(4, 0.5, False)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_a_feature_with_other_channels_is_refused_by_its_shape(beta):
    with pytest.raises(ValueError, match=r"4 channels on axis 1.*\(2, 5, 3\)"):
        Partition(4, beta)(torch.rand(2, 5, 3))
    with pytest.raises(ValueError, match=r"4 channels on axis -1.*\(2, 4, 3\)"):
        Partition(4, beta, dim=-1)(torch.rand(2, 4, 3))


# The same gradients, for less: parts, memory formats, types.


def trained_by(beta, referencing, channels_last=False, dtype=torch.float64, autocast=False, conv=nn.Conv2d):
    """Gradients of a small network: convolution, partition, a deeper convolution and a head."""
    torch.manual_seed(0)
    first, deeper = nn.Conv2d(3, 8, 3, padding=1), conv(8, 6, 3, padding=1, stride=2)
    head = nn.Linear(8, 5)
    x = torch.randn(4, 3, 9, 7)
    network = nn.ModuleList([first, deeper, head]).to(dtype)
    x = x.to(dtype)
    if channels_last:
        network, x = network.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    partition = Partition(8, beta, referencing, in_parts=conv is PartitionedConv2d)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        onward, feature = partition(first(x).tanh())
        loss = deeper(onward).float().sin().sum() + head(feature.mean((2, 3))).float().cos().sum()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("referencing", ["two_sided", "one_sided"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.75, 0.9, 1.0])
def test_a_partitioned_convolution_gives_the_gradients_that_stopping_them_gives(beta, referencing, channels_last):
    loss, gradients = trained_by(beta, referencing, channels_last)
    again, cheaper = trained_by(beta, referencing, channels_last, conv=PartitionedConv2d)
    assert torch.equal(loss, again)
    for ours, theirs in zip(cheaper, gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_partitioned_convolution_keeps_its_gradients_under_autocast():
    _, gradients = trained_by(0.5, "two_sided", dtype=torch.float32, autocast=True)
    _, cheaper = trained_by(0.5, "two_sided", dtype=torch.float32, autocast=True, conv=PartitionedConv2d)
    for ours, theirs in zip(cheaper, gradients, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.allclose(ours, theirs, rtol=0.05, atol=0.02)


def test_without_a_partly_trained_input_a_partitioned_convolution_is_a_convolution():
    plain, ours = nn.Conv2d(4, 6, 3), PartitionedConv2d(4, 6, 3)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("referencing", ["two_sided", "one_sided"])
def test_the_gradient_keeps_the_feature_s_memory_format(referencing):
    feature = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = []
    inner = feature * 1
    inner.register_hook(lambda gradient: seen.append(gradient.is_contiguous(memory_format=torch.channels_last)))
    onward, exit_feature = Partition(4, 0.5, referencing)(inner)
    (onward.sum() + exit_feature.mean((2, 3)).sum()).backward()
    assert seen == [True]


@pytest.mark.parametrize("referencing", ["two_sided", "one_sided"])
def test_a_side_whose_output_is_unused_trains_nothing(referencing):
    for side, expected in ((0, [1, 1, 0, 0]), (1, [0, 0, 1, 1] if referencing == "two_sided" else [1, 1, 1, 1])):
        feature = torch.randn(2, 4, requires_grad=True)
        Partition(4, 0.5, referencing)(feature)[side].sum().backward()
        assert feature.grad.tolist() == [expected] * 2


@pytest.mark.parametrize("in_parts", [False, True])
def test_second_derivatives_are_refused_rather_than_wrong(in_parts):
    feature = torch.randn(2, 4, 3, 3, requires_grad=True)
    onward, exit_feature = Partition(4, 0.5, in_parts=in_parts)(feature)
    deeper = PartitionedConv2d(4, 2, 3)(onward) if in_parts else onward
    loss = deeper.square().sum() + exit_feature.square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, feature, create_graph=True)


def test_without_a_partition_second_derivatives_are_there():
    feature = torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = sum(part.square().sum() for part in Partition(4, None)(feature))
    (gradient,) = torch.autograd.grad(loss, feature, create_graph=True)
    assert torch.allclose(torch.autograd.grad(gradient.sum(), feature)[0], torch.full_like(feature, 4.0))


@pytest.mark.parametrize(
    "given", [dict(padding="same"), dict(padding=1, padding_mode="reflect"), dict(groups=3)], ids=str
)
def test_a_convolution_that_would_compute_something_else_from_a_partitioned_feature_is_refused(given):
    onward, _ = Partition(12, 0.5, in_parts=True)(torch.randn(2, 12, 5, 5, requires_grad=True))
    with pytest.raises(ValueError, match="takes no PartlyTrained input"):
        PartitionedConv2d(12, 3, 3, **given)(onward)
