"""A run that started from trained weights is built as they were, whatever its command line left out."""

import argparse

import pytest
import timm
import torch
from helpers import CLASSES, published, settled, twin

from timm_dfs.cli.base import create
from timm_dfs.hub.from_checkpoint import trained_model
from timm_dfs.pretrained.runs import complete_args
from timm_dfs.training.run import TrainingRun, read_run

NAME = "dfs_test_resnet"
GIVEN = dict(num_classes=7)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    model = settled(twin(exits=["layer1"], global_pool="max"))
    model.pretrained_cfg.update(input_size=(3, 96, 96), mean=(0.5, 0.4, 0.3), crop_pct=0.5)
    published(tmp_path / NAME, model)
    monkeypatch.setenv("TIMM_DFS_HUB", str(tmp_path))


def test_what_a_run_does_not_record_is_taken_from_the_weights_it_started_from(hub):
    args = complete_args(TrainingRun(NAME, GIVEN, dict(pretrained=True)))
    assert args["exits"] == ["layer1"] and args["global_pool"] == "max" and "presets" not in args
    assert args["num_classes"] == 7 != CLASSES


@pytest.mark.parametrize("start", [dict(), dict(pretrained=False), dict(pretrained=True, pretrained_path="other.pth")])
def test_a_run_that_started_from_something_else_has_its_own_arguments_alone(start, hub):
    assert complete_args(TrainingRun(NAME, GIVEN, start)) == GIVEN


@pytest.mark.parametrize("name", ["hf-hub:us/vgg", "local-dir:folder"])
def test_timm_itself_reads_the_config_of_a_name_with_a_prefix(name):
    assert complete_args(TrainingRun(name, GIVEN, dict(pretrained=True))) == GIVEN


def test_a_run_that_started_from_timms_weights_of_the_base_has_its_own_arguments_alone():
    assert complete_args(TrainingRun("dfs_resnet18", GIVEN, dict(pretrained=True))) == GIVEN


def test_the_checkpoint_of_such_a_run_is_evaluated_and_exported_with_the_exits_of_its_first_weights(hub, tmp_path):
    model = timm.create_model(NAME, pretrained=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    file = tmp_path / "last.pth.tar"
    args = argparse.Namespace(model=NAME, pretrained=True, num_classes=CLASSES, model_kwargs={}, data_dir=None)
    torch.save(dict(arch=NAME, epoch=0, state_dict=model.state_dict(), args=args), file)
    for made in (create(str(file), True), trained_model(read_run(file), file)):
        assert made.exit_points == ("backbone.layer1",)
        assert all(map(torch.equal, made.parameters(), model.parameters()))
        assert [tuple(made.pretrained_cfg[key]) for key in ("input_size", "mean")] == [(3, 96, 96), (0.5, 0.4, 0.3)]
        assert made.pretrained_cfg["crop_pct"] == 0.5
