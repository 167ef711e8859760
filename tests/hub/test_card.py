"""Cards are generated from results and templates only, state the measurements, and are up to date."""

import json
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
import yaml
from helpers import ROOT
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from timm_dfs.cli import app
from timm_dfs.hub import card, curve
from timm_dfs.hub import folder as hub
from timm_dfs.hub.both_parts import both_parts

SHIPPED = [folder.name for folder in card.model_folders(ROOT / "hub")]


def results(name):
    return json.loads((ROOT / "hub" / name / hub.RESULTS_FILE).read_text())


@pytest.fixture
def folder(tmp_path):
    """A copy of a published folder without its weights, in a checkout of its own."""
    copy = tmp_path / "hub" / SHIPPED[0]
    shutil.copytree(ROOT / "hub" / SHIPPED[0], copy, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(ROOT / card.FAMILY_CARD_FILE, tmp_path)
    return copy


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def metadata_of(text):
    return yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_beside_the_results_is_what_they_make_byte_for_byte(name):
    for file, text in card.generated(ROOT / "hub" / name).items():
        assert (ROOT / "hub" / name / file).read_bytes() == text.encode(), f"run: timm-dfs card {name}"


def test_the_familys_card_is_what_the_results_make_byte_for_byte():
    text = card.family_card(ROOT / "hub")
    assert (ROOT / card.FAMILY_CARD_FILE).read_bytes() == text.encode(), "run: timm-dfs card MODEL"
    assert all(name in text for name in SHIPPED)


def test_the_command_writes_the_card_the_curve_and_the_familys_card_and_nothing_else(folder):
    before = {file: file.read_bytes() for file in folder.parent.parent.rglob("*") if file.is_file()}

    def change(results):
        results["held_out"]["top1"][0] = results["test"]["top1"][0] = 12.34

    edit(folder / hub.RESULTS_FILE, change)
    assert card.stale(folder) == [hub.CARD_FILE, hub.CURVE_FILE]
    run = CliRunner().invoke(app, ["card", str(folder)])
    assert run.exit_code == 0, run.output
    assert card.stale(folder) == []
    changed = {file.name for file, content in before.items() if file.read_bytes() != content}
    assert changed == {hub.CARD_FILE, hub.CURVE_FILE, hub.RESULTS_FILE, card.FAMILY_CARD_FILE}
    for file in (folder / hub.CARD_FILE, folder.parent.parent / card.FAMILY_CARD_FILE):
        assert "12.34" in file.read_text()


def test_a_model_without_results_gets_one_line(tmp_path):
    run = CliRunner().invoke(app, ["card", str(tmp_path)])
    assert run.exit_code == 2 and "results.json" in run.stderr and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", SHIPPED)
def test_the_metadata_has_what_the_hub_reads_and_one_result_per_exit(name):
    measured = results(name)
    data = metadata_of(card.card(ROOT / "hub" / name))
    assert data["library_name"] == "timm" and data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0" and data["datasets"] == [measured["dataset"]]
    (index,) = data["model-index"]
    assert index["name"] == name
    top1 = [result["metrics"][0]["value"] for result in index["results"]]
    assert top1 == [round(value, 2) for value in (both_parts(measured) or measured["test"])["top1"]]


@pytest.mark.parametrize("name", SHIPPED)
def test_huggingface_hubs_own_reader_takes_the_metadata_and_loses_nothing(name):
    loaded = ModelCard.load(ROOT / "hub" / name / hub.CARD_FILE, ignore_metadata_errors=False)
    values = [result.metric_value for result in loaded.data.eval_results if result.metric_name == "top-1"]
    measured = results(name)
    assert values == [round(value, 2) for value in (both_parts(measured) or measured["test"])["top1"]]


def test_parts_of_one_split_are_said_and_exits_are_given_for_both(folder):
    def change(results):
        for half, samples, top1 in (("held_out", 6000, 50.0), ("test", 4000, 60.0)):
            results[half].update(samples=samples, top1=[top1] * 7)

    edit(folder / hub.RESULTS_FILE, change)
    text = card.card(folder)
    assert "on another part of that split, `test[:5000]`" in text
    assert "| exit | top-1 of both, 10,000 images, % | top-1, % |" in text
    assert metadata_of(text)["model-index"][0]["results"][0]["dataset"]["split"] == "test[:5000]+test[5000:]"
    assert "| 3 | 54.00 | 60.00 |" in text
    edit(folder / hub.RESULTS_FILE, lambda results: results["held_out"].update(split="train[45000:]"))
    text = card.card(folder)
    assert "another part" not in text and "of both" not in text and "| 3 | 60.00 |" in text


def test_a_twins_card_names_its_base_model(folder):
    edit(folder / hub.RESULTS_FILE, lambda results: results.update(base_model="timm/resnet18.a1_in1k"))
    text = card.card(folder)
    assert metadata_of(text)["base_model"] == "timm/resnet18.a1_in1k"
    assert "started from the weights of `timm/resnet18.a1_in1k`" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_states_the_training_and_the_accuracy_of_each_exit(name):
    text = card.card(ROOT / "hub" / name)
    measured = results(name)
    phases = [phase["epochs"] for phase in (*measured["training"].get("earlier_phases", ()), measured["training"])]
    assert f"Trained for {' + '.join(map(str, phases))} epochs" in text
    for top1 in measured["test"]["top1"]:
        assert re.search(rf"\| {top1:.2f} \|", text)


def test_the_example_imports_the_plugin_before_it_creates_a_model():
    text = card.card(ROOT / "hub" / SHIPPED[0])
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert block.startswith("import timm_dfs")
    compile(block, "card", "exec")


def test_a_card_shows_whatever_a_preset_records(folder):
    def enrich(config):
        config["model_args"]["presets"] = {
            "careful": dict(thresholds=[0.5, None, 0.0], temperatures=[1.25, 1.5], risk=dict(bound=0.05, delta=0.1)),
            "cheap": dict(thresholds=[0.1, 0.1, 0.0], split="validation", average_flops=12.3e6, accuracy=45.67),
        }

    edit(folder / "config.json", enrich)
    text = card.card(folder)
    assert "`careful`: thresholds 0.5, never, 0; temperatures 1.25, 1.5; risk bound 0.05; delta 0.1" in text
    assert "split validation; average flops 12.3 M; accuracy 45.67" in text
    assert "| `careful` | not measured |" in text


@pytest.mark.parametrize(
    ("hours", "words"), [(0.5, "; 30.0 minutes of wall-clock time"), (2.25, "; 2.2 hours of wall-clock time")]
)
def test_a_card_gives_the_time_in_a_unit_that_fits(folder, hours, words):
    edit(folder / hub.RESULTS_FILE, lambda results: results["training"].update(hours=hours))
    assert words in card.card(folder)


def test_a_card_states_what_a_preset_loses_against_the_last_exit_on_the_test_split(folder):
    def change(results):
        results["test"]["top1"][-1] = 60.0
        results["test"]["presets"]["fast"]["top1"] = 58.75

    edit(folder / hub.RESULTS_FILE, change)
    assert "| `fast` | 58.75 | -1.25 ± " in card.card(folder)


def test_figures_of_a_policy_with_an_ensemble_are_not_those_of_the_same_thresholds_without(folder):
    edit(folder / hub.RESULTS_FILE, lambda found: found["test"]["presets"]["fast"].update(ensemble="mean"))
    assert "| `fast` | not measured |" in card.card(folder)
    edit(folder / hub.CONFIG_FILE, lambda config: config["model_args"]["presets"]["fast"].update(ensemble="mean"))
    assert "| `fast` | not measured |" not in card.card(folder)


def test_the_family_card_shows_the_last_exit_on_the_images_of_the_presets():
    point = next(
        line
        for line in card.family_card(ROOT / "hub").splitlines()
        if line.startswith("| dfs_msdnet_cifar100.joint | `fast`")
    )
    measured = results("dfs_msdnet_cifar100.joint")["test"]
    of_point, of_last = measured["presets"]["fast"]["top1"], measured["top1"][-1]
    assert f"| `fast` | {measured['samples']:,} | {of_point:.2f} | {of_last:.2f} |" in point


def test_a_card_shows_no_figures_of_thresholds_that_were_fitted_anew(folder):
    def fit_anew(config):
        config["model_args"]["presets"]["fast"]["thresholds"][0] += 0.01

    before = card.card(folder)
    assert "not measured" not in before and "local-dir:" not in before
    edit(folder / hub.CONFIG_FILE, fit_anew)
    after = card.card(folder)
    assert "| `fast` | not measured |" in after and after.count("not measured") == 1
    assert "local-dir:" in after  # the weights' name alone would load other presets
    assert "No licence is recorded" not in after and card.metadata(folder)["license"] == "apache-2.0"
    triangles = [
        curve.draw(card._read(folder)[0]).count('class="preset"'),
        len(results(folder.name)["test"]["presets"]),
    ]
    assert triangles[0] == triangles[1] - 1


def test_a_card_gives_the_batch_size_beside_the_rate_and_versions_without_a_machine(folder):
    edit(folder / hub.RESULTS_FILE, lambda results: results["training"].pop("measured_on"))
    text = card.card(folder)
    assert "| `batch_size` | 500 |\n" in text and "\n- measured on torch " in text


def test_a_card_without_presets_or_training_record_is_whole_too(folder):
    edit(folder / "config.json", lambda config: config["model_args"].pop("presets"))

    def bare(results):
        for key in ("training", "held_out", "largest_losses"):
            results.pop(key, None)
        del results["test"]["presets"], results["test"]["budgeted_batch"]

    edit(folder / hub.RESULTS_FILE, bare)
    text = card.card(folder)
    assert "Operating points" not in text and "ExitPolicy" in text and "## Citation" in text
    ET.fromstring(curve.draw(json.loads((folder / hub.RESULTS_FILE).read_text())))


def test_a_card_of_other_data_does_not_speak_of_cifar(folder):
    for file in (hub.RESULTS_FILE, "config.json"):
        (folder / file).write_text((folder / file).read_text().replace("uoft-cs/cifar100", "other/data"))
    training = results(SHIPPED[0])["training"]
    text = card.card(folder)
    for of_the_run in (SHIPPED[0], training["recipe"], f"| `aa` | {training['settings']['aa']} |"):
        text = text.replace(of_the_run, "")
    assert "other/data" in text and "cifar" not in text.lower() and "The paper uses" not in text


@pytest.mark.parametrize("name", SHIPPED)
def test_the_curve_has_a_dot_for_each_exit_and_a_mark_for_each_preset(name):
    drawn = ET.fromstring(curve.draw(results(name)))
    kinds = [element.get("class") for element in drawn]
    assert kinds.count("exit") == len(results(name)["flops"])
    assert kinds.count("preset") == len(results(name)["test"]["presets"])
    (line,) = [element for element in drawn if element.get("class") == "curve"]
    assert len(line.get("points").split()) == len(results(name)["test"]["budgeted_batch"])
    for element in drawn:
        if element.get("class") == "exit":
            assert 0 < float(element.get("cx")) < 640 and 0 < float(element.get("cy")) < 400


def test_a_text_in_the_curve_is_escaped():
    drawn = dict(results(SHIPPED[0]), model="<b>&")
    assert "<b>&: top-1" in "".join(ET.fromstring(curve.draw(drawn)).itertext())
