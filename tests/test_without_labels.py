"""The page about exits without labels says what was measured."""

import json
import sys
from pathlib import Path

import pytest

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
