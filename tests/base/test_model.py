"""Native networks work with features_only and torch.jit.trace, as timm's own networks do."""

import pytest
import timm
import torch
from helpers import TINY, images, settled


@pytest.fixture(params=TINY.values(), ids=TINY)
def make(request):
    return request.param


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_a_trace_in_eval_mode_computes_the_last_exits_logits(make):
    model = settled(make())
    traced = torch.jit.trace(model, images())
    assert torch.allclose(traced(images(2, seed=1)), model(images(2, seed=1)), atol=1e-5)


@pytest.mark.parametrize("objective", [dict(), dict(gradient_equilibrium=True)], ids=str)
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_a_trace_has_the_same_graph_with_and_without_gradients(objective):
    model = settled(TINY["vgg"](**objective))
    traced = torch.jit.trace(model, images())
    with torch.no_grad():
        assert len(list(torch.jit.trace(model, images()).graph.nodes())) == len(list(traced.graph.nodes()))


def test_features_only_gives_the_same_maps_in_training_as_in_eval_mode(make):
    network = make(features_only=True)
    for module in network.modules():
        module.eval()
    expected = network(images())
    network.training = network.body.training = True  # the layers' statistics stay
    assert all(torch.equal(ours, its) for ours, its in zip(network(images()), expected, strict=True))
    assert [feature.shape[1] for feature in expected] == network.feature_info.channels()


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("name", ["dfs_vgg7_cifar100", "dfs_test_resnet"])
def test_torchscript_is_refused_with_what_to_use_instead(name):
    with pytest.raises(ValueError, match=r"torch\.jit\.script.*does not support.*; use torch\.compile"):
        torch.jit.script(timm.create_model(name, num_classes=5))
