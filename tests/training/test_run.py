"""A checkpoint of train.py says which model and data it belongs to."""

import argparse

import pytest
import torch
from helpers import tiny_vgg

from timm_dfs.training.run import read_run

ARGS = dict(
    model="dfs_vgg7_cifar100",
    num_classes=5,
    in_chans=None,
    gp=None,
    model_kwargs=dict(depths=(1, 2), widths=(6, 8), beta="joint", aggregator="UPGrad"),
    dataset="hfds/somewhere",
    data_dir=None,
    val_split="test",
    input_key="img",
    target_key="label",
)


def save(file, **content):
    torch.save(dict(dict(epoch=3, state_dict=tiny_vgg().state_dict()), **content), file)
    return file


def test_it_names_the_model_its_arguments_and_its_data(tmp_path):
    run = read_run(save(tmp_path / "last.pth.tar", args=argparse.Namespace(**ARGS)))
    assert run.model == "dfs_vgg7_cifar100" and run.epoch == 3
    assert run.arguments == ARGS
    assert run.model_args["num_classes"] == 5 and run.model_args["depths"] == (1, 2)


def test_joint_training_is_told_from_the_default_beta(tmp_path):
    joint = read_run(save(tmp_path / "joint.pth.tar", args=argparse.Namespace(**ARGS)))
    assert joint.model_args["beta"] == "joint"
    plain = read_run(save(tmp_path / "plain.pth.tar", args=argparse.Namespace(**dict(ARGS, model_kwargs={}))))
    assert "beta" not in plain.model_args


def test_what_determines_the_logits_is_kept(tmp_path):
    settings = dict(beta=[0.5, 0.9], referencing="off", chain=0.5)
    run = read_run(save(tmp_path / "last.pth.tar", args=argparse.Namespace(**dict(ARGS, model_kwargs=settings))))
    assert settings.items() <= run.model_args.items()


def test_what_was_for_training_only_is_left_out(tmp_path):
    run = read_run(save(tmp_path / "last.pth.tar", args=argparse.Namespace(**ARGS)))
    assert "aggregator" not in run.model_args


def test_weights_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name the model"):
        read_run(save(tmp_path / "weights.pth"))


def test_a_half_written_file_is_refused_and_the_way_out_named(tmp_path):
    file = save(tmp_path / "last.pth.tar", args=argparse.Namespace(**ARGS))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"checkpoint-\*\.pth\.tar"):
        read_run(file)


def test_nothing_foreign_is_unpickled(tmp_path):
    with pytest.raises(ValueError, match="Cannot read"):
        read_run(save(tmp_path / "last.pth.tar", args=pytest.ExitCode.OK))


def test_arguments_that_change_what_is_computed_in_eval_mode_reach_the_model(tmp_path):
    arguments = dict(ARGS, in_chans=None, input_size=[1, 32, 32], gp="max", bn_eps=1e-3)
    run = read_run(save(tmp_path / "last.pth.tar", args=argparse.Namespace(**arguments)))
    assert (run.model_args["in_chans"], run.model_args["global_pool"], run.model_args["bn_eps"]) == (1, "max", 1e-3)


@pytest.mark.parametrize(("flag", "value"), [("naflex_loader", True), ("tta", 3)])
def test_a_validation_that_is_not_reproduced_here_is_refused(tmp_path, flag, value):
    run = read_run(save(tmp_path / "last.pth.tar", args=argparse.Namespace(**ARGS, **{flag: value})))
    with pytest.raises(ValueError, match=flag.partition("_")[0]):
        run.check_reproducible()
