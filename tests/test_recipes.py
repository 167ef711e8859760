"""Every recipe is something train.py and the models understand, and says in its header what came of it."""

from pathlib import Path

import pytest
import timm
import yaml

import timm_dfs  # noqa: F401  registers the models

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


def test_there_are_recipes():
    assert RECIPES


def test_a_recipe_names_the_plugin_and_a_model_it_can_build(recipe):
    settings = yaml.safe_load(recipe.read_text())
    assert settings["device_modules"] == ["timm_dfs"]
    assert recipe.stem.startswith(settings["model"])
    model = timm.create_model(
        settings["model"],
        num_classes=settings["num_classes"],
        drop_rate=settings["drop"],
        device="meta",
        **settings.get("model_kwargs", {}),
    )
    assert model.num_classes == settings["num_classes"]


def test_a_recipe_says_dropout_and_augmentation_outright(recipe):
    """train.py's defaults for them are not the published values."""
    assert {"drop", "smoothing", "color_jitter", "warmup_epochs"} <= set(yaml.safe_load(recipe.read_text()))


def test_a_recipes_header_names_its_result_or_says_there_is_none(recipe):
    header = recipe.read_text().partition("device_modules")[0]
    assert "results.json" in header or "no result" in header
