"""Every timm architecture keeps the contract with exits, without data; the coverage page is up to date."""

import re

import pytest
from every_architecture import examine, faults, stamp
from helpers import ROOT

from timm_dfs.models.dfs_twins import BASES

PAGE = ROOT / "docs" / "coverage.md"

SHARDS = 32


@pytest.mark.coverage
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_architecture_predicts_at_exits_whose_cost_rises(shard):
    found = {base: faults(examine(base)) for base in BASES[shard::SHARDS]}
    assert {base: wrong for base, wrong in found.items() if wrong} == {}


def test_the_page_is_of_these_exit_points_and_this_timm():
    remedy = "run: python tests/every_architecture.py docs/coverage.md"
    assert stamp() in PAGE.read_text(), (
        f"{PAGE} was made of other exit points or another timm's architectures; {remedy}"
    )


def test_the_page_has_every_architecture():
    rows = re.findall(r"^\| (\S+) \| ", PAGE.read_text().partition("## All")[2], re.MULTILINE)
    assert set(BASES) == set(rows) - {"architecture"}
