"""The README's Python runs, and its picture and table say what is shipped."""

import json
import re
import sys
import xml.etree.ElementTree as ET

import pytest
import timm
from helpers import NATIVE, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import overview

README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    assert code.count("timm_dfs.") > 5
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["prediction"].logits.shape == (8, 100)
    assert names["prediction"].exit_index.shape == (8,)


def test_it_shows_commands():
    assert len(re.findall(r"^timm-dfs \w+", README, re.M)) >= 5  # that they exist, test_docs.py tests


def test_the_table_has_every_model_and_says_which_have_weights():
    rows = dict(re.findall(r"^\| `(dfs_\w+)` \| \d+ \| (.+?) \|", README, re.M))
    assert rows.keys() == NATIVE | {name.partition(".")[0] for name in timm.list_pretrained("dfs_*")}
    trained = set(timm.list_pretrained("dfs_*"))
    for name, weights in rows.items():
        tags = {tag for tag in trained if tag.partition(".")[0] == name}
        assert {name + tag for tag in re.findall(r"`(\.\w+)`", weights)} == {tag for tag in tags if "." in tag}
        assert (weights != "none") == bool(tags)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


# The picture.


def test_the_picture_is_what_the_results_make_byte_for_byte():
    assert f"](docs/{overview.PICTURE})" in README
    made = overview.picture(ROOT)
    assert (ROOT / "docs" / overview.PICTURE).read_bytes() == made.encode(), "run: python benchmarks/overview.py"


@pytest.fixture
def checkout(tmp_path):
    """Results of the shipped models on the picture's data set, without their weights."""
    for file in (ROOT / "hub").glob("*/results.json"):
        if json.loads(file.read_text())["dataset"] != overview.DATASET:
            continue
        folder = tmp_path / "hub" / file.parent.name
        folder.mkdir(parents=True)
        for name in ("results.json", "config.json"):
            (folder / name).write_text((file.parent / name).read_text())
    return tmp_path


def test_the_picture_has_a_curve_its_presets_and_the_last_exit_of_each_model(checkout):
    drawn = [(e.tag.rpartition("}")[2], e.get("class")) for e in ET.fromstring(overview.picture(checkout))]
    folders = list((checkout / "hub").iterdir())
    models = len(folders)
    presets = sum(len(json.loads((folder / "results.json").read_text())["test"]["presets"]) for folder in folders)
    legend = models, 1, 1
    assert drawn.count(("polyline", "curve")) == models + legend[0]
    assert drawn.count(("circle", None)) == presets + legend[1]
    assert drawn.count(("path", "last")) == models + legend[2]


def test_a_more_accurate_preset_is_drawn_higher(checkout):
    file = checkout / "hub" / "dfs_msdnet_cifar100" / "results.json"

    def highest():
        circles = ET.fromstring(overview.picture(checkout)).iter("{http://www.w3.org/2000/svg}circle")
        return min(float(circle.get("cy")) for circle in circles)

    before, results = highest(), json.loads(file.read_text())
    results["test"]["presets"]["fast"]["top1"] = 81.9
    file.write_text(json.dumps(results))
    assert highest() < before


def test_a_model_of_another_data_set_is_not_in_the_picture(checkout):
    file = checkout / "hub" / "dfs_msdnet_cifar100" / "results.json"
    before = overview.picture(checkout)
    file.write_text(json.dumps(dict(json.loads(file.read_text()), dataset="other")))
    assert overview.picture(checkout).count("<polyline") < before.count("<polyline")
