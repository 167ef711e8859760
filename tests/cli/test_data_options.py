"""Options of data and preparation have train.py's names and form, and a checkpoint's run gives their defaults."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers import tiny_vgg
from PIL import Image
from typer.testing import CliRunner

from timm_dfs.cli import app
from timm_dfs.cli.base import create, repeat_options
from timm_dfs.cli.source import DataOptions, data_of, shared_with_training
from timm_dfs.data.datasets import dataset_loader, follow_run
from timm_dfs.training.run import read_run

TINY = dict(depths=(1, 2), widths=(6, 8))


def run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 3), ("validation", 2)):
        for label, name in enumerate(("ash", "elm", "fir")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (80 * label, 10 * i, 0)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=3, **TINY)
    arguments = argparse.Namespace(
        model="dfs_vgg7_cifar100", num_classes=3, model_kwargs=TINY, dataset="", data_dir=str(folder), data=None,
        train_split="train", val_split="validation", input_key=None, target_key=None, class_map="", in_chans=None,
        input_size=None, img_size=None, mean=[0.1, 0.2, 0.3], std=None, crop_pct=0.5, interpolation="", gp=None,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("run") / "last.pth.tar"
    torch.save(dict(epoch=0, args=arguments, state_dict=model.state_dict()), file)
    return str(file)


@pytest.mark.parametrize(
    ("given", "repeated"),
    [
        ("eval x --mean 0 0 0 --json", "eval x --mean 0 --mean 0 --mean 0 --json"),
        ("eval x --std -1 1", "eval x --std -1 --std 1"),
        ("info --model-kwargs exits=4 beta=0.3 NAME", "info --model-kwargs exits=4 --model-kwargs beta=0.3 NAME"),
        ("info --model-kwargs exits=4 --model-kwargs beta=1", "info --model-kwargs exits=4 --model-kwargs beta=1"),
        ("timm -- --mean 0 0", "timm -- --mean 0 0"),
    ],
)
def test_options_of_several_values_have_train_pys_form(given, repeated):
    assert repeat_options(given.split()) == repeated.split()


def test_model_arguments_follow_one_option(folder):
    shown = run("info", "dfs_vgg7_cifar100", "--model-kwargs", "beta=0.25", "depths=(1, 1)", "widths=(4, 4)", "--json")
    data = json.loads(shown.stdout)
    assert data["beta"] == 0.25 and len(data["exits"]) == 2


def test_every_exit_can_be_given_a_beta(folder):
    shown = run("info", "dfs_vgg7_cifar100", "--model-kwargs", "beta=[0.25,0.9]", "depths=(1, 2)", "widths=(4, 4)")
    assert "beta (0.25, 0.9), referencing two_sided, weights" in " ".join(shown.stdout.split())


def test_info_says_that_exits_are_chained(folder):
    shown = run("info", "dfs_vgg7_cifar100", "--model-kwargs", "chain=0.5", "depths=(1, 2)", "widths=(4, 4)")
    assert "referencing two_sided, chain 0.5, weights" in " ".join(shown.stdout.split())


def test_flags_of_timms_scripts_stay_as_given(tmp_path):
    (tmp_path / "validate.py").write_text("import sys; print(sys.argv[1:])")
    shown = run("timm", tmp_path / "validate.py", "--mean", "0", "0", "0")
    assert "['--mean', '0', '0', '0']" in shown.stdout


def test_a_run_gives_data_classes_and_preparation(checkpoint, folder):
    where = data_of(checkpoint)
    assert where["root"] == str(folder) and where["split"] == "validation"
    assert where["class_map"] == {"ash": 0, "elm": 1, "fir": 2}
    config = create(checkpoint, pretrained=True).pretrained_cfg
    assert config["mean"] == (0.1, 0.2, 0.3) and config["crop_pct"] == 0.5
    assert config["label_names"] == ("ash", "elm", "fir")


def test_given_options_win_over_the_runs(checkpoint, folder):
    options = DataOptions(split="train[2:4]", mean=[0.7], img_size=24)
    assert options.where(checkpoint)["split"] == "train[2:4]"
    model = create(checkpoint, pretrained=True)
    options.prepare(model)
    assert model.pretrained_cfg["mean"] == (0.7,) * 3 and model.pretrained_cfg["input_size"] == (3, 24, 24)
    assert model.pretrained_cfg["crop_pct"] == 0.5


def test_the_runs_images_may_have_moved(checkpoint, folder, tmp_path):
    (tmp_path / "moved").symlink_to(folder)
    where = data_of(checkpoint, root=tmp_path / "moved")
    assert where["root"] == str(tmp_path / "moved") and where["dataset"] == "" and where["split"] == "validation"


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(mean=[0.1, 0.2]), "--mean is"), (dict(input_size=(1, 32, 32)), "the model takes 3 channels")],
)
def test_a_preparation_of_other_channels_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DataOptions(**options).prepare(tiny_vgg())


@pytest.mark.parametrize("options", [dict(mean=[0.5]), dict(crop_pct=0.9), dict(interpolation="bilinear")], ids=str)
def test_a_grey_network_can_be_prepared_without_giving_a_size(options):
    model = tiny_vgg(in_chans=1)
    DataOptions(**options).prepare(model)
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)
    ((key, value),) = options.items()
    assert model.pretrained_cfg[key] == (value if key != "mean" else tuple(value))


@pytest.mark.parametrize("options", [dict(img_size=64), dict(input_size=(3, 64, 64))], ids=str)
def test_a_size_that_the_network_does_not_take_is_refused_with_the_remedy(options):
    model = timm.create_model("dfs_vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, exits=2).eval()
    with pytest.raises(ValueError, match=r"dfs_vit_tiny_patch16_224 does not take .* 3×64×64 .*img_size=64"):
        DataOptions(**options).prepare(model)


@pytest.mark.parametrize("share", [0.0, 90.0, -1.0, float("nan")])
def test_a_crop_that_is_no_share_is_refused_by_value(share):
    with pytest.raises(ValueError, match=r"--crop-pct is .*; give a share above 0 and at most 1"):
        DataOptions(crop_pct=share).prepare(tiny_vgg())


def test_eval_measures_what_was_asked_for(checkpoint):
    shown = run("eval", checkpoint, "--split", "train[:4]", "--mean", "0", "0", "0", "--workers", 0, "--json")
    assert shown.exit_code == 0, shown.output
    data = json.loads(shown.stdout)
    assert data["samples"] == 4 and data["split"] == "train[:4]"
    refused = run("eval", checkpoint, "--split", "test", "--workers", 0)
    assert refused.exit_code == 2


def test_a_models_folder_is_a_model_and_another_is_not(tmp_path):
    model = tiny_vgg()
    timm.models.save_for_hf(model, tmp_path / "mine", model_args=TINY)
    assert create(str(tmp_path / "mine"), pretrained=True).num_exits == model.num_exits
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="calibrate"):
        create(str(tmp_path / "empty"), pretrained=True)


def test_a_name_that_is_cut_short_gets_those_that_begin_with_it():
    assert "similar names are dfs_msdnet_cifar100, dfs_msdnet_imagenet;" in run("info", "dfs_msdnet").output.replace(
        "\n", " "
    )


def test_the_size_that_timm_would_test_the_starting_weights_at_is_dropped(checkpoint):
    for given, kept in ((dict(img_size=64), False), (dict(crop_pct=0.5), False), (dict(mean=[0.5, 0.5, 0.5]), True)):
        model = tiny_vgg()
        model.pretrained_cfg.update(test_input_size=(3, 288, 288), test_crop_pct=1.0)
        DataOptions(**given).prepare(model)
        assert ("test_input_size" in model.pretrained_cfg) == ("test_crop_pct" in model.pretrained_cfg) == kept
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=3, **TINY)
    model.pretrained_cfg.update(test_input_size=(3, 288, 288))
    follow_run(model, read_run(Path(checkpoint)))
    assert "test_input_size" not in model.pretrained_cfg


def test_a_misspelt_name_gets_similar_ones():
    with pytest.raises(ValueError, match="dfs_resnet18_cifar100"):
        create("dfs_resnet18_cifar10", pretrained=False)


def test_thresholds_are_not_fitted_to_the_test_images_under_another_name(checkpoint):
    refused = run("calibrate", checkpoint, "--dataset", "torch/cifar10", "--split", "validation[:10]")
    assert refused.exit_code == 2 and "test split" in refused.stderr


def test_bench_times_the_images_of_a_checkpoints_own_data_set_where_its_split_is_named(checkpoint, folder):
    quick = ("--batch-size", 2, "--seconds", 0, "--json")
    named = run("bench", checkpoint, "--split", "train", *quick)
    assert json.loads(named.stdout)["images"] == str(folder)
    assert json.loads(run("bench", checkpoint, *quick).stdout)["images"] == "noise"
    assert run("bench", checkpoint, "--split", "nonsense", *quick).exit_code == 2


def test_a_folder_is_not_taken_for_the_cache_of_the_data_set_that_a_run_names(checkpoint, folder, tmp_path):
    record = torch.load(checkpoint, weights_only=False)
    record["args"].dataset = "hfds/uoft-cs/cifar100"
    torch.save(record, tmp_path / "last.pth.tar")
    refused = run("eval", tmp_path / "last.pth.tar", "--data-dir", folder, "--split", "validation")
    assert refused.exit_code == 2 and "Give --dataset '' as well" in " ".join(refused.stderr.split())
    read = run("eval", tmp_path / "last.pth.tar", "--data-dir", folder, "--split", "validation", "--dataset", "")
    assert read.exit_code == 0, read.output


def test_a_moving_average_that_train_py_did_not_validate_is_warned_of(checkpoint):
    record = read_run(Path(checkpoint))
    validated = replace(record, arguments=dict(record.arguments, model_ema=True))
    other = replace(record, arguments=dict(validated.arguments, model_ema_force_cpu=True))
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=3, **TINY)
    follow_run(model, validated)
    with pytest.warns(UserWarning, match="--model-ema-force-cpu"):
        follow_run(model, other)


def test_training_images_are_known_by_the_name_of_their_folder(checkpoint, folder):
    def where(split, root):
        return dict(dataset="", root=str(root), split=split)

    for split, root in ((".", folder / "train"), (".[:2]", folder / "train"), ("train[:2]", folder)):
        assert shared_with_training(checkpoint, where(split, root), split) == "shares images with train"
    for split, root in ((".", folder / "validation"), ("validation", folder), (".", folder)):
        assert shared_with_training(checkpoint, where(split, root), split) is None


def test_a_frozen_last_exit_keeps_its_classes_whatever_folders_its_exits_learned_from(folder, tmp_path):
    """Without labels, all photographs may lie in one folder."""
    (tmp_path / "train" / "all").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "all" / "0.png")
    (tmp_path / "val").symlink_to(folder / "validation")
    frozen = dict(train_backbone=False, loss_weights=[1, 1, 0], distill_weight=1.0)
    arguments = argparse.Namespace(
        model="dfs_vgg7_cifar100", num_classes=3, model_kwargs={**TINY, **frozen}, dataset="", data_dir=str(tmp_path),
        train_split="train", val_split="val", class_map="",
    )  # fmt: skip
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=3, **TINY)
    model.pretrained_cfg["label_names"] = names = ("elm", "fir", "ash")  # not alphabetical
    file = tmp_path / "last.pth.tar"
    torch.save(dict(epoch=0, args=arguments, state_dict=model.state_dict()), file)
    follow_run(model, read_run(file))
    assert model.pretrained_cfg["label_names"] == names
    loader = dataset_loader(model, **data_of(str(file), None), batch_size=9, workers=0)
    ((_, targets),) = loader
    assert targets.tolist() == [2, 2, 0, 0, 1, 1]
