"""What ``timm.create_model`` is taught: ``beta=None``, and to check what it reads from the Hub.

timm drops keyword arguments that are None before it calls an entrypoint, so ``beta=None``, joint training,
would silently give the default beta. Callers (``train.py`` among them) have often imported ``create_model``
before the plugin, so replacing the name would come too late: the function itself is taught to spell the value.
"""

import inspect
import types
from typing import Any

from timm import models

from ..base.partition import JOINT
from ..pretrained.downloads import fetch

_HUB = ("hf-hub:", "hf_hub:")

_FOREIGN_SOURCES = (*_HUB, "local-dir:")


def spell_joint(model_name: str, kwargs: dict) -> dict:
    """``create_model``'s keyword arguments, an explicit ``beta=None`` for a model of ours spelt :data:`JOINT`."""
    if "beta" in kwargs and kwargs["beta"] is None and model_name.startswith(("dfs_", *_FOREIGN_SOURCES)):
        return dict(kwargs, beta=JOINT)
    return kwargs


def install() -> None:
    """Make ``timm.create_model`` pass ``beta=None`` on. Repeating it is harmless."""
    create_model: Any = models.create_model
    if "_timm_dfs_create" in create_model.__globals__:
        return
    original = types.FunctionType(
        create_model.__code__,
        create_model.__globals__,
        create_model.__name__,
        create_model.__defaults__,
        create_model.__closure__,
    )
    original.__kwdefaults__ = create_model.__kwdefaults__

    def create(model_name, *args, **kwargs):
        if model_name.startswith(_HUB):  # before timm reads it: a damaged config must not stay in the cache
            fetch(model_name.partition(":")[2], "config.json", kwargs.get("cache_dir"))
        return original(model_name, *args, **spell_joint(model_name, kwargs))

    def shim(model_name, *args, **kwargs):
        return _timm_dfs_create(model_name, *args, **kwargs)  # noqa: F821  set in the globals of timm's factory

    signature = inspect.signature(create_model)
    create_model.__globals__["_timm_dfs_create"] = create
    create_model.__code__ = shim.__code__
    create_model.__defaults__ = None
    create_model.__kwdefaults__ = None
    create_model.__signature__ = signature
    create_model.__wrapped__ = original
