"""The page about exits without labels says what was measured."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import settled, tiny_vgg

import timm_dfs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import without_labels  # noqa: E402


def test_the_page_is_generated_from_the_figures():
    text = (ROOT / without_labels.PAGE).read_text()
    assert text == without_labels.page(ROOT), "run: python benchmarks/without_labels.py"


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_the_page_says_whether_early_exit_pays_on_other_images(tmp_path, share):
    found = json.loads((ROOT / without_labels.FIGURES).read_text())
    found["images"]["others"]["presets"]["accurate"]["average_flops"] = share * found["last_exit_flops"]
    (tmp_path / without_labels.FIGURES).parent.mkdir(parents=True)
    (tmp_path / without_labels.FIGURES).write_text(json.dumps(found))
    assert ("do not pay there" in without_labels.page(tmp_path)) == (share > 1)


@pytest.mark.filterwarnings("ignore:Exits .* are correct no more often than chance")
def test_the_thresholds_of_the_page_bound_the_agreement_with_the_last_exit():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / without_labels.PAGE).read_text(), re.S)
    model = settled(tiny_vgg())
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(1000, 3, 32, 32, generator=generator), torch.zeros(1000, dtype=torch.long))] * 2
    names = dict(timm_dfs=timm_dfs, model=model, loader=loader)
    exec(block, names)
    assert model.presets["drop-2"]["risk"]["max_accuracy_drop"] == 2
    assert model.presets["drop-2"]["fitted_on"]["dataset"] == "the last exit's predictions"


@pytest.mark.parametrize("gain", [-1.0, 1.0])
def test_the_page_says_that_an_early_exit_is_ahead_only_where_one_is(tmp_path, gain):
    found = json.loads((ROOT / without_labels.FIGURES).read_text())
    top1 = found["images"]["alike"]["top1"]
    found["images"]["alike"]["top1"] = [*[top1[-1] + gain] * (len(top1) - 1), top1[-1]]
    (tmp_path / without_labels.FIGURES).parent.mkdir(parents=True)
    (tmp_path / without_labels.FIGURES).write_text(json.dumps(found))
    assert ("even be more\naccurate" in without_labels.page(tmp_path)) == (gain > 0)
