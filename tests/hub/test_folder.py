"""The published folders under hub/ load, match their results, and have cards generated from them."""

import json
import os

import pytest
import timm
import torch
from helpers import ROOT, images, settled, tiny_vgg

import timm_dfs
from timm_dfs.data.cifar100 import LABEL_NAMES
from timm_dfs.data.datasets import dataset_loader
from timm_dfs.data.images import given_labels, labels_of
from timm_dfs.hub import card
from timm_dfs.hub import folder as hub
from timm_dfs.hub.both_parts import both_parts
from timm_dfs.report.published import published_results

HUB = ROOT / "hub"
SHIPPED = [folder.name for folder in card.model_folders(HUB)]


def results(name):
    return json.loads((HUB / name / hub.RESULTS_FILE).read_text())


def test_a_written_model_loads_from_its_folder_with_settings_and_presets(tmp_path):
    settings = dict(depths=(1, 2), widths=(6, 8), beta="joint", referencing="one_sided")
    model = settled(tiny_vgg(**settings))
    model.presets = {"fast": dict(thresholds=[0.5, None, 0.0], confidence="max_prob")}
    hub.write_weights(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (again.beta, again.referencing, again.presets) == ("joint", "one_sided", model.presets)
    assert torch.allclose(again(images()), model(images()), rtol=1e-2, atol=1e-2)  # half precision
    assert timm_dfs.predict(again, images(), "fast").exit_index.shape == (4,)


def test_a_written_model_keeps_the_beta_of_each_exit(tmp_path):
    hub.write_weights(tiny_vgg(beta=(0.25, 0.9)), tmp_path)
    assert json.loads((tmp_path / hub.CONFIG_FILE).read_text())["model_args"]["beta"] == [0.25, 0.9]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.beta == (0.25, 0.9) and [partition.beta for partition in again.partitions] == [0.25, 0.9]


def test_a_network_fine_tuned_on_other_classes_keeps_their_names(tmp_path):
    model = timm.create_model("dfs_test_resnet", num_classes=3)
    model.pretrained_cfg["label_names"] = ("ant", "bee", "cat")
    hub.write_weights(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert labels_of(again) == ("ant", "bee", "cat")


def test_a_model_in_another_memory_format_is_written_and_a_fused_copy_refused(tmp_path):
    model = tiny_vgg().eval()
    timm_dfs.write_presets(model.to(memory_format=torch.channels_last), tmp_path / "model")
    with pytest.raises(ValueError, match="fused copy"):
        timm_dfs.write_presets(timm_dfs.fuse(model), tmp_path / "fused")
    assert [folder.name for folder in tmp_path.iterdir()] == ["model"]


def test_the_config_is_json_that_any_reader_takes(tmp_path):
    model = tiny_vgg()
    model.presets = {"never": dict(thresholds=[None, None, 0.0])}
    hub.write_weights(model, tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / hub.CONFIG_FILE).read_text(), parse_constant=refuse)


def test_something_is_shipped():
    assert "dfs_msdnet_cifar100" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_gives_the_logits_it_was_shipped_with(name):
    model = timm.create_model(name, pretrained=True)
    expected = torch.tensor(results(name)["golden_logits"])
    assert torch.allclose(torch.tensor(hub.golden_logits(model)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_has_its_operating_points_and_costs_what_its_results_say(name):
    model = timm.create_model(name, pretrained=True)
    assert timm_dfs.exit_flops(model, lazy=True) == results(name)["flops_lazy"]
    assert model.presets.keys() == results(name)["test"]["presets"].keys() and model.presets
    for preset in model.presets:
        assert timm_dfs.predict(model, hub.golden_batch(model), preset).logits.isfinite().all()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_names_its_classes_by_whatever_way_it_is_loaded(name, monkeypatch):
    ways = [name, f"local-dir:{HUB / name}"]
    assert {labels_of(timm.create_model(way, pretrained=True)) for way in ways} == {LABEL_NAMES}
    monkeypatch.setenv("TIMM_DFS_HUB", str(HUB))
    assert labels_of(timm.create_model(name, pretrained=True)) == LABEL_NAMES


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_half_precision_and_small(name):
    assert (HUB / name / "model.safetensors").stat().st_size < 20e6


MSDNET, MSDNET_JOINT = "dfs_msdnet_cifar100", "dfs_msdnet_cifar100.joint"
LITE0, LITE0_LARGER = "dfs_tf_efficientnet_lite0.cifar100", "dfs_tf_efficientnet_lite0.cifar100_112"


def readme():
    return " ".join((HUB.parent / "README.md").read_text().split())


def test_the_readmes_comparison_of_the_weights_matches_the_results():
    def dfs_is_ahead(dfs, joint, *splits):
        return [[a > b for a, b in zip(results(dfs)[s]["top1"], results(joint)[s]["top1"])] for s in splits]

    assert f"`{MSDNET}` is ahead of `.joint` at the first two exits and behind at the others" in readme()
    assert dfs_is_ahead(MSDNET, MSDNET_JOINT, "held_out", "test") == 2 * [2 * [True] + 5 * [False]]
    said = "is ahead at the first exit on the held-out images, and at no exit on the test images"
    assert f"Lite0's `.cifar100_dfs` (two-sided, the default of wrapped networks) {said}" in readme()
    folder = json.loads((HUB / f"{LITE0}_dfs" / "config.json").read_text())
    assert folder["model_args"]["referencing"] == "two_sided"
    first, at_test = dfs_is_ahead(f"{LITE0}_dfs", LITE0, "held_out", "test")
    assert first == [True] + 3 * [False] and not any(at_test)


def test_the_readme_says_which_weights_are_most_accurate_and_which_are_cheapest():
    assert f"**Which weights to take.** For the most accuracy `{MSDNET_JOINT}`" in readme()
    assert f"For less compute `{LITE0_LARGER}`, each of whose presets is more accurate than any of MSDNet's" in readme()
    assert (
        "for the least `.cifar100`, the same network at 96 px, whose presets cost less than any of MSDNet's" in readme()
    )
    presets = {name: results(name)["test"]["presets"] for name in SHIPPED}
    for name in ("accurate", "balanced", "fast"):
        others = [preset["top1"] for other in SHIPPED if other != MSDNET_JOINT for preset in presets[other].values()]
        assert presets[MSDNET_JOINT][name]["top1"] > max(others)
    assert "its last exit is above the one that the paper reports for DFS" in readme()
    whole = both_parts(results(MSDNET_JOINT))["top1"][-1]
    assert whole > published_results("cifar100", 100, results(MSDNET_JOINT)["flops"]).exits["DFS"][-1]
    of_msdnet = [*presets[MSDNET].values(), *presets[MSDNET_JOINT].values()]
    dearest, cheapest = (max(p["average_flops"] for p in presets[name].values()) for name in (LITE0_LARGER, LITE0))
    assert cheapest < dearest < max(p["average_flops"] for p in presets[MSDNET_JOINT].values())
    costs = [[preset["average_flops"] for preset in some] for some in (presets[LITE0].values(), of_msdnet)]
    assert max(costs[0]) < min(costs[1])
    for preset in presets[LITE0_LARGER].values():
        cheaper = [other["top1"] for other in of_msdnet if other["average_flops"] <= preset["average_flops"] * 1.05]
        assert cheaper and all(preset["top1"] > top1 for top1 in cheaper)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_as_accurate_as_its_results_say(name):
    data = os.environ.get("CIFAR100")
    if data is None:
        pytest.skip("CIFAR100 does not name a folder with the data set, in the Hub's layout")
    model = timm.create_model(name, pretrained=True)
    split = results(name)["test"]["split"]
    loader = dataset_loader(model, f"hfds/{data}", None, split, "img", "fine_label", 128, 1)
    top1 = timm_dfs.anytime_accuracy(*timm_dfs.collect_logits(model, loader))
    assert torch.allclose(top1, torch.tensor(results(name)["test"]["top1"]), atol=0.05)


def test_weights_that_half_precision_cannot_hold_are_refused_by_name(tmp_path):
    model = tiny_vgg()
    model.stages[0].bn.running_var.fill_(1e6)
    with pytest.raises(ValueError, match=r"stages\.0\.bn\.running_var"):
        hub.write_weights(model, tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_comes_with_the_package(name):
    assert f'"hub/{name}" = "timm_dfs/pretrained/weights/{name}"\n' in (HUB.parent / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("name", "arguments"), [("dfs_xcit_nano_12_p16_224", {}), ("dfs_test_vit", dict(dynamic_img_size=True))]
)
def test_presets_fitted_at_another_size_than_the_rebuilt_network_takes_are_not_written(name, arguments, tmp_path):
    """These networks take images of other sizes than they were built for, but timm rebuilds them for the first."""
    model = timm.create_model(name, num_classes=3, exits=2, **arguments).eval()
    model.presets = {"fast": dict(thresholds=[0.5, 0.0])}
    timm_dfs.write_presets(model, tmp_path / "as built")
    model.pretrained_cfg["input_size"] = (3, 128, 128)
    assert len(model.forward_exits(torch.zeros(1, 3, 128, 128))) == 2
    with pytest.raises(ValueError, match="but its pretrained_cfg says 128×128; build it with img_size=128"):
        timm_dfs.write_presets(model, tmp_path / "other")
    built = timm.create_model(name, num_classes=3, exits=2, img_size=128, **arguments)
    built.presets = model.presets
    timm_dfs.write_presets(built, tmp_path / "rebuilt")
    assert hub.load(f"local-dir:{tmp_path / 'rebuilt'}").pretrained_cfg["input_size"] == (3, 128, 128)


@pytest.mark.parametrize("names", [{"2": "cat", "0": "ant", "1": "bee"}, {2: "cat", 1: "bee", 0: "ant"}])
def test_names_of_classes_may_be_a_dict_by_number_as_timm_takes_them(names, tmp_path):
    model = settled(tiny_vgg(num_classes=3))
    model.pretrained_cfg["label_names"] = names
    assert given_labels(model) == ("ant", "bee", "cat")
    hub.write_weights(model, tmp_path / "folder")
    assert labels_of(timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True)) == ("ant", "bee", "cat")
    model.pretrained_cfg["label_names"] = {"ant": 0, "bee": 1, "cat": 2}  # the other way round
    assert given_labels(model) == ()
