"""Latency of each exit."""

import pytest
import torch
from helpers import images, module_modes, settled, tiny_vgg

from timm_dfs.evaluation.latency import exit_latencies


def test_latencies_are_positive_and_never_fall_and_the_model_stays_as_it_was():
    model = settled(tiny_vgg()).train()
    modes = module_modes(model)
    latencies = exit_latencies(model, images(1), rounds=3)
    assert len(latencies) == model.num_exits
    assert 0 < latencies[0] and latencies == sorted(latencies)
    assert module_modes(model) == modes


def test_what_is_no_network_with_exits_is_refused():
    with pytest.raises(ValueError, match="has no exits"):
        exit_latencies(torch.nn.Linear(2, 2), images(1))


@pytest.mark.filterwarnings("ignore:The logits of samples")
def test_a_network_of_nan_is_refused():
    model = settled(tiny_vgg())
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="check the weights"):
        exit_latencies(model, images(1))
