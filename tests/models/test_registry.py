"""Registering many architectures at once leaves timm's registry as registering each of them does."""

import sys
import types
from collections import defaultdict, deque
from copy import deepcopy

import pytest
from timm.models import DefaultCfg, PretrainedCfg, _registry, register_model

from timm_dfs.models._registry import copied, register_models

MODULE = "made_up_module"

TABLES = {
    "_model_entrypoints": dict,
    "_model_to_module": dict,
    "_module_to_models": lambda: defaultdict(set),
    "_model_default_cfgs": dict,
    "_model_pretrained_cfgs": dict,
    "_model_has_pretrained": set,
    "_model_with_tags": lambda: defaultdict(list),
}

CFGS = {
    "dfs_tagless": DefaultCfg(deque([""]), {"": PretrainedCfg(num_classes=7)}),
    "dfs_packaged": DefaultCfg(deque(["", "b"]), {"": PretrainedCfg(file="a"), "b": PretrainedCfg(file="b")}, True),
    "dfs_tagged": DefaultCfg(deque(["a", "b"]), {"a": PretrainedCfg(), "b": PretrainedCfg(file="b")}, True),
    "dfs_of_default_tag": DefaultCfg(deque(["a", "b"]), {"a": PretrainedCfg(file="a"), "b": PretrainedCfg()}, True),
}


@pytest.fixture
def empty(monkeypatch):
    """Empties timm's registry for the test; returns what does it again."""

    def clear():
        for name, table in TABLES.items():
            monkeypatch.setattr(_registry, name, table())

    clear()
    return clear


def tables():
    """The registry's tables; of the default configs only what timm reads: the names, tags and sources."""
    found = {name: deepcopy(getattr(_registry, name)) for name in TABLES if name != "_model_default_cfgs"}
    found["_model_default_cfgs"] = {
        name: (list(cfg.tags), [cfg.cfgs[tag].file for tag in cfg.tags], cfg.is_pretrained)
        for name, cfg in _registry._model_default_cfgs.items()
    }
    return found


def entrypoint(name):
    def create(pretrained=False, **kwargs):
        raise NotImplementedError

    create.__name__, create.__module__ = name, MODULE
    return create


def test_the_entries_are_those_of_timms_own_registration(empty, monkeypatch):
    module = types.ModuleType(MODULE)
    module.default_cfgs = deepcopy(CFGS)
    monkeypatch.setitem(sys.modules, MODULE, module)
    entrypoints = {name: entrypoint(name) for name in CFGS}
    for function in entrypoints.values():
        register_model(function)
    theirs = tables()
    empty()
    named = {
        name: DefaultCfg(
            cfg.tags,
            {tag: copied(of_tag, architecture=name, tag=tag or None) for tag, of_tag in cfg.cfgs.items()},
            cfg.is_pretrained,
        )
        for name, cfg in CFGS.items()
    }
    register_models(MODULE, entrypoints, named)
    assert tables() == theirs


def test_a_copied_config_is_a_config_of_its_own():
    cfg = PretrainedCfg(url="here", num_classes=3)
    copy = copied(cfg, url=None)
    assert copy == PretrainedCfg(num_classes=3) and cfg.url == "here"
