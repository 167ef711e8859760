"""A misspelt keyword argument is refused with the right name, and no argument of a timm model counts as one."""

import inspect
import sys

import pytest
import timm
from helpers import backbone, tiny_msdnet

import timm_dfs
from timm_dfs.base.arguments import check_names
from timm_dfs.models.dfs_twins import _NOT_OF_BASES


@pytest.mark.parametrize(
    "create",
    [
        tiny_msdnet,
        lambda **kwargs: timm.create_model("dfs_test_resnet", **kwargs),
        lambda **kwargs: timm_dfs.MultiExit(backbone(), **kwargs),
    ],
    ids=["native", "twin", "wrapped"],
)
@pytest.mark.parametrize("wrong, right", [("exit", "exits"), ("betas", "beta"), ("distil_weight", "distill_weight")])
def test_a_misspelt_argument_is_refused_with_the_right_name(create, wrong, right):
    with pytest.raises(TypeError, match=f"no argument '{wrong}'; did you mean '{right}'"):
        create(**{wrong: 0.5})


def test_a_number_of_exits_is_called_exits():
    with pytest.raises(TypeError, match="did you mean 'exits'"):
        timm_dfs.MultiExit(backbone(), num_exits=3)


def arguments_of_timm():
    """Names of the parameters of all classes and functions that define timm's models."""
    members = [
        member
        for name, module in sys.modules.items()
        if name.startswith("timm.models.")
        for member in vars(module).values()
        if inspect.isclass(member) or inspect.isfunction(member)
    ]
    return {
        name
        for member in members
        for name in inspect.signature(member.__init__ if inspect.isclass(member) else member).parameters
    }


def test_no_argument_of_a_timm_model_is_taken_for_a_misspelling():
    names = arguments_of_timm()
    assert {"img_size", "num_heads", "drop_rate"} < names
    check_names("a twin", names, _NOT_OF_BASES)
