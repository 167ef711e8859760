"""A preset is accepted or refused alike whether it is given, saved, loaded or published."""

import json
import math
import shutil

import pytest
import timm
from helpers import published, settled, tiny_vgg
from hub_server import Repository, hub_server, use
from timm.models import save_for_hf

from timm_dfs import ExitPolicy, write_presets
from timm_dfs.hub.card import write_card
from timm_dfs.hub.folder import write_weights
from timm_dfs.hub.publish import check_folder
from timm_dfs.pretrained import packaged

NAME = "dfs_vgg7_cifar100"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return published(tmp_path_factory.mktemp("hub") / NAME, settled(tiny_vgg()))


class Route:
    """A copy of a published folder, and a temporary folder, for one way of giving a preset to a model."""

    def __init__(self, shipped, tmp_path, monkeypatch):
        self.folder = shutil.copytree(shipped, tmp_path / "hub" / NAME)
        self.tmp_path, self.monkeypatch = tmp_path, monkeypatch

    def edit(self, preset):
        """Write a preset into the folder's config by hand."""
        config = json.loads((self.folder / "config.json").read_text())
        config["model_args"]["presets"] = dict(mine=preset)
        (self.folder / "config.json").write_text(json.dumps(config))

    def load(self, folder):
        text = (folder / "config.json").read_text()
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
        return timm.create_model(f"local-dir:{folder}", pretrained=True)


def model_with(preset):
    model = settled(tiny_vgg())
    model.presets = dict(mine=preset)
    return model


def given(route, preset):
    return tiny_vgg(presets=dict(mine=preset))


def saved(route, preset):
    write_weights(model_with(preset), route.tmp_path / "saved")
    return route.load(route.tmp_path / "saved")


def saved_by_timm(route, preset):
    save_for_hf(model_with(preset), route.tmp_path / "saved", safe_serialization=True)
    return route.load(route.tmp_path / "saved")


def written_into_a_folder(route, preset):
    model = timm.create_model(f"local-dir:{route.folder}", pretrained=True)
    model.presets = dict(mine=preset)
    write_presets(model, str(route.folder))
    return route.load(route.folder)


def written_into_a_new_folder(route, preset):
    write_presets(model_with(preset), route.tmp_path / "new")
    return route.load(route.tmp_path / "new")


def in_a_folder(route, preset):
    route.edit(preset)
    return timm.create_model(f"local-dir:{route.folder}", pretrained=True)


def in_the_folder_of_the_variable(route, preset):
    route.edit(preset)
    route.monkeypatch.setenv("TIMM_DFS_HUB", str(route.folder.parent))
    return timm.create_model(NAME, pretrained=True)


def packaged_with_the_installation(route, preset):
    route.edit(preset)
    route.monkeypatch.setattr(packaged, "_PACKAGE", route.tmp_path / "timm_dfs")  # a checkout, with hub/ beside it
    overlay = dict(file=str(route.folder / "model.safetensors"))
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)


def on_the_hub(route, preset):
    route.edit(preset)
    with hub_server() as server:
        use(server, route.tmp_path, route.monkeypatch)
        server.repositories["us/vgg"] = Repository(private=False)
        files = {file.name: file.read_bytes() for file in route.folder.iterdir()}
        server.repositories["us/vgg"].commit("main", files, "put")
        return timm.create_model("hf-hub:us/vgg", pretrained=True)


def before_publishing(route, preset):
    route.edit(preset)
    write_card(route.folder)
    return check_folder(route.folder)


ROUTES = [
    given,
    saved,
    saved_by_timm,
    written_into_a_folder,
    written_into_a_new_folder,
    in_a_folder,
    in_the_folder_of_the_variable,
    packaged_with_the_installation,
    on_the_hub,
    before_publishing,
]
SAVED = [saved, saved_by_timm, written_into_a_folder, written_into_a_new_folder]


@pytest.fixture
def taken(request, shipped, tmp_path, monkeypatch):
    return lambda by, preset: by(Route(shipped, tmp_path, monkeypatch), preset)


@pytest.mark.parametrize("route", ROUTES)
def test_a_preset_by_patience_counts_exits(route, taken):
    preset = dict(thresholds=[None, 1, 0.0], confidence="patience")
    assert taken(route, preset).presets == dict(mine=preset)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("preset", "words"),
    [
        (dict(thresholds=[0.5, 7, 0.0]), r"Preset 'mine'.*threshold 7, but max_prob is in \[0, 1\]"),
        (dict(thresholds=[0.5, -0.25, 0.0]), r"Preset 'mine'.*threshold -0\.25"),
        (dict(thresholds=[2, 3, 0], confidence="patience"), r"threshold 3, but patience is in \[0, 2\]"),
        (dict(thresholds=[0.5, 0.0]), "2 thresholds"),
        (dict(thresholds=[0.5, 0.5, 0.0], accuracy=math.inf), "accuracy is inf|cannot be written as JSON"),
    ],
    ids=["above", "below", "patience", "exits", "infinite"],
)
def test_a_preset_that_no_confidence_reaches_is_refused(route, preset, words, taken):
    with pytest.raises(ValueError, match=words):
        taken(route, preset)


@pytest.mark.parametrize("route", ROUTES)
def test_an_infinite_threshold_means_never_and_is_saved_as_null(route, taken):
    presets = taken(route, dict(thresholds=[0.5, math.inf, 0.0])).presets
    assert ExitPolicy.from_preset(presets["mine"]).thresholds == (0.5, math.inf, 0.0)
    if route in SAVED:
        assert presets["mine"]["thresholds"] == [0.5, None, 0.0]


@pytest.mark.parametrize("route", SAVED)
def test_a_field_that_json_cannot_hold_is_refused_when_saved(route, taken):
    with pytest.raises(ValueError, match=r"Preset 'mine' cannot be written as JSON.*nan"):
        taken(route, dict(thresholds=[0.5, 0.5, 0.0], note=math.nan))


def test_a_last_exit_with_a_new_classifier_cannot_be_frozen(shipped):
    model = tiny_vgg()
    frozen = dict(train_backbone=False, loss_weights=[1] * (model.num_exits - 1) + [0])
    weights = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(shipped / "model.safetensors")))
    kept = tiny_vgg(**weights, **frozen)
    assert kept.objective.freezes_last_exit and kept.num_classes == model.num_classes
    with pytest.raises(ValueError, match=f"its classifier is new: the weights have {model.num_classes} classes"):
        timm.create_model(f"local-dir:{shipped}", pretrained=True, num_classes=model.num_classes + 1, **frozen)
    assert timm.create_model(f"local-dir:{shipped}", num_classes=model.num_classes + 1, **frozen)
