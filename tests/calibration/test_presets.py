"""Named operating points travel with the weights."""

import json
import os

import pytest
import timm
import torch
from formula_fill import exit_logits
from helpers import images, settled, tiny_vgg
from safetensors.torch import load_file

import timm_dfs
from timm_dfs.calibration import fit, presets
from timm_dfs.calibration.logits import halves
from timm_dfs.calibration.presets import NAMED, fit_presets
from timm_dfs.hub import folder as hub
from timm_dfs.hub.folder import write_presets

FLOPS = [10, 25, 45]


@pytest.fixture(scope="module")
def data():
    logits, targets = exit_logits(3, 600, 3, 5)
    return (logits[0], targets[0]), (logits[1], targets[1])


def test_every_model_gets_the_named_points_and_those_asked_for(data):
    val, _ = data
    points = fit_presets(val, FLOPS, budgets=[20], max_accuracy_drops=[4], split="held out")
    assert list(points) == [*NAMED, "2e-05M", "drop-4"]
    assert points["2e-05M"].average_flops <= 20
    last = timm_dfs.anytime_accuracy(*val)[-1].item()
    for name, drop in {**NAMED, "drop-4": 4}.items():
        assert points[name].accuracy >= last - drop - 1e-4
    assert {point.fitted_on.split for point in points.values()} == {"held out"}
    assert points["fast"].average_flops < points["balanced"].average_flops <= points["accurate"].average_flops


def test_all_presets_share_one_search(data, monkeypatch):
    made = []
    search = fit.ThresholdSearch
    monkeypatch.setattr(fit, "ThresholdSearch", lambda *args, **how: made.append(args) or search(*args, **how))
    fit_presets(data[0], FLOPS, budgets=[20], max_accuracy_drops=[4, 8], held_out=data[1])
    assert len(made) == 1


def test_presets_are_the_points_that_are_fitted_one_by_one(data):
    val, _ = data
    points = fit_presets(val, FLOPS, budgets=[20], max_accuracy_drops=[4], confidence="margin")
    goals = {name: dict(max_accuracy_drop=drop) for name, drop in {**NAMED, "drop-4": 4}.items()}
    for name, goal in {**goals, "2e-05M": dict(budget=20)}.items():
        point = timm_dfs.fit_operating_point(val, FLOPS, **goal, confidence="margin")
        assert points[name].preset() == point.preset()


def test_with_held_out_data_every_point_has_a_bound(data):
    points = fit_presets(*data[:1], FLOPS, max_accuracy_drops=[8], held_out=data[1], confidence_level=0.9)
    assert all(point.risk.confidence_level == 0.9 and point.risk.samples == 600 for point in points.values())
    assert points["drop-8"].risk.max_accuracy_drop == 8


def test_halves_share_no_sample_and_lose_none():
    logits, targets = torch.arange(14.0).reshape(2, 7, 1), torch.arange(7)
    first, second = halves((logits, targets))
    assert sorted([*first[1].tolist(), *second[1].tolist()]) == list(range(7))
    assert torch.equal(first[0][0, :, 0], first[1].float()) and torch.equal(second[0][1, :, 0], 7 + second[1].float())
    assert torch.equal(halves((logits, targets))[0][1], first[1])


@pytest.fixture
def model(data):
    model = settled(tiny_vgg(depths=(1, 2), widths=(6, 8), pretrained_cfg_overlay=dict(num_classes=5)))
    model.presets = {name: point.preset() for name, point in fit_presets(data[0], FLOPS).items()}
    return model


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("folder_exists", [False, True])
def test_presets_come_back_by_name_with_the_weights(model, folder_exists, tmp_path):
    folder = tmp_path / "published"
    if folder_exists:
        given, model.presets = model.presets, {}
        hub.write_weights(model, folder)
        model.load_state_dict({key: value.half().float() for key, value in model.state_dict().items()})
        model.presets = given
    write_presets(model, folder)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, depths=(1, 2), widths=(6, 8)).eval()
    assert again.presets == model.presets
    x = images()
    for name in NAMED:
        expected = timm_dfs.ExitPolicy.from_preset(model.presets[name])
        assert torch.equal(timm_dfs.predict(again, x, name).exit_index, timm_dfs.predict(again, x, expected).exit_index)
    json.loads((folder / "config.json").read_text(), parse_constant=refuse)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert [file.name for file in tmp_path.iterdir()] == ["published"]


def test_the_rest_of_a_config_stays_as_it_was(model, tmp_path):
    write_presets(model, tmp_path / "m")
    before = json.loads((tmp_path / "m" / "config.json").read_text())
    model.presets = {"fast": model.presets["fast"]}
    write_presets(model, tmp_path / "m")
    after = json.loads((tmp_path / "m" / "config.json").read_text())
    assert after["model_args"].pop("presets") == model.presets
    del before["model_args"]["presets"]
    assert after == before


def test_an_interrupted_writing_leaves_the_old_presets(model, tmp_path, monkeypatch):
    write_presets(model, tmp_path / "m")
    before = (tmp_path / "m" / "config.json").read_text()

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    model.presets = {}
    with pytest.raises(OSError):
        write_presets(model, tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_text() == before


def test_another_model_s_folder_is_refused(model, tmp_path):
    write_presets(model, tmp_path / "m")
    other = settled(tiny_vgg(), seed=5)
    with pytest.raises(ValueError, match="not those the presets were fitted to"):
        write_presets(other, tmp_path / "m")


def test_presets_of_another_computation_than_the_folders_are_refused(model, tmp_path):
    write_presets(model, tmp_path / "m")

    def again(**changes):
        other = timm.create_model("dfs_vgg7_cifar100", depths=(1, 2), widths=(6, 8), num_classes=5, **changes).eval()
        other.load_state_dict(model.state_dict())
        other.presets = model.presets
        return other

    write_presets(again(beta=0.1, drop_rate=0.2), tmp_path / "m")
    with pytest.raises(ValueError, match="to one with global_pool max instead of the default"):
        write_presets(again(global_pool="max"), tmp_path / "m")
    other = again()
    other.pretrained_cfg["input_size"] = (3, 64, 64)
    with pytest.raises(ValueError, match=r"input_size \[3, 64, 64\] instead of \[3, 32, 32\]"):
        write_presets(other, tmp_path / "m")


def test_presets_are_refused_for_a_folder_whose_config_alone_changes_the_computation(tmp_path):
    arguments = dict(depths=(1, 2), widths=(6, 8), num_classes=5)
    by_maximum = settled(timm.create_model("dfs_vgg7_cifar100", global_pool="max", **arguments))
    write_presets(by_maximum, tmp_path / "m")
    by_average = timm.create_model("dfs_vgg7_cifar100", **arguments)
    by_average.load_state_dict(by_maximum.state_dict())
    by_average.presets = dict(fast=dict(thresholds=[0.5, 0.5, 0.0]))
    with pytest.raises(ValueError, match=r"gives other logits from these weights, by its model_args .*'max'"):
        write_presets(by_average, tmp_path / "m")


def test_a_network_trained_with_feature_distillation_is_written_without_adapters(tmp_path):
    model = settled(tiny_vgg(distill_feature_weight=0.1))
    for fitted in ({}, dict(fast=dict(thresholds=[0.5, 0.5, 0.0]))):
        model.presets = fitted
        write_presets(model, tmp_path / "m")
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert again.presets == model.presets and again.adapters is None
    assert not [key for key in load_file(tmp_path / "m" / "model.safetensors") if "adapters" in key]


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, torch.nn.Sequential])
def test_only_networks_with_exits_are_written(wrapper, model, tmp_path):
    with pytest.raises(ValueError, match="exits"):
        write_presets(wrapper(model), tmp_path / "m")


def test_a_compiled_model_is_written_as_itself(model, tmp_path):
    write_presets(torch.compile(model, backend="eager"), tmp_path / "m")
    assert timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).presets == model.presets


def test_a_model_that_timm_cannot_rebuild_is_refused(tmp_path):
    by_hand = timm_dfs.MultiExit(timm.create_model("test_resnet", num_classes=3), exits=("layer1",))
    for write in (write_presets, hub.write_weights):
        with pytest.raises(ValueError, match=r"cannot rebuild this MultiExit.*create_model\('dfs_test_resnet'"):
            write(by_hand, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("beta", [0.5, [0.5, 0.25]])
def test_weights_without_referencing_load_with_their_own_ratios_alone(beta, tmp_path):
    off = settled(tiny_vgg(referencing="off", beta=beta))
    weights = off.state_dict()
    for other in (dict(), dict(referencing="off", beta=0.75), dict(referencing="off", beta="joint")):
        with pytest.raises(ValueError, match=r"trained with referencing='off' and beta=.*create it with those"):
            tiny_vgg(**other).load_state_dict(weights)
    with pytest.raises(ValueError, match="weights are of a network with 3 exits, and the model has 2"):
        tiny_vgg(depths=(1, 1), widths=(6, 8), referencing="off").load_state_dict(weights)
    same = tiny_vgg(referencing="off", beta=beta).eval()
    same.load_state_dict({key: value.half() for key, value in weights.items()})
    with pytest.warns(UserWarning, match="wrong until it is trained further"):
        tiny_vgg(referencing="off").load_state_dict(tiny_vgg().state_dict())
    write_presets(off, tmp_path / "m")
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert torch.equal(again(images()), off(images()))


def test_a_folder_without_a_model_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        write_presets(model, tmp_path)


@pytest.mark.parametrize(
    "broken",
    [
        dict(thresholds=[0.5]),
        dict(thresholds=["a"] * 3),
        dict(temperatures=[1]),
        dict(confidence="surprise"),
        dict(accuracy="no"),
    ],
    ids=str,
)
def test_a_broken_preset_is_not_written(model, broken, tmp_path):
    model.presets["odd"] = {**model.presets["fast"], **broken}
    with pytest.raises(ValueError, match=f"Preset 'odd': .*{next(iter(broken))[:9]}"):
        write_presets(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_preset_with_further_fields_loads(model, tmp_path):
    model.presets["fast"]["latency_ms"] = dict(p50=3.2)
    write_presets(model, tmp_path / "m")
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, depths=(1, 2), widths=(6, 8))
    assert again.presets == model.presets


def test_names_say_budget_and_drop():
    assert [presets.budget_name(146.25e6), presets.budget_name(1e9)] == ["146.25M", "1000M"]
    assert presets.drop_name(0.5) == "drop-0.5"


def test_presets_that_would_have_one_name_are_refused(data):
    with pytest.raises(ValueError, match=r"one name, among 1\.23457M, 1\.23457M"):
        fit_presets(data, [1e6, 2e6, 4e6], budgets=[1_234_567, 1_234_569])
