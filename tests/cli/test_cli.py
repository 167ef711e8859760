"""The command line: readable output, JSON for scripts, one clear line and exit code 2 for a user's mistake."""

import argparse
import csv
import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers import NATIVE, tiny_vgg
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import timm_dfs
from timm_dfs.cli import app
from timm_dfs.cli.base import choose_policy, create, refuse_new_classifiers
from timm_dfs.cli.bench import HALF
from timm_dfs.evaluation.bench import LAST_EXIT, Timing
from timm_dfs.models.dfs_twins import BASES

datasets.disable_progress_bars()  # shown on stderr when a data set is first read, by whichever test comes first

VGG_THRESHOLDS = "0.5,0.5,0.5,0.5,0.5,0"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run_json(*args):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_one_line(result, *words):
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("timm-dfs: ")
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "vgg7.safetensors"
    save_file(timm.create_model("dfs_vgg7_cifar100").state_dict(), file)
    return file


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A tiny data set in the layout of the Hub's CIFAR-100."""
    folder = tmp_path_factory.mktemp("dataset")
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    data = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(image) for image in noise], "fine_label": [3, 1, 4, 1, 5, 9]},
        features=datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=100)}),
    )
    data.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def test_list_names_every_model_and_says_which_have_weights():
    rows = run_json("list")
    assert {row["name"] for row in rows} == {*NATIVE, *timm.list_pretrained("dfs_*")}
    assert {row["name"] for row in rows if row["weights"]} == set(timm.list_pretrained("dfs_*"))
    shown = run("list").stdout
    assert "dfs_vgg16_imagenet" in shown
    assert f"a dfs_ twin of each of timm's {len(BASES)} architectures" in " ".join(shown.split())


@pytest.mark.parametrize("pattern", ["dfs_resnet1*", "dfs_vgg*", "dfs_test_vit", "*test_vit"])
def test_list_takes_a_pattern_and_names_twins_too(pattern):
    names = [row["name"] for row in run_json("list", pattern)]
    assert names == [name for name in timm.list_models(pattern) if name.startswith("dfs_")] != []
    assert names[0] in run("list", pattern).stdout


@pytest.mark.parametrize("pattern", ["dfs_msdnet_cifar100.joint", "dfs_*cifar100_112"])
def test_list_takes_names_with_tags(pattern):
    assert [row["name"] for row in run_json("list", pattern)] == timm.list_pretrained(pattern) != []


def test_a_pattern_that_nothing_fits_gets_one_line():
    assert_one_line(run("list", "dfs_foo*"), "dfs_foo*", "timm-dfs list")


def test_info_describes_each_exit():
    data = run_json("info", "dfs_vgg7_cifar100")
    assert [row["channels"] for row in data["exits"]] == [64, 64, 128, 128, 256, 256]
    assert "stages.5" in run("info", "dfs_vgg7_cifar100").stdout


def test_info_names_all_that_a_preset_decides_by():
    lines = run("info", "dfs_tf_efficientnet_lite0.cifar100").stdout.split("preset ")
    (balanced,) = [" ".join(line.split()) for line in lines if line.startswith("balanced")]
    assert "margin at least" in balanced and "logits divided by 0." in balanced
    assert "exits predict together with those before them" in balanced


def test_the_presets_that_there_are_are_named_where_balanced_is_not_among_them():
    model = tiny_vgg(presets=dict(mine=dict(thresholds=[0.5, 0.5, 0.0])))
    with pytest.raises(ValueError, match="has the presets mine; choose one by --policy, or say when"):
        choose_policy(model, None, None, "--policy")


def test_flops_and_info_are_of_the_weights_that_are_named():
    name = "dfs_tf_efficientnet_lite0.cifar100"
    shipped = [exit_["flops"] for exit_ in run_json("info", name)["exits"]]
    assert run_json("flops", name)["published"] == shipped


def test_flops_gives_both_conventions_at_any_size():
    native, large = (
        run_json("flops", "dfs_vgg7_cifar100"),
        run_json("flops", "dfs_vgg7_cifar100", "--input-size", 3, 64, 64),
    )
    assert len(native["published"]) == len(native["lazy"]) == 6
    assert all(a < b for a, b in zip(native["published"], large["published"], strict=True))
    assert native["last_exit_alone"] < native["published"][-1]
    assert "multiply-adds" in run("flops", "dfs_vgg7_cifar100").stdout


def test_predict_shows_every_exit_and_which_one_answers(checkpoint, picture):
    args = "predict", "dfs_vgg7_cifar100", picture, "--checkpoint", checkpoint, "--thresholds"
    (first,) = run_json(*args, "0,0,0,0,0,0")["images"]
    (last,) = run_json(*args, "2,2,2,2,2,2")["images"]
    assert (first["exit"], last["exit"]) == (0, 5)
    assert first["saved"] > 0.9 > last["saved"]
    assert first["label"] == first["exits"][0]["label"] and last["label"] == last["exits"][5]["label"]
    shown = run(*args, "0,0,0,0,0,0").stdout
    assert "exit 0 is taken" in shown and first["label"] in shown


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A model with a preset that has temperatures and switches an exit off, and the model's folder."""
    torch.manual_seed(0)
    preset = dict(thresholds=[1.0, None, 0.0], confidence="margin", temperatures=[4.0, 1.0, 0.5])
    model = timm.create_model("dfs_vgg7_cifar100", depths=(1, 1, 1), widths=(8, 8, 8), num_classes=5).eval()
    with torch.no_grad():
        for head in model.heads:
            head.fc.weight.normal_(0, 4)
    model.presets = dict(balanced=preset)
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    timm_dfs.write_presets(model, folder)
    return model, folder


def test_predict_shows_the_probability_by_the_policys_temperatures(calibrated, picture, tmp_path):
    model, folder = calibrated
    batch = timm_dfs.data.images.prepare(model, [timm_dfs.open_image(picture)])
    with torch.no_grad():
        logits = torch.stack(model.forward_exits(batch))[:, 0]
    expected = (logits / torch.tensor([[4.0], [1.0], [0.5]])).softmax(-1).amax(-1).tolist()
    (image,) = run_json("predict", folder, picture)["images"]
    assert [row["confidence"] for row in image["exits"]] == pytest.approx(expected, abs=1e-5)
    assert run("predict", folder, picture, "--output", tmp_path / "o.csv").exit_code == 0
    (row,) = csv.DictReader((tmp_path / "o.csv").open())
    assert row["exit"] == "2" and float(row["confidence"]) == pytest.approx(expected[2], abs=1e-5)


def test_predict_counts_no_head_of_an_exit_that_is_switched_off(calibrated, picture):
    model, folder = calibrated
    (image,) = run_json("predict", folder, picture)["images"]
    assert image["exit"] == 2 and image["flops"] == timm_dfs.exit_flops(model, lazy=True, heads=(0, 2))[2]


@pytest.mark.parametrize("command", ["predict", "eval", "calibrate", "report", "export", "space"])
def test_classifiers_that_the_weights_do_not_have_are_refused(command, calibrated, picture, tmp_path):
    what = {
        "predict": [picture, "--thresholds", "0.5,0.5,0"],
        "export": ["--output", tmp_path / "exported"],
        "space": [],
    }.get(command, ["--data-dir", tmp_path, "--split", "val"])
    with pytest.warns(UserWarning, match="Dropped the presets"):
        refused = run(command, calibrated[1], *what, "--model-kwargs", "num_classes=7")
    assert_one_line(refused, "5 classes", "7", "--checkpoint")


def test_weights_in_the_folder_that_the_variable_names_are_used_by_every_command(calibrated, tmp_path, monkeypatch):
    shutil.copytree(calibrated[1], tmp_path / "dfs_vgg7_cifar100")
    monkeypatch.setenv("TIMM_DFS_HUB", str(tmp_path))
    info = run_json("info", "dfs_vgg7_cifar100")
    assert info["weights"] and len(info["exits"]) == 3
    assert not run_json("info", "dfs_vgg16_imagenet")["weights"]
    assert_one_line(run("info", "dfs_msdnet_cifar100"), "TIMM_DFS_HUB")  # which has weights, but not there


def test_a_folder_called_like_a_model_is_told_apart(calibrated, picture, tmp_path, monkeypatch):
    for name in ("dfs_msdnet_cifar100", "dfs_msdnet_cifar100.v2"):
        shutil.copytree(calibrated[1], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name, exits in (("dfs_msdnet_cifar100.v2", 3), ("./dfs_msdnet_cifar100", 3)):
        assert len(run_json("info", name)["exits"]) == exits
    with pytest.warns(UserWarning, match=r"the model is taken, \./dfs_msdnet_cifar100 is the folder"):
        assert len(run_json("info", "dfs_msdnet_cifar100")["exits"]) == 7


def test_predictions_have_a_place_before_they_are_made(checkpoint, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    what = "predict", "dfs_vgg7_cifar100", "--checkpoint", checkpoint, "--thresholds", VGG_THRESHOLDS
    assert_one_line(run(*what, tmp_path / "broken.png", "--output", tmp_path / "no" / "x.csv"), "no folder")
    twice = run(*what, tmp_path / "broken.png", tmp_path / "broken.png", "--output", tmp_path / "x.csv")
    assert_one_line(twice, "broken.png")


def test_an_interpolation_that_timm_does_not_know_is_refused(checkpoint, pictures):
    what = "--dataset", f"hfds/{pictures}", "--checkpoint", checkpoint, "--interpolation", "cubic"
    assert_one_line(run("eval", "dfs_vgg7_cifar100", *what), "cubic", "bicubic")


def test_classifiers_of_as_many_classes_are_the_weights(calibrated, picture):
    args = "predict", calibrated[1], picture, "--thresholds", "0.5,0.5,0"
    assert run(*args, "--model-kwargs", "num_classes=5").exit_code == 0


def test_eval_gives_every_exit_s_accuracy_and_cost(checkpoint, pictures):
    args = "eval", "dfs_vgg7_cifar100", "--dataset", f"hfds/{pictures}", "--checkpoint", checkpoint, "--workers", 0
    data = run_json(*args)
    assert data["samples"] == 6
    for key in ("top1", "top5", "ece", "flops", "flops_lazy"):
        assert len(data[key]) == 6, key
    assert all(0 <= top1 <= top5 <= 100 for top1, top5 in zip(data["top1"], data["top5"], strict=True))
    assert "top-1" in run(*args).stdout


def test_demo_answers_real_photographs_and_says_which_it_cannot_know(tmp_path):
    args = "demo", "dfs_msdnet_cifar100.joint", "--batch-size", 4
    data = run_json(*args, "--save", tmp_path / "strip.png")
    assert sum(data["exit_counts"]) == 4
    assert {row["image"] for row in data["photographs"] if not row["subject"]} == {"chelsea", "hubble_deep_field"}
    assert data["images_per_second"]["early_exit"] > 0
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width > 1000 and strip.height > 240
    shown = run(*args).stdout
    assert "rocket" in shown and "images/s" in shown and "no class for chelsea" in shown


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("info", "resnet5"), ("resnet5", "timm-dfs list")),
        (("info", "resnet18"), ("resnet18", "timm-dfs list")),
        (("predict", "dfs_vgg7_cifar100", "absent.png"), ("absent.png", "check the path")),
        (("flops", "dfs_vgg7_cifar100", "--input-size", 3, 0, 32), ("(3, 0, 32)",)),
        (("eval", "dfs_vgg16_imagenet", "--dataset", "hfds/x"), ("dfs_vgg16_imagenet", "train.py")),
        (("demo", "--preset", "quick"), ("quick", "balanced")),
        (("demo", "--save", "strip.jpg"), ("strip.jpg", ".png")),
        (("flops", "dfs_vgg7_cifar100.foo"), ("dfs_vgg7_cifar100.foo",)),
        (("flops", "dfs_vgg7_cifar100", "--input-size", 1, 32, 32), ("(1, 32, 32)", "3 channels")),
    ],
)
def test_a_mistake_gets_one_line_that_names_it(args, words):
    assert_one_line(run(*args), *words)


def test_none_switches_an_exit_off(checkpoint, picture):
    args = "predict", "dfs_vgg7_cifar100", picture, "--checkpoint", checkpoint, "--thresholds"
    (image,) = run_json(*args, "none, None,inf,0,none,0")["images"]
    assert image["exit"] == 3


def test_images_that_predict_leaves_out_of_a_folder_are_told(checkpoint, picture, tmp_path):
    args = "predict", "dfs_vgg7_cifar100", tmp_path, "--checkpoint", checkpoint, "--thresholds", VGG_THRESHOLDS
    Image.new("RGB", (8, 8)).save(tmp_path / "other.webp")
    assert_one_line(run(*args), "no image of the kinds .png, .jpg, .jpeg in", "name the files")
    shutil.copy(picture, tmp_path)
    with pytest.warns(UserWarning, match=r"left out \(1 \.webp\).*Name the others"):
        run(*args)


@pytest.mark.parametrize("thresholds", ["0.5", "0.5,x,0.5,0.5,0.5,0", "nan,0,0,0,0,0", ""])
def test_bad_thresholds_are_refused(thresholds, checkpoint, picture):
    result = run("predict", "dfs_vgg7_cifar100", picture, "--checkpoint", checkpoint, "--thresholds", thresholds)
    assert_one_line(result, "threshold")


def test_a_model_without_presets_asks_for_thresholds(checkpoint, picture):
    assert_one_line(run("predict", "dfs_vgg7_cifar100", picture, "--checkpoint", checkpoint), "--thresholds")


def test_a_checkpoint_of_another_network_is_refused(checkpoint, picture):
    result = run(
        "predict", "dfs_resnet18_cifar100", picture, "--checkpoint", checkpoint, "--thresholds", VGG_THRESHOLDS
    )
    assert_one_line(result, "vgg7.safetensors", "do not fit")


def test_a_folder_of_images_is_a_data_set_too(checkpoint, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "test" / label).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "test" / label / "0.png")
    args = "eval", "dfs_vgg7_cifar100", "--dataset", "", "--data-dir", tmp_path, "--checkpoint", checkpoint
    assert run_json(*args, "--workers", 0)["samples"] == 2


def test_weights_that_make_nan_are_named_not_answered(picture, tmp_path):
    state = timm.create_model("dfs_vgg7_cifar100").state_dict()
    state["stages.0.conv.weight"] *= float("nan")
    save_file(state, tmp_path / "broken.safetensors")
    args = "predict", "dfs_vgg7_cifar100", picture, "--thresholds", VGG_THRESHOLDS
    assert_one_line(run(*args, "--checkpoint", tmp_path / "broken.safetensors"), "NaN", "noise.png")


def test_a_missing_data_set_is_one_line(checkpoint, tmp_path):
    result = run(
        "eval", "dfs_vgg7_cifar100", "--dataset", f"hfds/{tmp_path}/absent", "--checkpoint", checkpoint, "--workers", 0
    )
    assert_one_line(result, "absent")


def test_a_missing_column_is_one_line(checkpoint, pictures):
    result = run(
        "eval", "dfs_vgg7_cifar100", "--dataset", f"hfds/{pictures}", "--checkpoint", checkpoint, "--input-key", "pic"
    )
    assert_one_line(result, "pic")


def test_the_same_image_twice_gets_two_answers(checkpoint, picture):
    args = "predict", "dfs_vgg7_cifar100", picture, picture, "--checkpoint", checkpoint, "--thresholds", VGG_THRESHOLDS
    assert len(run_json(*args)["images"]) == 2


def test_a_preset_and_thresholds_together_are_refused(checkpoint, picture):
    args = "predict", "dfs_vgg7_cifar100", picture, "--checkpoint", checkpoint, "--thresholds", VGG_THRESHOLDS
    assert_one_line(run(*args, "--preset", "fast"), "--preset", "--thresholds")


@pytest.fixture(scope="module")
def training_run(tmp_path_factory, pictures):
    """A checkpoint as train.py writes one, of a small joint VGG with its own classes."""
    torch.manual_seed(0)
    settings = dict(depths=(1, 2), widths=(6, 8), beta="joint")
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=10, **settings)
    args = argparse.Namespace(
        model="dfs_vgg7_cifar100",
        num_classes=10,
        in_chans=None,
        gp=None,
        model_kwargs=dict(settings, distill_weight=0.3),
        dataset=f"hfds/{pictures}",
        data_dir=None,
        val_split="test",
        input_key="img",
        target_key="fine_label",
    )
    file = tmp_path_factory.mktemp("run") / "last.pth.tar"
    torch.save(dict(epoch=0, arch="dfs_vgg7_cifar100", args=args, state_dict=model.state_dict()), file)
    return file


def test_eval_of_a_checkpoint_needs_nothing_else(training_run):
    data = run_json("eval", training_run, "--workers", 0)
    assert data["samples"] == 6 and data["split"] == "test" and len(data["top1"]) == 3


def test_eval_takes_other_data_than_the_checkpoints_own(training_run, pictures):
    data = run_json("eval", training_run, "--dataset", f"hfds/{pictures}", "--split", "test[:4]", "--workers", 0)
    assert data["samples"] == 4


def test_predict_takes_a_checkpoint_for_a_model(training_run, picture):
    data = run_json("predict", training_run, picture, "--thresholds", "0.5,0.5,0")
    assert len(data["images"][0]["exits"]) == 3


def test_a_checkpoint_of_a_twin_has_the_classes_that_it_was_trained_on(tmp_path, picture):
    model = timm.create_model("dfs_test_resnet", num_classes=3, exits=3)
    args = argparse.Namespace(model="dfs_test_resnet", num_classes=3, model_kwargs=dict(exits=3))
    torch.save(dict(epoch=0, arch=args.model, args=args, state_dict=model.state_dict()), tmp_path / "last.pth.tar")
    data = run_json("predict", tmp_path / "last.pth.tar", picture, "--thresholds", "2,2,0")
    assert data["images"][0]["exit"] == 2
    refused = run("predict", tmp_path / "last.pth.tar", picture, "--model-kwargs", "num_classes=4")
    assert_one_line(refused, "3 classes", "4")


def test_a_checkpoint_of_an_encoder_has_classes(tmp_path):
    settings = dict(exits=2, depth=2, embed_dim=32, num_heads=2, img_size=32)
    model = timm.create_model("dfs_qwen3_vit_88m_enc", num_classes=3, **settings)
    args = argparse.Namespace(model="dfs_qwen3_vit_88m_enc", num_classes=3, model_kwargs=settings)
    torch.save(dict(epoch=0, arch=args.model, args=args, state_dict=model.state_dict()), tmp_path / "last.pth.tar")
    loaded = create(str(tmp_path / "last.pth.tar"), pretrained=True)
    refuse_new_classifiers(loaded)
    for ours, theirs in zip(loaded.get_classifier(), model.get_classifier(), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


def test_an_image_that_cannot_be_read_is_named_in_one_line(checkpoint, tmp_path):
    for name in "abcdef":
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "test" / name / "0.png")
    (tmp_path / "test" / "b" / "0.png").write_bytes(b"no image")
    what = "eval", "dfs_vgg7_cifar100", "--checkpoint", checkpoint, "--data-dir", tmp_path
    with pytest.warns(UserWarning, match="classes"):
        line = run(*what, "--workers", 1).stderr.strip().splitlines()[-1]
    assert line.startswith(f"timm-dfs: {tmp_path / 'test' / 'b' / '0.png'} cannot be read")


def test_two_checkpoints_are_refused(training_run):
    assert_one_line(run("eval", training_run, "--checkpoint", training_run), "one checkpoint")


def test_eval_without_data_says_what_is_missing():
    assert_one_line(run("eval", "dfs_vgg7_cifar100"), "--dataset")


def test_model_kwargs_reach_the_model():
    args = ("--model-kwargs", "beta=joint", "--model-kwargs", "depths=(1, 1, 1)")
    data = run_json("info", "dfs_vgg7_cifar100", *args)
    assert data["beta"] == "joint" and len(data["exits"]) == 3
    assert len(run_json("flops", "dfs_vgg7_cifar100", *args)["lazy"]) == 3


@pytest.mark.parametrize("pair", ["beta", "=3", "be ta=3"])
def test_a_model_argument_that_is_no_pair_is_refused(pair):
    assert_one_line(run("info", "dfs_vgg7_cifar100", "--model-kwargs", pair), "NAME=VALUE")


def test_an_unknown_model_argument_is_named():
    assert_one_line(run("info", "dfs_vgg7_cifar100", "--model-kwargs", "bta=0.3"), "bta")


def test_conflict_compares_exits_layer_by_layer_and_draws_them(training_run, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "conflict.png"
    options = ("--batch-size", 6, "--batches", 1, "--workers", 0)
    data = run_json("conflict", training_run, *options, "--plot", plot)
    assert 0 <= data["conflicting"] <= 1
    first = data["layers"][0]
    assert first["layer"] == "stages.0.conv" and set(first["cosine"]) == {"0 and 1", "0 and 2", "1 and 2"}
    assert Image.open(plot).size[0] > 100
    assert "conflict" in run("conflict", training_run, *options).stdout


def test_a_script_of_timms_runs_with_the_plugin_imported(tmp_path, monkeypatch):
    script = "import sys, timm; print(timm.is_model('dfs_vgg7_cifar100'), sys.argv[1:], __name__)"
    (tmp_path / "validate.py").write_text(script)
    monkeypatch.setattr("sys.argv", ["timm-dfs"])
    expected = "True ['--model', 'x', '--help'] __main__"
    assert expected in run("timm", tmp_path / "validate.py", "--model", "x", "--help").stdout
    monkeypatch.setenv("TIMM_SCRIPTS", str(tmp_path))
    assert expected in run("timm", "validate.py", "--model", "x", "--help").stdout


def test_a_script_that_is_not_there_says_where_to_find_it(monkeypatch):
    monkeypatch.delenv("TIMM_SCRIPTS", raising=False)
    assert_one_line(run("timm", "validat.py"), "validat.py", "TIMM_SCRIPTS")


def test_benchmarking_the_training_of_one_exit_is_refused(tmp_path):
    (tmp_path / "benchmark.py").write_text("print('ran')")
    assert_one_line(run("timm", tmp_path / "benchmark.py", "--model", "dfs_vgg7_cifar100"), "--bench infer")
    assert "ran" in run("timm", tmp_path / "benchmark.py", "--bench", "infer").stdout


# calibrate


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Enough noise to calibrate on, as a training split."""
    folder = tmp_path_factory.mktemp("held_out")
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    data = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(image) for image in noise], "fine_label": generator.integers(0, 10, 40).tolist()},
        features=datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=100)}),
    )
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return "--dataset", f"hfds/{folder}", "--split", "train", "--workers", 0


@pytest.mark.filterwarnings("ignore:Exits .* chance")
def test_calibrate_fits_presets_and_writes_them_into_a_folder_that_loads(training_run, held_out, tmp_path):
    folder = tmp_path / "calibrated"
    data = run_json(
        "calibrate", training_run, *held_out, "--budget", 0.7, "--max-accuracy-drop", 30, "--output", folder
    )
    presets = data["presets"]
    budget = 0.7 * data["last_exit"]["alone"]
    assert list(presets) == ["accurate", "balanced", "fast", f"{budget / 1e6:g}M", "drop-30"]
    assert presets[f"{budget / 1e6:g}M"]["average_flops"] <= budget
    for preset in presets.values():
        assert preset["fitted_on"]["split"] == "train" and preset["fitted_on"]["samples"] == data["samples"] == 40
        assert len(preset["thresholds"]) == len(preset["temperatures"]) == 3
        assert preset["confidence"] == "max_prob" and "risk" not in preset
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, depths=(1, 2), widths=(6, 8)).eval()
    assert again.presets == presets
    assert timm_dfs.predict(again, torch.randn(4, 3, 32, 32), "balanced").logits.shape == (4, 10)


@pytest.mark.filterwarnings("ignore:Exits .* chance")
def test_presets_fitted_to_images_of_another_size_are_not_kept(training_run, held_out, tmp_path):
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    run_json("calibrate", training_run, *held_out, "--max-accuracy-drop", 30, "--output", tmp_path / "model")
    with pytest.warns(UserWarning, match="Dropped the presets .*: they were fitted to images of another input_size"):
        run_json("calibrate", tmp_path / "model", *held_out, "--img-size", 16, "--output", tmp_path / "small")
    kept = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "small")]
    assert "drop-30" in kept[0]["model_args"]["presets"] and "drop-30" not in kept[1]["model_args"]["presets"]
    mean = [str(value) for value in kept[0]["pretrained_cfg"]["mean"]]
    run_json("calibrate", tmp_path / "model", *held_out, "--mean", *mean, "--output", tmp_path / "same")
    assert "drop-30" in json.loads((tmp_path / "same" / "config.json").read_text())["model_args"]["presets"]
    assert_one_line(run("calibrate", training_run, *held_out, "--output", tmp_path), "has no config.json")


@pytest.mark.filterwarnings("ignore:Exits .* chance")
def test_calibrate_bounds_the_drop_on_the_other_half(training_run, held_out):
    args = "calibrate", training_run, *held_out, "--confidence-level", 0.8, "--by", "margin"
    data = run_json(*args)
    assert data["samples"] == data["samples_bounded_on"] == 20
    for preset in data["presets"].values():
        assert preset["risk"]["confidence_level"] == 0.8 and preset["risk"]["samples"] == 20
        assert preset["confidence"] == "margin"
    shown = run(*args).stdout
    assert "balanced" in shown and "drop at most" in " ".join(shown.split())


@pytest.mark.filterwarnings("ignore:Exits .* chance")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--split", "test"), ("test", "held out of training")),
        (("--split", "test[:4]"), ("test[:4]",)),
        (("--budget", 1e-9), ("budget", "first exit")),
        (("--budget=-2",), ("budget of -2 multiply-adds",)),
        (("--budget", 1e12), ("1e+12", "last")),
        (("--latency", "soon"), ["--latency", "soon", "20ms"]),
        (("--p95", "0.000001ms"), ["out of range"]),
        (("--max-accuracy-drop", -1), ("max_accuracy_drop is -1",)),
        (("--max-accuracy-drop", 0, "--confidence-level", 0.9), ("no samples show that there is no drop at all",)),
        (("--confidence-level", 95), ("confidence_level is 95",)),
        (("--by", "surprise"), ("surprise", "max_prob")),
        (("--output", "absent/folder"), ("absent",)),
    ],
    ids=str,
)
def test_calibrate_refuses_options_before_it_reads_the_data(training_run, held_out, options, words):
    assert_one_line(run("calibrate", training_run, *held_out, *options), *words)


@pytest.mark.filterwarnings("ignore:Exits .* chance")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--confidence-level", 0.95, "--max-accuracy-drop", 0.1), "20 samples cannot show"),
        (("--split", "train[:2]"), "2 validation samples for 3 exits"),
    ],
    ids=str,
)
def test_calibrate_says_where_there_are_too_few_samples(training_run, held_out, options, words):
    result = run("calibrate", training_run, *held_out, *options)
    assert result.exit_code == 2 and words in result.stderr.splitlines()[-1]


def test_calibrate_fits_latencies_of_this_machine(training_run, held_out):
    limits = "--latency", "10000ms", "--p95", "9000"
    done = run_json("calibrate", training_run, *held_out, *limits)
    assert {"10000ms", "p95-9000ms"} < done["presets"].keys()
    for name, limit in (("10000ms", 10000), ("p95-9000ms", 9000)):
        latency = done["presets"][name]["latency"]
        assert 0 < latency["mean_ms"] <= latency["p95_ms"] <= limit
        assert latency["threads"] == torch.get_num_threads() and latency["machine"]
    table = run("calibrate", training_run, *held_out, *limits)
    assert table.exit_code == 0 and "p95, ms" in table.stdout


def test_calibrate_does_not_fall_back_on_a_checkpoint_s_test_split(training_run, held_out):
    assert_one_line(run("calibrate", training_run, *held_out[:2]), "test", "held out of training")


def test_calibrate_refuses_a_size_that_is_not_rebuilt_before_it_reads_the_data(tmp_path):
    model = timm.create_model("dfs_test_vit", num_classes=3, exits=2, dynamic_img_size=True)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    of_model = "num_classes=3", "exits=2", "dynamic_img_size=True"
    given = "--checkpoint", tmp_path / "mine.pth", "--output", tmp_path / "new", "--img-size", 128
    where = "--data-dir", tmp_path / "absent", "--split", "val"
    refused = run("calibrate", "dfs_test_vit", "--model-kwargs", *of_model, *given, *where)
    assert_one_line(refused, "built for images of 160×160", "img_size=128")


def test_calibrate_without_a_split_asks_for_one():
    assert_one_line(run("calibrate", "dfs_vgg7_cifar100", "--dataset", "hfds/x"), "--split")


QUICK = (
    "--seconds",
    0,
    "--batch-size",
    2,
    "--batch-size",
    1,
    "--model-kwargs",
    "depths=[1,1]",
    "--model-kwargs",
    "widths=[4,8]",
)


def test_bench_times_every_way_on_noise():
    data = run_json("bench", "dfs_vgg7_cifar100", *QUICK, "--thresholds", "0.0,0.0")
    ways = ["last exit alone", "exit 0 alone", "as given", "half the cost"]
    assert [(t["batch_size"], t["way"]) for t in data["timings"]] == [(size, way) for size in (1, 2) for way in ways]
    assert data["images"] == "noise" and data["input_size"] == [3, 32, 32] and data["fused"]
    result = run("bench", "dfs_vgg7_cifar100", *QUICK)
    assert result.exit_code == 0 and "batch 1, n = 5 batches" in result.stdout and "achieved" in result.stdout
    data = run_json("bench", "dfs_vgg7_cifar100", "--seconds", 0, "--batch-size", 2)
    assert data["timings"][-1]["way"] == "half the cost, exits 0 and 2"


def test_bench_says_where_early_exit_is_slower_and_where_its_slowest_batches_are(monkeypatch):
    def timing(way, batch_size, speedup, p95):
        return Timing(way, batch_size, 9.0, 1.0, p95, None, speedup, 1.0, speedup, 30)

    made_up = [timing("last exit alone", 1, 1.0, 4.0), timing("exit 0 alone", 1, 0.5, 9.0), timing(HALF, 1, 1.5, 4.1)]
    made_up += [timing("last exit alone", 2, 1.0, None), timing(HALF, 2, 0.9, None)]
    monkeypatch.setattr("timm_dfs.cli.bench.measure", lambda *args, **kwargs: made_up)
    shown = " ".join(run("bench", "dfs_vgg7_cifar100", *QUICK).stdout.split())
    assert f"A longer p95 than the last exit alone: {HALF} at batch 1." in shown
    assert f"Slower than the last exit alone: {HALF} at batch 2." in shown
    assert "None" not in shown


def test_bench_compares_onnx_runtime_and_takes_the_fastest_last_exit_alone_as_baseline():
    pytest.importorskip("onnxruntime", reason="the extra deploy is not installed")
    data = run_json("bench", "dfs_vgg7_cifar100", *QUICK, "--runtime", "onnx", "--thresholds", "0.5,0.0")
    ways = {t["way"] for t in data["timings"] if t["way"].endswith(", ONNX")}
    assert ways == {"last exit alone, ONNX", "as given, ONNX", "half the cost, ONNX"}
    for size in (1, 2):
        timings = {t["way"]: t for t in data["timings"] if t["batch_size"] == size}
        (baseline,) = {t["baseline"] for t in timings.values()}
        assert baseline in ("last exit alone", "last exit alone, ONNX")
        assert timings[baseline]["speedup"] == timings[baseline]["cost_ratio"] == 1
        assert timings["half the cost"]["cost_ratio"] == timings["half the cost, ONNX"]["cost_ratio"]
        assert timings["last exit alone"]["cost_ratio"] == timings["last exit alone, ONNX"]["cost_ratio"] == 1
    assert "onnxruntime 1." in data["machine"]


def test_bench_does_not_call_another_way_to_run_the_last_exit_alone_slow(monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra deploy is not installed")
    made_up = [Timing(LAST_EXIT, 1, 9.0, 1.0, None, None, 1.0, 1.0, 1.0, 30)]
    made_up.append(Timing(f"{LAST_EXIT}, ONNX", 1, 9.0, 1.0, None, None, 0.9, 1.0, 0.9, 30))
    monkeypatch.setattr("timm_dfs.cli.bench.measure", lambda *args, **kwargs: made_up)
    assert "Slower" not in run("bench", "dfs_vgg7_cifar100", *QUICK, "--runtime", "onnx").stdout


def test_bench_refuses_a_runtime_that_it_does_not_know():
    assert_one_line(run("bench", "dfs_vgg7_cifar100", *QUICK, "--runtime", "tensorrt"), "tensorrt", "torch, onnx")


def test_bench_takes_images_of_a_data_set_and_another_size(pictures):
    data = run_json("bench", "dfs_vgg7_cifar100", *QUICK, "--dataset", f"hfds/{pictures}", "--img-size", 24)
    assert data["images"].startswith("hfds/") and data["input_size"] == [3, 24, 24]


@pytest.mark.parametrize(
    "options", [("--split", "train"), ("--class-map", "names.txt"), ("--data-dir", "nowhere"), ("--input-key", "img")]
)
def test_bench_ignores_no_option_of_the_data(options):
    assert_one_line(run("bench", "dfs_vgg7_cifar100", *QUICK, *options))


def test_bench_refuses_a_batch_that_the_data_do_not_fill(pictures):
    result = run("bench", "dfs_vgg7_cifar100", *QUICK, "--batch-size", 50, "--dataset", f"hfds/{pictures}")
    assert_one_line(result, "6 images", "--batch-size")


def test_info_shows_the_exits_of_a_twin_too():
    data = run_json("info", "dfs_test_resnet", "--model-kwargs", "num_classes=5")
    assert [row["exit"] for row in data["exits"]] == [0, 1, 2, 3] and data["exits"][-1]["point"] is None
    assert "the whole network" in run("info", "dfs_test_resnet").stdout


def test_info_rounds_the_numbers_of_presets():
    shown = run("info", "dfs_msdnet_cifar100").stdout
    assert "preset balanced: margin at least" in shown and not re.search(r"\d\.\d{6}", shown)


def test_flops_at_a_size_that_a_network_does_not_take_is_one_line():
    assert_one_line(
        run("flops", "dfs_vit_tiny_patch16_224", "--input-size", 3, 64, 64), "does not take images", "img_size"
    )


def test_predict_takes_folders_and_patterns_and_writes_a_line_for_each_image(checkpoint, tmp_path):
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    options = ("--checkpoint", checkpoint, "--thresholds", VGG_THRESHOLDS, "--batch-size", 2)
    for place, suffix in ((tmp_path, "csv"), (tmp_path / "*.png", "jsonl")):
        result = run("predict", "dfs_vgg7_cifar100", place, *options, "--output", tmp_path / f"found.{suffix}")
        assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["label"] for row in lines] == [row["label"] for row in rows]
    assert all(0 < row["confidence"] <= 1 and row["error"] is None for row in lines)


def test_a_broken_image_does_not_lose_the_others_predictions(checkpoint, picture, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    options = ("--checkpoint", checkpoint, "--thresholds", VGG_THRESHOLDS)
    result = run(
        "predict", "dfs_vgg7_cifar100", tmp_path / "broken.png", picture, *options, "--output", tmp_path / "o.csv"
    )
    assert_one_line(result, "broken.png is not an image")
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert len(rows) == 2 and rows[0]["label"] and "not an image" in rows[1]["error"]


@pytest.mark.parametrize(
    ("place", "words"), [("https://example.org/cat.jpg", "download"), ("absent/*.png", "no image in absent")]
)
def test_a_place_without_images_is_refused(place, words):
    assert_one_line(run("predict", "dfs_vgg7_cifar100", place), words)
