"""What timm's layers keep of their weights in eval mode is never that of older weights."""

import copy

import pytest
import timm
import torch

import timm_dfs

NEVER = timm_dfs.ExitPolicy([None, 0.0])


def network(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, exits=2, beta="joint")


def images():
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def with_other_biases(model):
    state = copy.deepcopy(model.state_dict())
    for name, value in state.items():
        if name.endswith("attention_biases"):
            state[name] = 10 * torch.randn_like(value)
    return state


@pytest.mark.parametrize("training", [True, False], ids=["training mode", "eval mode"])
@pytest.mark.parametrize("name", ["dfs_levit_128s", "dfs_tiny_vit_5m_224"])
def test_predictions_are_of_the_weights_that_were_loaded_last(name, training):
    model = network(name).train(training)
    before = timm_dfs.predict(model, images(), NEVER).logits
    model.load_state_dict(with_other_biases(model))
    after = timm_dfs.predict(model, images(), NEVER).logits
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model.eval()(images()))
    assert not model.training


def test_predictions_between_steps_of_training_are_of_the_trained_weights():
    model = network("dfs_levit_128s").train()
    timm_dfs.predict(model, images(), NEVER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter += torch.randn_like(parameter)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(timm_dfs.predict(model, images(), NEVER).logits, copy.deepcopy(model).eval()(images()))


def test_logits_of_a_data_set_are_of_weights_that_changed_in_eval_mode():
    model = network("dfs_levit_128s").eval()
    loader = [(images(), torch.zeros(1).long())]
    timm_dfs.collect_logits(model, loader)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter += torch.randn_like(parameter)
    found, _ = timm_dfs.collect_logits(model, loader)
    torch.testing.assert_close(found[-1], copy.deepcopy(model).eval()(images()))


def test_weights_that_are_loaded_into_the_backbone_alone_are_used_at_once():
    model = network("dfs_levit_128s").eval()
    timm_dfs.predict(model, images(), NEVER)
    model.backbone.load_state_dict(with_other_biases(model.backbone))
    torch.testing.assert_close(timm_dfs.predict(model, images(), NEVER).logits, copy.deepcopy(model).eval()(images()))


def test_a_model_that_was_called_with_gradients_can_be_fused():
    model = network("dfs_levit_128s").eval()
    model(images())
    assert timm_dfs.fuse(model).is_fused


def test_modes_that_were_set_one_by_one_stay():
    model = network("dfs_levit_128s").train()
    for module in list(model.modules())[::3]:
        module.training = False
    modes = [module.training for module in model.modules()]
    timm_dfs.predict(model, images(), NEVER)
    model.load_state_dict(model.state_dict())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("training", [True, False], ids=["training mode", "eval mode"])
def test_the_conflict_of_gradients_takes_several_batches_and_what_was_predicted_before(training):
    model = network("dfs_levit_128s").train(training)
    batches = [(images(), torch.tensor([1])), (images(), torch.tensor([2]))]
    expected = timm_dfs.gradient_conflict(copy.deepcopy(model), batches)
    timm_dfs.predict(model.eval(), images(), NEVER)
    found = timm_dfs.gradient_conflict(model.train(training), batches)
    assert found.layers == expected.layers and any("attn" in layer for layer in found.layers)
    torch.testing.assert_close(found.cosine, expected.cosine, equal_nan=True)
    copy.deepcopy(model)  # no layer keeps a part of a graph


def test_no_layer_keeps_a_part_of_a_graph_after_a_conflict_of_gradients_that_failed():
    model = network("dfs_levit_128s").eval()
    with pytest.raises(ValueError, match="not finite"):
        timm_dfs.gradient_conflict(model, [(images() * float("inf"), torch.tensor([1]))])
    copy.deepcopy(model)
