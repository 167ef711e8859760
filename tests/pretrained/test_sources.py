"""Weights from the Hub: what is named is what is loaded, whatever fails; a repository of something else is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from helpers import CLASSES, PRESETS, published, settled, tiny_vgg, twin
from hub_server import FAULTS, Fault, Repository, hub_server, use
from timm.data import resolve_model_data_config

import timm_dfs  # noqa: F401
from timm_dfs.hub.folder import full_name, load, write_weights
from timm_dfs.models import dfs_twins
from timm_dfs.pretrained.sources import resolve

NAME = "dfs_vgg7_cifar100"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return published(tmp_path_factory.mktemp("hub") / NAME)


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server() as server:
        use(server, tmp_path, monkeypatch)
        yield server


def put(server, repo, folder, **files):
    """Make a repository of a folder's files, some of them replaced."""
    contents = {file.name: file.read_bytes() for file in folder.iterdir()} | files
    server.repositories[repo] = Repository(private=False)
    server.repositories[repo].commit("main", {name: data for name, data in contents.items() if data is not None}, "put")


def config(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    return {"config.json": json.dumps(content).encode()}


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.fixture
def model(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


# Sources of weights by name.


@pytest.mark.parametrize("name", ["hf-hub:us/vgg", "hf-hub:us/vgg@main", NAME])
def test_a_model_of_the_hub_comes_with_its_weights_settings_and_presets(name, folder, model, server, monkeypatch):
    put(server, f"us/{NAME}", folder)
    put(server, "us/vgg", folder)
    monkeypatch.setenv("TIMM_DFS_HUB", "us")
    again = timm.create_model(name, pretrained=True)
    assert same(again, model) and again.presets == PRESETS and again.num_classes == CLASSES


def test_the_variable_may_name_a_folder_of_model_folders(folder, model, server, monkeypatch):
    monkeypatch.setenv("TIMM_DFS_HUB", str(folder.parent))
    again = timm.create_model(NAME, pretrained=True)
    assert same(again, model) and again.presets == PRESETS and server.seen == []


def test_a_pretrained_tag_is_looked_for_under_its_own_name(tmp_path, folder, monkeypatch):
    model = settled(tiny_vgg(beta="joint"))
    published(tmp_path / f"{NAME}.joint", model)
    shutil.copytree(folder, tmp_path / NAME)
    monkeypatch.setenv("TIMM_DFS_HUB", str(tmp_path))
    tagged = replace(timm.get_pretrained_cfg(NAME), tag="joint")
    assert timm.create_model(NAME, pretrained=True, pretrained_cfg=tagged).beta == "joint"
    assert timm.create_model(NAME, pretrained=True).beta == 0.5


def test_the_variable_wins_over_packaged_weights_and_loses_to_a_named_file(tmp_path, folder, model, monkeypatch):
    assert timm.create_model("dfs_msdnet_cifar100", pretrained=True).presets
    monkeypatch.setenv("TIMM_DFS_HUB", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"TIMM_DFS_HUB.*unset it"):
        timm.create_model("dfs_msdnet_cifar100", pretrained=True)
    overlay = dict(file=str(folder / "model.safetensors"), num_classes=CLASSES)
    settings = dict(depths=(1, 2), widths=(6, 8), num_classes=CLASSES)
    assert same(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **settings), model)


def test_what_the_registered_config_says_of_tests_does_not_hold_for_weights_that_do_not_say_it(tmp_path, monkeypatch):
    """timm's weights are to be tested at 256 px; the twin's own were trained at 96 px."""
    name = "dfs_mobilenetv4_conv_small_050"
    assert timm.get_pretrained_cfg(name).test_input_size == (3, 256, 256)
    model = settled(timm.create_model(name, num_classes=CLASSES, exits=3))
    model.pretrained_cfg.update(input_size=(3, 96, 96), test_input_size=None, test_crop_pct=None)
    write_weights(model, tmp_path / name)
    monkeypatch.setenv("TIMM_DFS_HUB", str(tmp_path))
    again = timm.create_model(name, pretrained=True)
    assert resolve_model_data_config(again, use_test_size=True)["input_size"] == (3, 96, 96)


@pytest.mark.parametrize(
    "overlay", [dict(input_size=(3, 64, 64)), dict(mean=(0.1, 0.2, 0.3)), dict(crop_pct=0.5)], ids=str
)
def test_presets_are_dropped_where_the_caller_prepares_images_in_another_way(overlay, folder, monkeypatch):
    monkeypatch.setenv("TIMM_DFS_HUB", str(folder.parent))
    own = timm.create_model(NAME, pretrained=True).pretrained_cfg
    same_as_before = {key: own[key] for key in ("input_size", "mean", "std", "crop_pct")}
    assert timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=same_as_before).presets == PRESETS
    with pytest.warns(UserWarning, match=f"Dropped the presets .* another {next(iter(overlay))}"):
        assert timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay).presets == {}


def test_a_repository_named_in_the_pretrained_config_is_used_where_nothing_is_packaged(folder, model, server):
    put(server, "us/vgg", folder)
    again = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id="us/vgg"))
    assert same(again, model) and again.presets == PRESETS


def test_no_registered_model_points_to_a_hub_repository():
    for name in timm.list_models("dfs_*"):
        assert timm.get_pretrained_cfg(name).hf_hub_id is None, name


def test_the_callers_settings_win_over_the_repositorys(folder, server):
    put(server, "us/vgg", folder)
    assert timm.create_model("hf-hub:us/vgg", pretrained=True, beta=0.25).beta == 0.25
    with pytest.warns(UserWarning, match="Dropped the presets fast"):
        assert timm.create_model("hf-hub:us/vgg", pretrained=True, num_classes=3).num_classes == 3


def test_the_callers_config_wins_over_the_repositorys(folder, server, monkeypatch):
    put(server, f"us/{NAME}", folder)
    monkeypatch.setenv("TIMM_DFS_HUB", "us")
    for name in (NAME, f"hf-hub:us/{NAME}"):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3)))
        assert tuple(model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)


# Tags.


@pytest.mark.parametrize(
    ("variant", "given", "name"),
    [
        (NAME, None, NAME),
        (NAME, dict(tag="joint"), f"{NAME}.joint"),
        ("dfs_resnet50", None, "dfs_resnet50"),
        ("dfs_resnet50", "a1_in1k", "dfs_resnet50"),  # timm's default tag, with which it means the same
        ("dfs_resnet50", "a2_in1k", "dfs_resnet50.a2_in1k"),
        ("dfs_resnet50", dict(tag="a2_in1k"), "dfs_resnet50.a2_in1k"),
        ("dfs_resnet50", dict(tag="a1_in1k"), "dfs_resnet50"),
    ],
)
def test_every_architecture_is_looked_for_under_its_name_and_a_tag_that_is_not_the_default(
    variant, given, name, tmp_path, monkeypatch
):
    monkeypatch.setenv("TIMM_DFS_HUB", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"in {tmp_path}/{name};"):
        resolve(variant, given, None, True, lambda args: None)


def test_a_twin_that_was_trained_does_not_claim_the_tag_of_its_bases_weights(tmp_path, monkeypatch):
    model = settled(twin(presets=PRESETS))
    model.pretrained_cfg["tag"] = None
    published(tmp_path / "dfs_test_resnet", model)
    monkeypatch.setenv("TIMM_DFS_HUB", str(tmp_path))
    assert full_name(timm.create_model("dfs_test_resnet", pretrained=True)) == "dfs_test_resnet"


@pytest.mark.parametrize("more", [{}, dict(features_only=True)], ids=["whole", "features"])
@pytest.mark.parametrize("given", ["a2_in1k", dict(tag="a2_in1k")], ids=["as a tag", "as a config"])
def test_a_twin_without_trained_exits_starts_from_its_bases_weights_of_the_same_tag(given, more, monkeypatch):
    class Asked(Exception):
        pass

    def create_model(name, pretrained, **kwargs):
        raise Asked(name, pretrained)

    monkeypatch.setattr(dfs_twins.timm, "create_model", create_model)
    with pytest.raises(Asked) as asked:
        dfs_twins.create_twin("resnet50", True, pretrained_cfg=given, **more)
    assert asked.value.args == ("resnet50.a2_in1k", True)


def test_features_only_of_a_twin_with_trained_exits_is_refused(tmp_path):
    overlay = dict(file=str(tmp_path / "twin.pth"))
    with pytest.raises(ValueError, match=r"not with those from .*twin\.pth.*forward_intermediates"):
        twin(features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)


def named(folder, server, prefix):
    """A model's name with a prefix of timm's, and the model behind it."""
    put(server, "us/vgg", folder)
    return "hf-hub:us/vgg" if prefix == "hf-hub:" else f"local-dir:{folder}"


@pytest.mark.parametrize("prefix", ["hf-hub:", "local-dir:"])
@pytest.mark.parametrize("given", ["file", "state_dict"])
def test_weights_that_the_caller_gives_replace_those_of_a_named_model_and_its_presets(
    prefix, given, folder, model, server, tmp_path
):
    other = tiny_vgg()
    torch.save(other.state_dict(), tmp_path / "other.pth")
    overlay = dict(file=str(tmp_path / "other.pth")) if given == "file" else dict(state_dict=other.state_dict())
    with pytest.warns(UserWarning, match="Dropped the presets .*are not those they were fitted to"):
        made = timm.create_model(named(folder, server, prefix), pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(made, other) and not same(made, model) and not made.presets
    assert made.pretrained_cfg["input_size"] == model.pretrained_cfg["input_size"]


@pytest.mark.parametrize("prefix", ["hf-hub:", "local-dir:"])
def test_presets_that_the_caller_gives_with_the_weights_are_kept(prefix, folder, server, tmp_path):
    other = tiny_vgg()
    torch.save(other.state_dict(), tmp_path / "other.pth")
    presets = {"own": dict(PRESETS[next(iter(PRESETS))])}
    overlay = dict(file=str(tmp_path / "other.pth"))
    made = timm.create_model(
        named(folder, server, prefix), pretrained=True, pretrained_cfg_overlay=overlay, presets=presets
    )
    assert same(made, other) and made.presets == presets


# Twins.


def test_a_twin_comes_from_the_hub_with_its_exits(tmp_path, server, monkeypatch):
    base = settled(twin(presets=PRESETS))
    folder = published(tmp_path / "dfs_test_resnet", base)
    put(server, "us/dfs_test_resnet", folder)
    monkeypatch.setenv("TIMM_DFS_HUB", "us")
    local = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for name in ("hf-hub:us/dfs_test_resnet", "dfs_test_resnet"):
        again = timm.create_model(name, pretrained=True)
        assert same(again, local) and again.presets == PRESETS and again.exit_points == base.exit_points


def test_timms_own_models_load_from_the_hub_as_before(tmp_path, server):
    plain = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(plain, tmp_path / "plain", safe_serialization=True)
    put(server, "them/plain", tmp_path / "plain")
    assert same(timm.create_model("hf-hub:them/plain", pretrained=True), plain)


# Offline.


def test_offline_a_warm_cache_is_enough(folder, model, server, monkeypatch):
    put(server, "us/vgg", folder)
    timm.create_model("hf-hub:us/vgg", pretrained=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.seen.clear()
    assert same(timm.create_model("hf-hub:us/vgg", pretrained=True), model) and server.seen == []


@pytest.mark.parametrize("name", ["hf-hub:us/vgg", NAME])
def test_offline_an_empty_cache_is_an_error_with_remedies(name, server, monkeypatch):
    monkeypatch.setenv("TIMM_DFS_HUB", "us")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"not in the cache.*with a connection.*local-dir"):
        load(name)


# Repositories of something else.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(architecture="resnet18"), f"holds a resnet18, not a {NAME}"),
        (lambda c: c.update(architecture="dfs_resnet18_cifar100"), f"holds a dfs_resnet18_cifar100, not a {NAME}"),
        (lambda c: c.pop("architecture"), "names no architecture"),
        (lambda c: c["model_args"].update(depths=[2, 2]), "4 exits"),
        (lambda c: c["model_args"].update(depths=[2, 2], presets={}), "do not fit"),
        (lambda c: c["model_args"]["presets"]["fast"].update(thresholds=[0.5, 0.0]), "2 thresholds"),
        (lambda c: c["model_args"]["presets"]["fast"].update(thresholds=[0.5, 7, 0.0]), "threshold 7"),
        (lambda c: c["model_args"]["presets"]["fast"].update(thresholds=[0.5, -1, 0.0]), "threshold -1"),
        (lambda c: c["model_args"]["presets"]["fast"].update(confidence="fame"), "fame"),
        (lambda c: c["model_args"].update(checkpoint_path="/etc/passwd"), "only the caller"),
        (lambda c: c["model_args"].update(pretrained_cfg_overlay=dict(file="/x")), "only the caller"),
    ],
)
def test_a_repository_that_is_not_what_it_is_called_is_refused(change, words, folder, server, monkeypatch):
    monkeypatch.setenv("TIMM_DFS_HUB", "squatter")
    put(server, f"squatter/{NAME}", folder, **config(folder, change))
    with pytest.raises(ValueError, match=words):
        timm.create_model(NAME, pretrained=True)


def test_a_config_that_is_not_json_is_refused(folder, server, monkeypatch):
    monkeypatch.setenv("TIMM_DFS_HUB", "squatter")
    put(server, f"squatter/{NAME}", folder, **{"config.json": b"<html>"})
    with pytest.raises(ValueError, match="not JSON"):
        timm.create_model(NAME, pretrained=True)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.pth", "model.pth"])
def test_no_pickle_is_loaded_from_the_hub(file, folder, model, server, tmp_path):
    torch.save(model.state_dict(), tmp_path / "x.bin")
    pickled = {file: (tmp_path / "x.bin").read_bytes(), "model.safetensors": None}
    put(server, "us/vgg", folder, **pickled)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors.*hf_hub_filename"):
        timm.create_model("hf-hub:us/vgg", pretrained=True)
    asked_in_config = config(folder, lambda c: c["pretrained_cfg"].update(hf_hub_filename=file, custom_load="hf"))
    put(server, "us/vgg", folder, **pickled, **asked_in_config)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        timm.create_model("hf-hub:us/vgg", pretrained=True)


class Attack:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_a_pickle_that_is_asked_for_is_read_as_tensors_only(folder, model, server, tmp_path):
    trace = tmp_path / "was_here"
    for name, content in (("good", model.state_dict()), ("evil", dict(state_dict=model.state_dict(), x=Attack(trace)))):
        torch.save(content, tmp_path / f"{name}.bin")
        put(server, f"us/{name}", folder, **{"pytorch_model.bin": (tmp_path / f"{name}.bin").read_bytes()})
    asked = dict(pretrained_cfg_overlay=dict(hf_hub_filename="pytorch_model.bin"))
    assert same(timm.create_model("hf-hub:us/good", pretrained=True, **asked), model)
    with pytest.raises(ValueError, match="tensors only"):
        timm.create_model("hf-hub:us/evil", pretrained=True, **asked)
    assert not trace.exists()


# Faults.

REQUESTS = ("head", "download", "lfs-download")
CASES = [
    (fault, kind)
    for kind in REQUESTS
    for fault in FAULTS
    if kind != "head" or fault not in ("truncated", "checksum", "trickle", "reset")  # it has no body
]


@pytest.mark.parametrize(("fault", "kind"), CASES)
def test_after_a_download_that_failed_a_second_one_succeeds(fault, kind, folder, model, server, record_property):
    put(server, "us/vgg", folder)
    server.faults[kind] = Fault(**vars(FAULTS[fault]))
    try:
        assert same(load("hf-hub:us/vgg"), model)
        outcome = "loaded"
    except (OSError, ValueError) as error:
        outcome = f"{type(error).__name__}: {' '.join(str(error).split())}"
    record_property("outcome", outcome)
    assert (outcome == "loaded") == (fault == "trickle"), outcome
    server.faults.clear()
    again = load("hf-hub:us/vgg")
    assert same(again, model) and again.presets == PRESETS


@pytest.mark.parametrize("fault", ["401", "404", "429", "500"])
def test_with_a_warm_cache_errors_of_the_hub_do_not_matter(fault, folder, model, server):
    put(server, "us/vgg", folder)
    timm.create_model("hf-hub:us/vgg", pretrained=True)
    server.faults["head"] = FAULTS[fault]
    assert same(timm.create_model("hf-hub:us/vgg", pretrained=True), model)


def test_a_connection_that_breaks_once_is_resumed_where_it_broke(folder, model, server):
    put(server, "us/vgg", folder)
    server.faults["lfs-download"] = Fault(reset=True, times=1)
    assert same(timm.create_model("hf-hub:us/vgg", pretrained=True), model)
    assert server.seen.count("lfs-download") == 2


# Damage in the cache.


def damage(repo, old, new):
    """Change the text of a repository's cached config."""
    file = Path(huggingface_hub.hf_hub_download(repo, "config.json"))
    text = file.read_text()
    assert old in text
    file.resolve().write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_config_damaged_in_the_cache_is_refused_and_deleted(pretrained, folder, model, server):
    put(server, "us/vgg", folder)
    timm.create_model("hf-hub:us/vgg", pretrained=True)
    damage("us/vgg", '"beta": 0.5', '"beta": 0.7')
    with pytest.raises(OSError, match=r"config\.json of us/vgg arrived damaged .* was deleted; try again"):
        timm.create_model("hf-hub:us/vgg", pretrained=pretrained)
    assert timm.create_model("hf-hub:us/vgg", pretrained=pretrained).beta == 0.5


def test_a_config_too_damaged_for_timm_to_read_is_never_loaded_and_is_deleted_by_load(folder, model, server):
    put(server, "us/vgg", folder)
    timm.create_model("hf-hub:us/vgg", pretrained=True)
    damage("us/vgg", "{", "z")
    with pytest.raises(json.JSONDecodeError):  # timm reads the file before it calls the entrypoint
        timm.create_model("hf-hub:us/vgg", pretrained=True)
    with pytest.raises(OSError, match=r"arrived damaged .* was deleted; try again"):
        load("hf-hub:us/vgg")
    assert same(timm.create_model("hf-hub:us/vgg", pretrained=True), model)


def test_a_folder_that_is_not_what_it_is_called_is_refused_like_a_repository(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mine")
    changed = config(folder, lambda c: c["model_args"].update(checkpoint_path="/etc/passwd"))
    (tmp_path / "mine" / "config.json").write_bytes(changed["config.json"])
    with pytest.raises(ValueError, match="only the caller"):
        timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
