"""Weights load through timm's own routes, fit or are refused with a reason, and never execute code."""

import argparse
import copy
import json
import os
import shutil
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from formula_fill import fill
from helpers import GOLDEN_DATA, TINY, images, settled, tiny_msdnet, tiny_vgg
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import nn

import timm_dfs
from timm_dfs import write_presets
from timm_dfs.hub import folder as hub
from timm_dfs.models._builder import pretrained_cfgs
from timm_dfs.pretrained import packaged

DATA = GOLDEN_DATA
OFFICIAL = {"vgg": ("dfs_vgg7_cifar100", "vgg7_64_cifar100"), "resnet": ("dfs_resnet18_cifar100", "resnet18")}
PRESETS = dict(fast=dict(thresholds=[0.5, 0.5, 0.0]))


@pytest.fixture(params=TINY)
def make(request):
    return TINY[request.param]


def loaded(make, file, classes_in_file=5, **kwargs):
    """A tiny network with a file's weights; its config gives the file's number of classes."""
    overlay = dict(file=str(file), num_classes=classes_in_file)
    return make(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def saved(state_dict, file):
    (save_file if file.suffix == ".safetensors" else torch.save)(state_dict, file)
    return file


def equal_states(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


# Weights that load.


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_saved_network_comes_back_bit_for_bit(make, suffix, tmp_path):
    model = settled(make())
    again = loaded(make, saved(model.state_dict(), tmp_path / f"model{suffix}"))
    assert equal_states(model, again)


def test_a_checkpoint_of_timms_train_script_comes_back(make, tmp_path):
    model = settled(make())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    checkpoint = dict(
        epoch=3,
        arch="dfs_x",
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        version=2,
        args=argparse.Namespace(model="dfs_x", lr=0.1, opt="sgd"),
        metric=71.3,
    )
    again = loaded(make, saved(checkpoint, tmp_path / "model_best.pth.tar"))
    assert equal_states(model, again)


def test_a_train_scripts_averaged_weights_are_preferred(tmp_path):
    model, averaged = settled(tiny_vgg()), settled(tiny_vgg(), seed=2)
    checkpoint = dict(state_dict=model.state_dict(), state_dict_ema=averaged.state_dict())
    assert equal_states(loaded(tiny_vgg, saved(checkpoint, tmp_path / "last.pth.tar")), averaged)


def test_weights_saved_from_a_distributed_run_come_back(tmp_path):
    model = settled(tiny_vgg())
    prefixed = {f"module.{key}": value for key, value in model.state_dict().items()}
    assert equal_states(loaded(tiny_vgg, saved(prefixed, tmp_path / "model.safetensors")), model)


def test_weights_fit_any_partition(tmp_path):
    model = settled(tiny_vgg(beta=0.5))
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    for settings in (dict(beta="joint"), dict(beta=0.25, referencing="off")):
        again = loaded(tiny_vgg, file, **settings)
        assert all(map(torch.equal, again.parameters(), model.parameters()))
        assert again.beta == settings["beta"]


def test_weights_may_come_as_a_state_dict(make):
    model = settled(make())
    overlay = dict(state_dict=model.state_dict(), num_classes=5)
    assert equal_states(make(pretrained=True, pretrained_cfg_overlay=overlay), model)


def test_timms_checkpoint_path_works_too(make, tmp_path):
    model = settled(make())
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    assert equal_states(make(checkpoint_path=str(file)), model)


# Other classes and channels.


def test_other_classes_keep_the_backbone_and_renew_every_classifier(make, tmp_path):
    model = settled(make())
    again = loaded(make, saved(model.state_dict(), tmp_path / "model.safetensors"), num_classes=3)
    ours, theirs = again.state_dict(), model.state_dict()
    fresh = {key for key in ours if ".fc." in key}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - fresh)
    assert [logits.shape for logits in again.forward_exits(images())] == [(4, 3)] * 3
    assert all(ours[key].shape[0] == 3 for key in fresh)


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_checkpoint_gets_other_classes_at_every_exit(name, tmp_path):
    model_name, network = OFFICIAL[name]
    shapes = json.loads((DATA / "official_state_dict_keys.json").read_text())[network]
    file = saved(fill(shapes), tmp_path / "official.safetensors")
    overlay = dict(file=str(file))
    whole = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert {fc.out_features for fc in whole.get_classifier()} == {100}
    assert {fc.out_features for fc in model.get_classifier()} == {7}
    fresh = {key for key in model.state_dict() if ".fc." in key}
    ours, theirs = model.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - fresh)


def named_as_by_kalviny(model):
    """The state dict of an MSDNet for CIFAR with the keys that kalviny/MSDNet-PyTorch gives to the same tensors."""
    positions, block, position = [], 0, 1  # of each layer, in the first block behind the stem
    for layer, scales in enumerate(model.scales_after[1:]):
        positions.append((block, position, scales))
        position += 1 + (scales < model.scales_after[layer])  # a transition follows
        if layer + 1 == model.exit_layers[block]:
            block, position = block + 1, 0
    part = dict(conv=0, bn=1)
    named = {}
    for key, value in model.state_dict().items():
        kind, *path = key.split(".")
        if kind == "stem":
            scale, *_, of, name = path
            named[f"blocks.0.0.layers.{scale}.net.{part[of]}.{name}"] = value
        elif kind == "layers":
            block, position, scales = positions[int(path[0])]
            index = scales - 1 - int(path[1])
            if path[2] == "transition":
                named[f"blocks.{block}.{position + 1}.m.{index}.net.{part[path[3]]}.{path[4]}"] = value
            else:
                way = dict(down="conv_down", same="conv_normal")[path[2]]
                place = 3 * int(path[3]) + part[path[4]]
                named[f"blocks.{block}.{position}.layers.{index}.{way}.net.{place}.{path[5]}"] = value
        elif path[1] == "body":
            named[f"classifier.{path[0]}.m.{path[2]}.net.{part[path[3]]}.{path[4]}"] = value
        else:
            named[f"classifier.{path[0]}.linear.{path[2]}"] = value
    return named


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_kalvinys_msdnet_gives_the_same_logits(prefix, tmp_path):
    model = settled(tiny_msdnet())
    named = {prefix + key: value for key, value in named_as_by_kalviny(model).items()}
    assert len(named) == len(model.state_dict()) and f"{prefix}classifier.2.linear.bias" in named
    checkpoint = dict(epoch=3, arch="msdnet", state_dict=named, best_prec1=71.3, optimizer={})
    overlay = dict(state_dict=named, num_classes=5)
    with torch.no_grad():
        expected = torch.stack(model.forward_exits(images()))
        for again in (
            loaded(tiny_msdnet, saved(checkpoint, tmp_path / "checkpoint_003.pth.tar")),
            loaded(tiny_msdnet, saved(named, tmp_path / "model.safetensors")),
            tiny_msdnet(pretrained=True, pretrained_cfg_overlay=overlay),
        ):
            assert torch.equal(torch.stack(again.eval().forward_exits(images())), expected)


@pytest.mark.parametrize("exits", [2, 9])
def test_a_network_with_other_exits_than_published_gets_other_classes_too(exits, tmp_path):
    knobs = dict(exits=exits, base=3, step=1)
    model = tiny_msdnet(**knobs)
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    again = loaded(tiny_msdnet, file, num_classes=3, **knobs)
    assert [fc.out_features for fc in again.get_classifier()] == [3] * exits


def test_grey_images_take_the_sum_of_the_colour_filters(make, tmp_path):
    model = settled(make())
    again = loaded(make, saved(model.state_dict(), tmp_path / "model.safetensors"), in_chans=1).eval()
    assert again.in_chans == 1
    grey = images(channels=1)
    with torch.no_grad():
        expected = torch.stack(model.forward_exits(grey.expand(-1, 3, -1, -1)))
        assert torch.allclose(torch.stack(again.forward_exits(grey)), expected, atol=1e-4)


def test_no_classes_load_as_a_feature_extractor(make, tmp_path):
    model = settled(make())
    again = loaded(make, saved(model.state_dict(), tmp_path / "model.safetensors"), num_classes=0).eval()
    assert all(isinstance(fc, nn.Identity) for fc in again.get_classifier())
    pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    assert torch.equal(again(images()), pooled)


# Weights that are refused, and the messages.


def test_weights_that_lack_a_tensor_are_refused_by_its_name(make, tmp_path):
    state = make().state_dict()
    del state["heads.1.fc.weight"]
    file = saved(state, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(heads\.1\.fc\.weight\)") as error:
        loaded(make, file)
    assert str(file) in str(error.value)


def test_weights_with_an_unknown_tensor_are_refused_by_its_name(make, tmp_path):
    state = dict(make().state_dict(), unexpected=torch.zeros(1))
    with pytest.raises(ValueError, match=r"1 unknown \(unexpected\)"):
        loaded(make, saved(state, tmp_path / "strange.safetensors"))


def test_a_missing_tensor_is_refused_with_other_classes_too(make, tmp_path):
    state = make().state_dict()
    first = next(iter(state))
    del state[first]
    with pytest.raises(ValueError, match=first):
        loaded(make, saved(state, tmp_path / "short.safetensors"), num_classes=3)


@pytest.mark.parametrize(("there", "here"), [(4, 3), (2, 3)])
def test_weights_of_other_exits_are_refused_with_the_remedy(there, here, tmp_path):
    file = saved(tiny_msdnet(exits=there).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"heads\.|layers\.") as error:
        loaded(tiny_msdnet, file, exits=here)
    assert "exits" in str(error.value) and str(file) in str(error.value)


def test_weights_of_other_widths_are_refused(tmp_path):
    file = saved(tiny_vgg(widths=(6, 10)).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"size mismatch.*stages\.1") as error:
        loaded(tiny_vgg, file)
    assert str(file) in str(error.value)


def test_weights_of_a_plain_timm_model_are_refused(tmp_path):
    file = saved(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"missing.*unknown"):
        loaded(tiny_vgg, file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 7, 0.5])
def test_a_truncated_file_is_refused_by_its_name(suffix, kept, tmp_path):
    file = saved(tiny_vgg().state_dict(), tmp_path / f"cut{suffix}")
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match="Cannot load") as error:
        loaded(tiny_vgg, file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_something_else_is_refused_by_its_name(suffix, tmp_path):
    file = tmp_path / f"page{suffix}"
    file.write_text("<!DOCTYPE html><html><body>404: not found</body></html>" * 20)
    with pytest.raises(ValueError, match="Cannot load") as error:
        loaded(tiny_vgg, file)
    assert str(file) in str(error.value)


class Attack:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("place", ["file", "args"])
def test_a_pickle_that_runs_commands_is_refused_and_not_run(place, tmp_path):
    trace = tmp_path / "was_here"
    attack = Attack(trace)
    content = attack if place == "file" else dict(state_dict=tiny_vgg().state_dict(), args=attack)
    file = saved(content, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="tensors only") as error:
        loaded(tiny_vgg, file)
    assert str(file) in str(error.value)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # the attack works where the file is unpickled


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_does_not_exist_is_not_found_by_its_path(suffix, tmp_path):
    file = tmp_path / f"nowhere{suffix}"
    with pytest.raises(FileNotFoundError) as error:
        loaded(tiny_vgg, file)
    assert str(file) in str(error.value)


def test_a_model_without_trained_weights_is_refused_with_ways_to_get_some():
    with pytest.raises(ValueError, match="no trained weights for dfs_vgg16_imagenet") as error:
        timm.create_model("dfs_vgg16_imagenet", pretrained=True, device="meta")
    assert "train.py" in str(error.value) and "pretrained=False" in str(error.value)
    assert "dfs_vgg16_imagenet" not in timm.list_pretrained("dfs_*")


# Presets.


def test_presets_that_are_given_are_kept(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(presets=PRESETS)
    assert model.presets == PRESETS


def test_given_presets_for_other_exits_are_refused_by_name(make):
    with pytest.raises(ValueError, match=r"'short'.* 2 thresholds.* 3 exits"):
        make(presets=dict(short=dict(thresholds=[0.5, 0.0])))


@pytest.mark.parametrize("preset", [1, {}, dict(thresholds=0.5), dict(thresholds=[0.5] * 3, confidence="foo")], ids=str)
def test_a_malformed_preset_is_refused_by_name(preset):
    with pytest.raises(ValueError, match="Preset 'odd'"):
        tiny_vgg(presets=dict(odd=preset))


def test_a_fine_tuned_checkpoint_keeps_its_classifiers(make, tmp_path):
    model = make(num_classes=7)
    again = loaded(make, saved(model.state_dict(), tmp_path / "seven.safetensors"), num_classes=7)
    assert equal_states(again, model)


@pytest.mark.parametrize("content", [b"hello world\n", b"a", b"rb", b"q\0", b""], ids=repr)
def test_a_file_that_is_no_checkpoint_is_refused_by_its_name(content, tmp_path):
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"Cannot load .*odd\.pth"):
        loaded(tiny_vgg, tmp_path / "odd.pth")


def test_a_models_presets_are_its_own(make):
    given = dict(PRESETS)
    model = make(presets=given)
    given.clear()
    assert model.presets == PRESETS


@pytest.mark.parametrize(
    "change",
    [dict(num_classes=10), dict(referencing="off"), dict(global_pool="max"), dict(in_chans=1), dict(chain=0.5)],
    ids=str,
)
def test_presets_that_came_with_weights_are_dropped_with_a_warning_where_they_do_not_fit(change):
    assert timm.create_model("dfs_msdnet_cifar100", pretrained=True).presets
    with pytest.warns(UserWarning, match=f"Dropped the presets .*balanced.*{next(iter(change))}"):
        assert timm.create_model("dfs_msdnet_cifar100", pretrained=True, **change).presets == {}


@pytest.mark.parametrize(
    "kept", [dict(num_classes=100), dict(global_pool="avg"), dict(beta=0.25), dict(drop_rate=0.3)], ids=str
)
def test_presets_are_kept_where_no_logits_change(kept):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timm.create_model("dfs_msdnet_cifar100", pretrained=True, **kept).presets


def test_presets_that_came_with_weights_go_when_other_weights_are_loaded():
    model = timm.create_model("dfs_msdnet_cifar100", pretrained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())
    presets = model.presets
    with pytest.warns(UserWarning, match="Dropped the presets .*weights they were fitted to were replaced"):
        model.load_state_dict(timm.create_model("dfs_msdnet_cifar100.joint", pretrained=True).state_dict())
    assert model.presets == {}
    other = timm.create_model("dfs_msdnet_cifar100", pretrained=True)
    statistics = {key: 2 * value if "running_var" in key else value for key, value in other.state_dict().items()}
    with pytest.warns(UserWarning, match="Dropped the presets"):
        other.load_state_dict(statistics)
    given = timm.create_model("dfs_msdnet_cifar100", presets=presets)
    given.load_state_dict(model.state_dict())
    assert given.presets == presets, "presets that the caller gave are not the weights'"


def test_presets_that_came_with_weights_go_when_these_are_trained_further(tmp_path):
    model = timm.create_model("dfs_msdnet_cifar100", pretrained=True)
    mine = dict(thresholds=torch.full((model.num_exits,), 0.5))
    model.presets["mine"] = mine
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    timm_dfs.ExitsLoss(torch.nn.CrossEntropyLoss())(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="Dropped the presets .*balanced.* trained further; fit_presets fits new ones"):
        save_for_hf(model, tmp_path, safe_serialization=True)
    assert [*model.presets] == ["mine"], "presets that the caller set are the caller's"
    assert [*json.loads((tmp_path / "config.json").read_text())["model_args"]["presets"]] == ["mine"]
    with pytest.raises(ValueError, match="no preset 'balanced'"):
        timm_dfs.predict(model, torch.zeros(1, 3, 32, 32), "balanced")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["dfs_msdnet_cifar100", "dfs_tf_efficientnet_lite0.cifar100"])
def test_presets_survive_a_conversion_to_another_precision_and_fusing(name, dtype):
    model = timm.create_model(name, pretrained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timm_dfs.fuse(model).presets == copy.deepcopy(model).to(dtype).presets == model.presets != {}


def test_what_timm_itself_publishes_keeps_settings_and_presets(make, tmp_path):
    model = make(beta="joint", referencing="one_sided", presets=PRESETS, pretrained_cfg_overlay=dict(num_classes=5))
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (again.beta, again.referencing, again.presets) == ("joint", "one_sided", PRESETS)
    assert equal_states(again, model)


# Packaged weights.


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder with a published tiny VGG in its hub: (the network, the weights' file)."""
    monkeypatch.setattr(packaged, "_PACKAGE", tmp_path)
    folder = tmp_path / "pretrained" / "weights" / "dfs_vgg7_cifar100"
    folder.mkdir(parents=True)
    model = settled(tiny_vgg())
    args = dict(depths=[1, 2], widths=[6, 8], num_classes=5, beta="joint", presets=PRESETS)
    (folder / "config.json").write_text(json.dumps(dict(architecture="dfs_vgg7_cifar100", model_args=args)))
    return model, saved(model.state_dict(), folder / "model.safetensors")


def test_packaged_weights_load_with_their_own_settings(package):
    model, file = package
    overlay = dict(file=str(file), num_classes=5)
    again = timm.create_model("dfs_vgg7_cifar100", pretrained=True, pretrained_cfg_overlay=overlay)
    assert equal_states(again, model)
    assert again.beta == "joint" and again.presets == PRESETS


def test_the_callers_settings_win_over_the_packaged_ones(package):
    _, file = package
    overlay = dict(file=str(file), num_classes=5)
    again = timm.create_model("dfs_vgg7_cifar100", pretrained=True, pretrained_cfg_overlay=overlay, beta=0.25)
    assert again.beta == 0.25 and again.presets == PRESETS
    with pytest.warns(UserWarning, match="Dropped the presets fast"):
        again = timm.create_model("dfs_vgg7_cifar100", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert again.num_classes == 3 and again.presets == {}


def test_models_with_packaged_weights_are_listed_with_them(package):
    cfgs = pretrained_cfgs({name: dict(num_classes=5) for name in ("dfs_vgg7_cifar100", "dfs_vgg16_imagenet")})
    assert cfgs["dfs_vgg7_cifar100"].default.file == str(package[1])
    assert cfgs["dfs_vgg16_imagenet"].default.file is None


def test_other_packaged_weights_of_a_model_are_its_pretrained_tags(package):
    model, file = package
    for name, beta in dict(joint="joint", half=0.5).items():
        folder = file.parent.with_name(f"dfs_vgg7_cifar100.{name}")
        shutil.copytree(file.parent, folder)
        config = json.loads((folder / "config.json").read_text())
        config["model_args"]["beta"] = beta
        (folder / "config.json").write_text(json.dumps(config))
    cfgs = pretrained_cfgs({"dfs_vgg7_cifar100": dict(num_classes=5)})["dfs_vgg7_cifar100"]
    assert list(cfgs.tags) == ["", "half", "joint"] and cfgs.default.file == str(file)
    for tag, beta in dict(joint="joint", half=0.5).items():
        cfg = replace(cfgs.cfgs[tag], tag=tag)  # as registering does
        again = timm.create_model("dfs_vgg7_cifar100", pretrained=True, pretrained_cfg=cfg)
        assert equal_states(again, model) and again.beta == beta and hub.full_name(again) == f"dfs_vgg7_cifar100.{tag}"


def test_a_folder_without_its_config_is_no_packaged_model(package):
    _, file = package
    assert packaged.packaged_folder("dfs_vgg7_cifar100") == file.parent
    (file.parent / "config.json").unlink()
    assert packaged.packaged_folder("dfs_vgg7_cifar100") is None


# timm's other sources.


@pytest.fixture
def folder(tmp_path):
    """A folder as timm publishes one, with a tiny VGG: (the network, its name for timm)."""
    model = settled(tiny_vgg(beta=0.75, presets=PRESETS, pretrained_cfg_overlay=dict(num_classes=5)))
    args = dict(depths=[1, 2], widths=[6, 8], beta=0.75, presets=PRESETS)
    timm.models.save_for_hf(model, tmp_path, model_args=args)
    return model, f"local-dir:{tmp_path}"


def test_a_published_folder_comes_back_with_its_settings(folder):
    model, name = folder
    again = timm.create_model(name, pretrained=True)
    assert equal_states(again, model)
    assert again.beta == 0.75 and again.presets == PRESETS and again.num_classes == 5


def test_a_published_folder_takes_other_settings_too(folder):
    _, name = folder
    assert timm.create_model(name, pretrained=True, beta=0.25).beta == 0.25
    assert timm.create_model(name, pretrained=True, beta="joint").beta == "joint"
    with pytest.warns(UserWarning, match="Dropped the presets fast"):
        again = timm.create_model(name, pretrained=True, num_classes=3)
    assert {fc.out_features for fc in again.get_classifier()} == {3}


def test_features_only_loads_weights_too(make, tmp_path):
    model = settled(make())
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    features = loaded(make, file, features_only=True, out_indices=(0, 1, 2)).eval()
    loaded_state, state = features.body.state_dict(), model.state_dict()
    backbone = [key for key in loaded_state if not key.startswith("heads.")]
    assert {key for key in state if not key.startswith("heads.")} == set(backbone)
    assert all(torch.equal(loaded_state[key], state[key]) for key in backbone)


@pytest.mark.parametrize(("name", "exits"), [("dfs_msdnet_imagenet", 5), ("dfs_vgg16_imagenet", 13)])
def test_presets_come_back_where_the_architecture_sets_the_number_of_exits(name, exits, tmp_path):
    widths = dict(stem_width=4, growth_rate=4) if "msdnet" in name else dict(widths=(4,) * 5)
    model = timm.create_model(name, num_classes=3, **widths)
    assert model.num_exits == exits
    model.presets = {"fast": dict(thresholds=[0.5] * (exits - 1) + [0.0])}
    write_presets(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path}/saved", pretrained=True)
    assert again.presets == model.presets and again.num_exits == exits
