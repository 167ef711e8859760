"""Every public name has an example in its docstring. The test run executes them (``--doctest-modules``)."""

import doctest

import pytest

import timm_dfs

WITHOUT = {"models": "a package, whose architectures are created by name"}
"""Public names that need no example, with the reason."""

NAMES = [name for name in timm_dfs.__all__ if name not in WITHOUT]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(timm_dfs, name).__doc__)


def test_only_public_names_are_excused():
    assert set(WITHOUT) <= set(timm_dfs.__all__)


def test_the_test_run_collects_the_package(pytestconfig):
    assert pytestconfig.getoption("doctestmodules") and "timm_dfs" in pytestconfig.getini("testpaths")
