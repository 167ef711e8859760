"""Export of a checkpoint of train.py to a folder that can be published."""

import argparse
import json
import re
import runpy
import shutil
import sys

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import ROOT
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from timm_dfs import exit_flops, fit_temperatures
from timm_dfs.calibration.presets import NAMED, fit_presets
from timm_dfs.cli import app
from timm_dfs.hub import folder as hub
from timm_dfs.hub import from_checkpoint as export
from timm_dfs.hub.publish import check_folder
from timm_dfs.inference.confidence import CONFIDENCES
from timm_dfs.training.run import TrainingRun

RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny data set with a held-out split, a test split and one to train on."""
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=10)})
    for seed, split in enumerate(("validation", "test", "train")):
        noise = np.random.default_rng(seed).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        rows = {"img": [Image.fromarray(image) for image in noise], "fine_label": [i % 10 for i in range(12)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data):
    torch.manual_seed(0)
    settings = dict(depths=(1, 2), widths=(6, 8), beta=0.25)
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=10, **settings)
    args = argparse.Namespace(
        model="dfs_vgg7_cifar100",
        num_classes=10,
        in_chans=None,
        gp=None,
        model_kwargs=settings,
        dataset=f"hfds/{data}",
        data_dir=None,
        val_split="validation",
        input_key="img",
        target_key="fine_label",
    )
    folder = tmp_path_factory.mktemp("run")
    torch.save(dict(epoch=2, arch=args.model, args=args, state_dict=model.state_dict()), folder / "last.pth.tar")
    (folder / "args.yaml").write_text("seed: 7\nopt: sgd\nlr: 0.1\nconfig: recipes/mine.yaml\n")
    return folder / "last.pth.tar"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_a_checkpoint_becomes_a_folder_that_can_be_published(checkpoint, tmp_path):
    done = run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0)
    assert done.exit_code == 0, done.output
    model = check_folder(tmp_path / "mine")
    assert model.beta == 0.25 and model.num_classes == 10 and set(model.presets) == {"accurate", "balanced", "fast"}
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "Trained for 3 epochs" in card and "recipe `mine.yaml`, seed 7" in card and "| `lr` | 0.1 |" in card
    assert run("publish", tmp_path / "mine", "--repo", "me/mine", "--dry-run").exit_code == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(beta="joint"), "trained jointly (no partition)"),
        (dict(beta=0.25), "trained with Deep Feature Surgery (beta 0.25, referencing two_sided)"),
        (dict(beta=[0.25, 0.9]), "trained with Deep Feature Surgery (beta 0.25, 0.9, referencing two_sided)"),
        (dict(beta="joint", chain=0.5), "trained jointly (no partition), with chained exits (chain 0.5)"),
        (dict(beta=0.25, train_backbone=False), "whose heads alone were trained, on a frozen backbone"),
        (dict(beta="joint", train_backbone=False), "whose heads alone were trained, on a frozen backbone"),
        (
            dict(beta="joint", train_backbone=False, loss_weights=[1, 1, 0], distill_weight=1.0),
            "whose early exits alone were trained, on a frozen backbone",
        ),
    ],
)
def test_the_card_of_a_users_run_says_what_the_run_was(settings, words, checkpoint, tmp_path, monkeypatch):
    record = torch.load(checkpoint, weights_only=False)
    record["args"].model_kwargs = dict(depths=(1, 2), widths=(6, 8), **settings)
    record["args"].train_split, record["args"].initial_checkpoint = "train", "elsewhere/backbone.pth"
    record["epoch"] = 0
    torch.save(record, tmp_path / "last.pth.tar")
    done = run("export-hub", tmp_path / "last.pth.tar", "--output", tmp_path / "mine", "--workers", 0)
    assert done.exit_code == 0, done.output
    card = (tmp_path / "mine" / "README.md").read_text()
    assert f"A network with 3 exits, {words}." in card and "Trained for 1 epoch with" in card
    assert ("learnt from its last exit's logits, without labels" in card) == ("distill_weight" in settings)
    assert card.count("Deep Feature Surgery (") == words.count("Deep Feature Surgery (")
    assert "started from the file `backbone.pth`" in card
    assert "training split `train`, validation split `validation`" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert "license" not in metadata and "datasets" not in metadata and "No licence is recorded" in card
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names = dict(image=Image.new("RGB", (32, 32)))
    exec(snippet, names)
    expected = hub.load(f"local-dir:{tmp_path / 'mine'}").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in names["model"].state_dict().items())


def test_the_card_compares_exits_with_the_last_on_the_same_images(checkpoint, tmp_path):
    done = run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0)
    assert done.exit_code == 0, done.output
    test = json.loads((tmp_path / "mine" / "results.json").read_text())["test"]
    for top1, (points, error) in zip(test["top1"], test["against_last"], strict=True):
        assert points == pytest.approx(top1 - test["top1"][-1], abs=1e-4) and error >= 0
    assert test["against_last"][-1] == [0, 0]
    for preset in test["presets"].values():
        assert preset["against_last"][0] == pytest.approx(preset["top1"] - test["top1"][-1], abs=1e-4)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "| {:+.2f} ± {:.2f} |".format(*test["against_last"][0]) in card
    assert "compare exits and presets with each other, not with figures measured on other images" in card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(pretrained=True), "the pretrained weights of `dfs_resnet18`"),
        (dict(pretrained=True, pretrained_path="there/mine.pth"), "the file `mine.pth`"),
        (dict(pretrained=True, initial_checkpoint="there/mine.pth"), "the file `mine.pth`"),
        (dict(pretrained=False), None),
    ],
)
def test_training_facts_name_the_weights_that_training_started_from(arguments, words, tmp_path):
    started = TrainingRun("dfs_resnet18", arguments=arguments)
    assert export.training_facts(started, tmp_path / "last.pth.tar").get("started_from") == words
    from_timm = words is not None and "pretrained weights" in words
    assert bool(export.base_model(started, tmp_path / "last.pth.tar")) == from_timm


def test_an_export_takes_the_budgets_drops_level_and_confidence_of_calibrate(checkpoint, tmp_path):
    options = ("--budget", 0.9, "--max-accuracy-drop", 90, "--confidence-level", 0.9, "--by", "entropy", "--workers", 0)
    done = run("export-hub", checkpoint, "--output", tmp_path / "mine", *options)
    assert done.exit_code == 0, done.output
    presets = check_folder(tmp_path / "mine").presets
    assert len(presets) == 5 and "drop-90" in presets and any(name.endswith("M") for name in presets)
    assert {preset["confidence"] for preset in presets.values()} == {"entropy"}
    assert all("risk" in preset for preset in presets.values())
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "fitted on 6 held-out images" in card and "bounded on 6 further images" in card
    refused = run("export-hub", checkpoint, "--output", tmp_path / "other", "--by", "mood", "--workers", 0)
    assert refused.exit_code == 2 and "mood" in refused.stderr and not (tmp_path / "other").exists()


def test_calibrate_and_export_choose_the_same_confidence(checkpoint, tmp_path):
    assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    exported = check_folder(tmp_path / "mine").presets
    done = run("calibrate", checkpoint, "--output", tmp_path / "other", "--workers", 0)
    assert done.exit_code == 0, done.output
    calibrated = hub.load(f"local-dir:{tmp_path / 'other'}").presets
    assert {p["confidence"] for p in exported.values()} == {p["confidence"] for p in calibrated.values()}
    refused = run("publish", tmp_path / "other", "--repo", "me/other", "--dry-run")
    assert refused.exit_code == 2 and "first run 'timm-dfs export-hub" in " ".join(refused.stderr.split())


def test_exporting_again_replaces_the_folder_by_the_same(checkpoint, tmp_path):
    for _ in range(2):
        assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_an_export_that_fails_leaves_the_old_folder(checkpoint, tmp_path):
    assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    failed = run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0, "--test", "absent")
    assert failed.exit_code == 2 and "absent" in failed.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()} == before


@pytest.mark.parametrize(
    "files", [("last.pth.tar", "args.yaml"), ("config.json", "model.safetensors"), ("notes/a.txt",)]
)
def test_a_folder_that_an_export_did_not_make_is_kept(files, checkpoint, tmp_path):
    for file in files:
        (tmp_path / "mine" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / file).write_text("the only copy")
    refused = run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0)
    assert refused.exit_code == 2 and "exist yet" in " ".join(refused.stderr.split())
    assert [(tmp_path / "mine" / file).read_text() for file in files] == ["the only copy"] * len(files)


def test_an_exported_folder_to_which_a_file_was_added_is_kept(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()  # an empty folder is written into
    assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    (tmp_path / "mine" / "notes.txt").write_text("the only copy")
    with pytest.raises(ValueError, match=r"it holds notes\.txt\."):  # before anything is measured
        export.export(hub.load(f"local-dir:{tmp_path / 'mine'}"), tmp_path / "mine", None, "validation", "test", {})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "the only copy"


def test_an_export_keeps_a_folder_beside_it_and_what_others_may_read(checkpoint, tmp_path):
    (tmp_path / "mine.new").mkdir()
    (tmp_path / "mine.new" / "last.pth.tar").write_text("the only copy")
    assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "mine.new"]
    assert (tmp_path / "mine.new" / "last.pth.tar").read_text() == "the only copy"
    assert (tmp_path / "mine").stat().st_mode == (tmp_path / "mine.new").stat().st_mode


def test_thresholds_are_not_fixed_on_the_test_split(checkpoint, tmp_path):
    refused = run("export-hub", checkpoint, "--output", tmp_path / "mine", "--split", "test")
    assert refused.exit_code == 2 and "held out of training" in refused.stderr and not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--split", "validation", "--test", "train"), "--test train shares images with train"),
        (("--split", "validation[:8]", "--test", "validation[4:]"), "held out of training and not on the test split"),
        (("--split", "validation[:8]", "--test", "validation[90%:]"), "held out of training and not on the test split"),
    ],
)
def test_accuracies_are_of_images_that_neither_training_nor_thresholds_have_seen(options, told, checkpoint, tmp_path):
    record = torch.load(checkpoint, weights_only=False)
    record["args"].train_split = "train"
    torch.save(record, tmp_path / "last.pth.tar")
    refused = run("export-hub", tmp_path / "last.pth.tar", "--output", tmp_path / "mine", *options)
    assert refused.exit_code == 2 and told in " ".join(refused.stderr.split()) and not (tmp_path / "mine").exists()


def test_images_that_may_have_been_trained_on_are_not_measured(checkpoint, tmp_path):
    record = torch.load(checkpoint, weights_only=False)
    record["args"].train_split, record["args"].dataset = "train[:80%]", "hfds/made/up"
    torch.save(record, tmp_path / "last.pth.tar")
    options = ("--split", "validation", "--test", "train[-2:]")
    refused = run("export-hub", tmp_path / "last.pth.tar", "--output", tmp_path / "mine", *options)
    told = "--test train[-2:] may share images with train[:80%] (count both from the start"
    assert refused.exit_code == 2 and told in " ".join(refused.stderr.split()) and not (tmp_path / "mine").exists()


@pytest.mark.parametrize(("trained", "warned"), [("validation[3:]", True), ("validation[:6]", False)])
def test_thresholds_fixed_on_images_of_training_are_warned_of(trained, warned, checkpoint, tmp_path, recwarn):
    record = torch.load(checkpoint, weights_only=False)
    record["args"].train_split = trained
    torch.save(record, tmp_path / "last.pth.tar")
    options = ("--split", "validation[6:]", "--workers", 0)
    done = run("export-hub", tmp_path / "last.pth.tar", "--output", tmp_path / "mine", *options)
    assert done.exit_code == 0, done.output
    assert any(f"shares images with {trained}" in str(warning.message) for warning in recwarn) is warned


def test_the_presets_results_are_what_the_shipped_network_does(checkpoint, tmp_path, data):
    assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    point = results["test"]["presets"]["balanced"]
    assert results["flops_lazy"][0] <= point["average_flops"] <= results["flops_lazy"][-1]
    assert sum(point["exit_shares"]) == pytest.approx(1) and results["test"]["samples"] == 12
    assert results["dataset"] == data.name  # no path of this machine


@pytest.mark.parametrize(
    ("model", "started", "expected"),
    [
        ("dfs_resnet18", True, dict(base_model="timm/resnet18.a1_in1k")),
        ("dfs_resnet18", False, {}),
        ("dfs_vgg7_cifar100", True, {}),
        ("dfs_tf_efficientnet_lite0.cifar100", True, {}),  # a tag of this package's weights, none of timm's
    ],
)
def test_a_twin_that_started_from_timms_weights_names_them(model, started, expected, tmp_path):
    (tmp_path / "args.yaml").write_text(f"pretrained: {started}")
    assert export.base_model(TrainingRun(model), tmp_path / "last.pth.tar") == expected


def test_the_points_shipped_are_by_the_confidence_with_which_they_cost_least():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (400,), generator=generator)
    logits = torch.randn(3, 400, 5, generator=generator)
    logits += torch.tensor([1.0, 2.0, 3.0])[:, None, None] * torch.nn.functional.one_hot(targets, 5)
    val, temperatures = (logits, targets), fit_temperatures(logits, targets)
    found = export.operating_points(val, [1, 2, 4], ensemble=False, dataset="made up", split="validation")
    fitted = {name: fit_presets(val, [1, 2, 4], confidence=name, temperatures=temperatures) for name in CONFIDENCES}
    costs = {name: [point.average_flops for point in points.values()] for name, points in fitted.items()}
    assert [point.average_flops for point in found.values()] == min(costs.values(), key=sum)
    assert set(found) == set(NAMED) and all(point.fitted_on.dataset == "made up" for point in found.values())


ELSEWHERE = dict(pretrained=True, pretrained_path="elsewhere")
"""Arguments of a run that started from weights in a file."""


@pytest.fixture
def ship(checkpoint, data, tmp_path, monkeypatch):
    """A function that calls recipes/ship.py on the run and a recipe, and returns the folder and its results.

    ``in_record`` is what args.yaml says otherwise than the checkpoint.
    """
    recipe, script = tmp_path / "mine.yaml", tmp_path / "recipes" / "ship.py"
    state = torch.load(checkpoint, weights_only=False)
    of_network = dict(num_classes=10, model_kwargs=state["args"].model_kwargs)
    settings = dict(model="dfs_vgg7_cifar100", epochs=3, dataset="hfds/made/up", train_split="train", amp=True)
    settings.update(of_network)
    recipe.write_text(yaml.safe_dump(settings))
    script.parent.mkdir()
    shutil.copy(RECIPES / "ship.py", script)
    of_data = dict(dataset=f"hfds/{data}", data_dir=None, val_split="validation")
    keys = dict(input_key="img", target_key="fine_label")
    run_folder = tmp_path / "run"
    shutil.copytree(checkpoint.parent, run_folder)

    def call(*options, in_record=(), **changed):
        arguments = {**settings, **of_data, **keys, **changed}
        torch.save(dict(state, args=argparse.Namespace(**arguments)), run_folder / "last.pth.tar")
        (run_folder / "args.yaml").write_text(yaml.safe_dump({**arguments, **dict(in_record)}))
        monkeypatch.setattr(sys, "argv", ["ship.py", str(run_folder), "--recipe", str(recipe), *options])
        monkeypatch.chdir(RECIPES)  # a checkout
        runpy.run_path(str(script), run_name="__main__")
        (folder,) = (tmp_path / "hub").iterdir()
        return folder, json.loads((folder / "results.json").read_text())

    (tmp_path / "hub").mkdir()
    return call


def test_a_finished_run_of_a_recipe_is_shipped_under_the_models_name(ship):
    folder, results = ship()
    assert folder.name == results["model"] == "dfs_vgg7_cifar100"
    assert results["training"]["recipe"] == "mine.yaml" and results["training"]["samples"] == 12
    assert results["dataset"] == "made/up" and check_folder(folder).beta == 0.25


def test_other_settings_than_the_recipes_are_shipped_under_a_tag_only(ship, capsys):
    distilled = dict(depths=(1, 2), widths=(6, 8), beta=0.25, distill_weight=0.5)
    with pytest.raises(SystemExit):
        ship(model_kwargs=distilled)
    assert "give it a --tag" in capsys.readouterr().err
    folder, results = ship("--tag", "distilled", model_kwargs=distilled)
    assert folder.name == results["model"] == "dfs_vgg7_cifar100.distilled"
    assert check_folder(folder).pretrained_cfg["tag"] == "distilled"
    assert "# dfs_vgg7_cifar100.distilled" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("changed", "why"), [(dict(epochs=4), "differs from the recipe in epochs"), (dict(model="other"), "in model")]
)
def test_a_run_that_is_not_its_recipes_is_not_shipped(ship, capsys, changed, why):
    with pytest.raises(SystemExit):
        ship(**changed)
    assert why in capsys.readouterr().err


def test_a_checkpoint_of_another_run_than_the_record_beside_it_is_not_shipped(ship, capsys):
    """A run that went on from the checkpoint of one by another recipe."""
    for other in (dict(amp=False), dict(model_kwargs=dict(beta=0.5))):
        with pytest.raises(SystemExit):
            ship(in_record=other)
        told = capsys.readouterr().err
        assert "is of a run that differs from" in told and next(iter(other)) in told


@pytest.mark.parametrize("options", [["--held-out", "train[:6]"], ["--test", "train"]])
def test_neither_thresholds_nor_accuracies_are_from_images_that_were_trained_on(ship, capsys, options):
    with pytest.raises(SystemExit):
        ship(*options)
    assert f"{options[1]} shares images with train, which was trained on" in capsys.readouterr().err


def test_a_split_of_which_its_name_does_not_tell_whether_it_was_trained_on_is_refused_too(ship, capsys):
    with pytest.raises(SystemExit):
        ship("--test", "train[6:]", train_split="train[:50%]")
    assert "train[6:] shares images with train[:50%], which was trained on, or may" in capsys.readouterr().err


def test_how_many_workers_there_were_and_how_often_was_validated_do_not_make_another_recipe(ship, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipe.read_text() + "workers: 4\nval_interval: 20\n")
    _, results = ship(workers=2, val_interval=1)
    assert "other_than_recipe" not in results["training"]


def test_a_run_of_the_gpu_kit_is_known_by_its_record(ship, tmp_path, capsys):
    recipe, lines = tmp_path / "mine.yaml", tmp_path / "run" / "exits.jsonl"
    recipe.write_text(recipe.read_text() + "pad: 4\n")
    with pytest.raises(SystemExit):
        ship(pad=4)
    assert "made by train.py, which ignores the recipe's pad" in capsys.readouterr().err
    assert "hours" not in ship(pad=4, script="benchmarks/gpu/run.py")[1]["training"]
    for last, told in ((dict(hours=0.25), {0.25}), (dict(), set())):
        lines.write_text('{"hours": 0.125}\n' + json.dumps(last) + "\n")
        folder, results = ship(pad=4, scale=None, script="benchmarks/gpu/run.py")
        assert {results["training"].get("hours")} - {None} == told
        assert results["training"]["script"] == "benchmarks/gpu/run.py"
        card = (folder / "README.md").read_text()
        assert "| `pad` | 4 |" in card and "`scale`" not in card


def test_a_run_in_another_precision_is_shipped_and_its_card_states_it(ship):
    folder, results = ship(amp=False)
    assert results["training"]["other_than_recipe"] == dict(amp=False)
    assert "- settings other than the recipe's: amp False\n" in (folder / "README.md").read_text()
    assert "other than the recipe's" not in (ship()[0] / "README.md").read_text()


def test_a_run_from_another_machine_must_name_its_hardware(ship, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ship(device="cuda")
    assert "the run trained on cuda; say on what in" in capsys.readouterr().err
    (tmp_path / "run" / "hardware.txt").write_text("one card\n")
    _, results = ship("--dataset", f"hfds/{data}", device="cuda", dataset="hfds//there/not/here")
    assert results["training"]["hardware"] == "one card" and results["dataset"] == "made/up"


def test_base_weights_come_onto_the_card_with_their_licence(ship, tmp_path, capsys):
    about = dict(
        architecture="tf_vgg", source="vgg.pth of a wheel", trained_on="ImageNet-1k", sha256="0f", license="MIT"
    )
    weights = {"weight": torch.zeros(1)}
    save_file(weights, base := tmp_path / "base.safetensors", {**about, "license_text": "do as you like"})
    for wrong, complaint in ((["--base", str(base)], "did not start from"), ([], "give their file as --base")):
        with pytest.raises(SystemExit):
            ship(*wrong, **({} if wrong else ELSEWHERE))
        assert complaint in capsys.readouterr().err
    folder, results = ship("--base", str(base), **ELSEWHERE)
    assert results["base_weights"] == about and (folder / "LICENSE.base").read_text() == "do as you like"
    card = (folder / "README.md").read_text()
    assert "vgg.pth of a wheel, MIT (text in `LICENSE.base`), sha256 `0f`" in card and "trained on ImageNet-1k" in card
    check_folder(folder)
    (folder / "LICENSE.base").unlink()
    with pytest.raises(ValueError, match=r"no LICENSE\.base"):
        check_folder(folder)
    save_file(weights, base)
    with pytest.raises(SystemExit):
        ship("--base", str(base), **ELSEWHERE)
    assert "does not say where it is from" in capsys.readouterr().err


def test_the_phases_before_the_last_are_on_the_card_if_they_followed_their_recipes(ship, checkpoint, tmp_path, capsys):
    kwargs = torch.load(checkpoint, weights_only=False)["args"].model_kwargs
    phases = {"first": dict(epochs=4, lr=0.5, input_size=[3, 16, 16]), "second": dict(epochs=2, input_size=[3, 24, 24])}
    for name, recipe in phases.items():
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))

    def trained(ended=0, **of_first):
        before = ""
        for name, recipe in phases.items():
            arguments = dict(recipe, model_kwargs=dict(kwargs), initial_checkpoint=before)
            if name == "first":
                arguments.update(of_first)
            (tmp_path / name / "args.yaml").write_text(yaml.safe_dump(arguments))
            before = str(tmp_path / name / "last.pth.tar")
            state = torch.load(checkpoint, weights_only=False)
            torch.save(dict(state, epoch=(ended or recipe["epochs"]) - 1), before)
        recipes = [str(tmp_path / f"{name}.yaml") for name in phases]
        return ship("--earlier-recipes", *recipes, initial_checkpoint=before)

    folder, results = trained()
    assert results["training"]["earlier_phases"] == [
        dict(recipe="first.yaml", epochs=4, input_size=[3, 16, 16]),
        dict(recipe="second.yaml", epochs=2, input_size=[3, 24, 24]),
    ]
    assert (
        "- before, phase 1: 4 epochs at 16 px, recipe `first.yaml`\n"
        "- before, phase 2: 2 epochs at 24 px, recipe `second.yaml`\n"
    ) in (folder / "README.md").read_text()
    for wrong, complaint in (
        (dict(ended=1), "is of epoch 1, and the run of second.yaml has 2"),
        (dict(lr=0.1), "differs from first.yaml or this run in lr"),
        (dict(model_kwargs=dict(beta=0.25)), "differs from first.yaml or this run in kwargs"),
    ):
        with pytest.raises(SystemExit):
            trained(**wrong)
        assert complaint in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ship("--earlier-recipes", str(tmp_path / "first.yaml"), initial_checkpoint="")
    assert "the run of first.yaml is not there" in capsys.readouterr().err


def test_a_run_from_shipped_weights_has_their_phases_and_their_base_on_its_card(ship, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ship(initial_checkpoint="a/run/last.pth.tar")
    assert "name the recipe of that run in --earlier-recipes" in capsys.readouterr().err
    about = dict(architecture="tf_vgg", source="a wheel", trained_on="ImageNet-1k", sha256="0f", license="MIT")
    save_file({"weight": torch.zeros(1)}, base := tmp_path / "base.safetensors", {**about, "license_text": "do"})
    folder, before = ship("--base", str(base), **ELSEWHERE)
    with pytest.raises(SystemExit):
        ship(initial_checkpoint=str(folder / "model.safetensors"))
    assert "which these would replace; give a --tag" in capsys.readouterr().err
    shutil.move(folder, tmp_path / "shipped")
    start = tmp_path / "shipped" / "model.safetensors"
    with pytest.raises(SystemExit):
        ship("--tag", "longer", "--base", str(base), initial_checkpoint=str(start))
    assert "leave out --base" in capsys.readouterr().err
    folder, results = ship("--tag", "longer", initial_checkpoint=str(start))
    assert results["training"]["earlier_phases"] == [dict(recipe="mine.yaml", epochs=3, input_size=[3, 32, 32])]
    assert results["base_weights"] == about == before["base_weights"]
    assert (folder / "LICENSE.base").read_text() == "do"
    shutil.rmtree(folder)
    config = start.with_name("config.json")
    config.write_text(config.read_text().replace('"beta": 0.25', '"beta": 0.5'))
    with pytest.raises(SystemExit):
        ship("--tag", "longer", initial_checkpoint=str(start))
    assert "have beta=0.5, this run 0.25" in capsys.readouterr().err
    before["training"]["objective"] = dict(beta=0.75)
    (tmp_path / "shipped" / "results.json").write_text(json.dumps(before))
    with pytest.raises(SystemExit):
        ship(initial_checkpoint=str(start))
    assert "were trained for {'beta': 0.75}, this run" in capsys.readouterr().err


def test_a_network_can_be_shipped_at_another_size_than_it_was_trained_at(ship):
    folder, results = ship("--img-size", "48")
    model = check_folder(folder)
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 48, 48)
    assert results["flops"] == exit_flops(model, (3, 48, 48))


def test_what_a_recipe_leaves_open_a_run_may_choose(ship):
    assert ship(lr=0.2)[1]["training"]["settings"]["lr"] == 0.2


def test_the_hours_of_a_resumed_run_are_not_claimed(checkpoint, tmp_path):
    shutil.copytree(checkpoint.parent, tmp_path / "run")
    arguments, file = tmp_path / "run" / "args.yaml", tmp_path / "run" / checkpoint.name
    assert "hours" in export.training_facts(TrainingRun("dfs_vgg7_cifar100"), file)
    arguments.write_text(arguments.read_text() + "resume: run/last.pth.tar\n")
    assert "hours" not in export.training_facts(TrainingRun("dfs_vgg7_cifar100"), file)


def test_settings_that_had_no_effect_are_not_stated(checkpoint, tmp_path):
    shutil.copytree(checkpoint.parent, tmp_path / "run")
    file = tmp_path / "run" / checkpoint.name
    recorded = dict(mixup=0.0, cutmix=0.0, mixup_prob=0.5, mixup_off_epoch=0, model_ema=False, model_ema_decay=0.9)

    def stated(**changed):
        (tmp_path / "run" / "args.yaml").write_text(yaml.safe_dump(dict(recorded, **changed)))
        return export.training_facts(TrainingRun("dfs_vgg7_cifar100"), file)["settings"].keys()

    assert stated() == {"mixup", "cutmix", "model_ema"}
    assert stated(cutmix=1.0) == {"mixup", "cutmix", "mixup_prob", "mixup_off_epoch", "model_ema"}
    assert stated(model_ema=True) == {"mixup", "cutmix", "model_ema", "model_ema_decay"}
