"""Weights know their exit points: they are not loaded at others, where the early exits' logits would be wrong."""

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3

from timm_dfs.hub import folder as hub
from timm_dfs.wrapped.recorded_points import KEY, decoded

POINTS = ["blocks.0", "blocks.2"]
REFUSAL = r"trained with exits after blocks\.0, blocks\.2, but the model has them"


def vit(**kwargs):
    """A twin whose blocks have features of one width, so that the heads of any fit everywhere."""
    return timm.create_model("dfs_test_vit", num_classes=10, **kwargs)


@pytest.fixture
def trained():
    return vit(exits=POINTS, presets=dict(fast=dict(thresholds=[0.5, 0.5, 0.0])))


@pytest.mark.parametrize("exits", [3, ["blocks.1", "blocks.4"], ["blocks.0", "blocks.3"]])
def test_weights_are_refused_by_a_network_with_other_exit_points(trained, exits, tmp_path):
    torch.save(trained.state_dict(), file := tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"create it with exits=\['blocks\.0', 'blocks\.2'\]"):
        load_checkpoint(vit(exits=exits), str(file))


def test_every_way_to_load_refuses_other_exit_points(trained, tmp_path):
    torch.save(trained.state_dict(), file := tmp_path / "weights.pth")
    hub.write_weights(trained, tmp_path / "folder")
    for load in (
        lambda: vit(exits=3).load_state_dict(trained.state_dict()),
        lambda: vit(exits=3, checkpoint_path=str(file)),
        lambda: vit(exits=3, pretrained=True, pretrained_cfg_overlay=dict(file=str(file))),
        lambda: timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, exits=3),
    ):
        with pytest.raises(ValueError, match=REFUSAL):
            load()


def test_a_folder_whose_weights_do_not_record_them_is_refused_by_its_config(trained, tmp_path):
    trained.register_state_dict_post_hook(lambda model, state_dict, *_: state_dict.__delitem__(KEY))
    hub.write_weights(trained, tmp_path)
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(ValueError, match=REFUSAL):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, exits=3)


def test_another_name_of_the_same_point_is_accepted():
    model = timm.create_model("dfs_test_resnet", exits=["layer1", "layer3"])
    timm.create_model("dfs_test_resnet", exits=["layer1.0", "layer3.0"]).load_state_dict(model.state_dict())


def test_weights_without_them_may_be_loaded_anywhere(trained):
    state_dict = trained.state_dict()
    del state_dict[KEY]
    vit(exits=3).load_state_dict(state_dict)


def test_averaged_and_halved_weights_keep_them(trained):
    average = ModelEmaV3(trained, decay=0.9)
    average.update(trained)
    states = [trained.state_dict(), average.module.state_dict()]
    mean = {key: (states[0][key].double() + states[1][key].double()) / 2 for key in states[0]}
    for state_dict in (*states, mean, {key: value.half() for key, value in mean.items()}):
        assert decoded(state_dict[KEY]) == POINTS
        vit(exits=POINTS).load_state_dict(state_dict)
