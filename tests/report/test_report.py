"""The report: what it says is what was measured, and the page needs nothing but itself."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from formula_fill import exit_logits
from helpers import CLASSES, settled, tiny_msdnet, tiny_vgg
from PIL import Image
from typer.testing import CliRunner

from timm_dfs import ExitPolicy, anytime_accuracy, budgeted_batch, exit_flops, measure_policy
from timm_dfs.cli import app, report
from timm_dfs.evaluation.bench import LAST_EXIT, Timing
from timm_dfs.hub import folder as hub
from timm_dfs.report import (
    PAGE,
    About,
    draw,
    find,
    published_results,
    render,
    strip,
    training_of,
    where_it_loses,
    write_report,
)
from timm_dfs.report.pictures import data_uri
from timm_dfs.report.theme import NEUTRAL, exit_colours
from timm_dfs.report.without_exits import WithoutExits, networks_without_exits

pytest.importorskip("matplotlib")

SECTIONS = {
    "accuracy-cost", "operating-points", "exit-shares", "losses", "strip", "reliability", "risk-coverage", "latency",
    "about",
}  # fmt: skip
PRESETS = {
    "balanced": dict(thresholds=[0.6, 0.7, 0.0], fitted_on=dict(dataset="made up", split="held out", samples=300)),
    "second only": dict(thresholds=[None, 0.6, 0.0], confidence="margin"),
}


def timing(way, batch_size, speedup=2.0, cost_ratio=2.1):
    tail = (20.0, 30.0) if batch_size == 1 else (None, None)  # fewer batches of the larger size
    return Timing(way, batch_size, 100.0, 10.0, *tail, speedup, cost_ratio, speedup / cost_ratio, 100 // batch_size)


TIMINGS = [
    timing(way, size)
    for size in (1, 64)
    for way in (LAST_EXIT, "exit 0 alone", "exit 1 alone", "balanced", "second only")
]


@pytest.fixture(scope="module")
def data():
    logits, targets = exit_logits(3, 300, 3, CLASSES)
    return (logits[0], targets[0]), (logits[1], targets[1])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = settled(tiny_msdnet(pretrained_cfg_overlay=dict(num_classes=CLASSES)))
    model.presets = PRESETS
    return model


@pytest.fixture(scope="module")
def findings(model, data):
    val, test = data
    return find(model, test, val)


@pytest.fixture(scope="module")
def exit_pictures(model, data, findings):
    pixels = torch.rand(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dataset = list(zip(pixels, data[1][1].tolist()))
    return strip(model, dataset, data[1][0], findings.points["balanced"].policy, "ant bee cat dog eel".split())


@pytest.fixture(scope="module")
def page(findings, exit_pictures):
    drawings = draw(findings, TIMINGS)
    about = About("a <model>", "made up", "the rest", "held out", "3 epochs", 3)
    return render(drawings, findings, about, TIMINGS, "balanced", exit_pictures, ["A note."])


class Elements(HTMLParser):
    """A page's elements with their attributes, its visible text, and whether its tags close in order."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in {"li", "td", "th", "tr"}:
            while self.open and self.open[-1] != tag:
                self.open.pop()
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attrs for found, attrs in self.elements if found == tag]


# What is measured


def test_points_are_what_measure_policy_says_of_what_is_executed(model, data, findings):
    for name, preset in PRESETS.items():
        policy = ExitPolicy.from_preset(preset)
        flops = exit_flops(model, lazy=True, heads=policy.answering)
        assert findings.points[name].measured == measure_policy(policy, data[1], flops)
        assert findings.points[name].published_flops == measure_policy(policy, data[1], exit_flops(model)).average_flops


def test_exits_alone_cost_what_no_other_head_adds_to(model, data, findings):
    assert [alone.accuracy for alone in findings.exits] == anytime_accuracy(*data[1]).tolist()
    for k, alone in enumerate(findings.exits):
        assert alone.flops == exit_flops(model, lazy=True, heads=(k,))[k]
    assert findings.exits[-1].flops == findings.last_exit_flops


def test_the_curve_is_the_published_procedure_with_validation_thresholds(model, data, findings):
    assert list(findings.curve) == budgeted_batch(*data, exit_flops(model, lazy=True))
    assert findings.curve_samples == 300


def test_rescued_and_harmed_make_up_the_difference_to_the_last_exit(findings):
    for point in findings.points.values():
        difference = point.measured.accuracy - point.measured.last_exit_accuracy
        assert point.rescued - point.harmed == pytest.approx(difference)


def test_without_validation_logits_there_is_no_curve(model, data):
    assert find(model, data[1]).curve == ()


def test_samples_that_fixed_thresholds_are_not_measured_on(model, data):
    with pytest.raises(ValueError, match="300 of the 300 test samples are among those"):
        find(model, data[1], data[1])


def test_logits_of_another_network_are_refused(model, data):
    logits, targets = data[1]
    with pytest.raises(ValueError, match="test has 2 exits, the model 3"):
        find(model, (logits[:2], targets))


def test_logits_that_are_not_finite_are_refused(model, data):
    logits = data[1][0].clone()
    logits[1, 7, 0] = float("nan")
    with pytest.raises(ValueError, match="sample 7 at exit 1"):
        find(model, (logits, data[1][1]))


# What was published

COSTS = [56821760, 101584896, 156063744, 198959104, 250505216, 299094016, 341727232]  # of dfs_msdnet_cifar100


def test_published_results_are_of_the_network_with_these_costs_on_this_data_set():
    found = published_results("hfds/uoft-cs/CIFAR-100", 100, COSTS)
    assert found.epochs == 300 and set(found.budgeted_batch_M) == {"DFS", "Meta-GF", "GE", "MSDNet"}
    assert all(len(curve) == 40 for curve in found.budgeted_batch_M.values())
    assert "ECCV 2024" in found.source


@pytest.mark.parametrize(
    ("dataset", "classes", "costs"),
    [
        ("cifar10", 10, COSTS),
        ("cifar100", 20, COSTS),
        ("flowers", 100, COSTS),
        ("hfds/user/cifar100-c", 100, COSTS),
        ("data/cifar100_lt", 100, COSTS),
        ("cifar100", 100, COSTS[:-1]),
        ("cifar100", 100, [*COSTS[:-1], 1.02 * COSTS[-1]]),
    ],
)
def test_nothing_is_published_of_another_network_or_data_set(dataset, classes, costs):
    assert published_results(dataset, classes, costs) is None


def test_published_curves_are_drawn_where_there_are_some(findings):
    published = published_results("cifar100", 100, COSTS)
    with_them = dataclasses.replace(findings, published=published, published_curve=findings.curve)
    drawings = draw(with_them)
    assert "DFS 79.93 %" in drawings["published"].alt and "Meta-GF, published" in drawings["published"].svg
    shown = Elements(render(drawings, with_them, About("m", "cifar100", "test", "held out", "6 epochs", 6)))
    assert "The weights are from a shorter run" in shown.text and published.source in shown.text
    assert {attrs["id"] for attrs in shown.all("section")} == SECTIONS | {"published"}
    assert "published" not in draw(findings)


# Networks without exits


def test_published_networks_without_exits_are_those_of_the_data_set_from_cheap_to_expensive():
    found = networks_without_exits("hfds/uoft-cs/CIFAR-100", 100)
    assert "MobileNetV2 x1.0" in [rival.network for rival in found]
    assert [rival.flops_M for rival in found] == sorted(rival.flops_M for rival in found)
    assert all(0 < rival.top1 < 100 and rival.source for rival in found)
    assert networks_without_exits("user/cifar100-c", 100) == networks_without_exits("data/cifar100_lt", 100) == ()
    assert networks_without_exits("cifar10", 10) == networks_without_exits("cifar100", 20) == ()


def test_each_is_shown_beside_the_best_that_these_weights_reach_within_its_cost(findings):
    costs = [point.measured.average_flops for point in findings.points.values()]
    made_up = [
        WithoutExits("cifar100", 100, name, flops / 1e6, 50.0, "some/where")
        for name, flops in (("cheap net", 1.0), ("costly net", max(costs)))
    ]
    with_them = dataclasses.replace(findings, rivals=tuple(made_up))
    assert with_them.best_within(1.0) is None
    cost, accuracy = with_them.best_within(max(costs))
    assert cost <= max(costs)
    assert accuracy >= max(point.measured.accuracy for point in findings.points.values())
    shown = Elements(render(draw(with_them), with_them, About("m", "cifar100", "test")))
    assert {attrs["id"] for attrs in shown.all("section")} == SECTIONS | {"without-exits"}
    assert "cheap net" in shown.text and "some/where" in shown.text
    assert "2 published networks without exits" in draw(with_them)["accuracy-cost"].alt


# The page


def test_the_page_has_every_section_and_its_tags_close(page):
    elements = Elements(page)
    assert {attrs["id"] for attrs in elements.all("section")} == SECTIONS
    assert elements.open == []


def test_the_page_refers_to_nothing_outside_itself(page):
    for tag, attrs in Elements(page).elements:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attrs)
    assert not re.search(r"@import|url\((?!#)", page)


def test_every_figure_is_there_and_said_in_words(page, findings):
    drawings = draw(findings, TIMINGS)
    assert set(drawings) == {"accuracy-cost", "reliability", "risk-coverage", "exit-shares", "latency"}
    figures = Elements(page).all("figure")
    assert [attrs["role"] for attrs in figures] == ["img"] * 5
    assert {attrs["aria-label"] for attrs in figures} == {drawing.alt for drawing in drawings.values()}
    assert page.count("<svg") == 5


def test_every_image_says_its_class_and_its_prediction(page, exit_pictures):
    alts = [attrs["alt"] for attrs in Elements(page).all("img")]
    assert len(alts) == sum(len(row.pictures) for row in exit_pictures) > 0
    assert all(
        re.fullmatch(r"(ant|bee|cat|dog|eel), predicted (ant|bee|cat|dog|eel) at exit [012]", alt) for alt in alts
    )


def test_no_two_things_of_the_page_have_one_id(page):
    ids = [attrs["id"] for _, attrs in Elements(page).elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert targets and targets <= set(ids)


def test_the_numbers_of_the_page_are_those_measured(page, findings):
    text = Elements(page).text
    for point in findings.points.values():
        assert f"{point.measured.accuracy:.2f}" in text
        assert f"{point.measured.average_flops / 1e6:,.1f}" in text
        assert f"{100 * point.measured.average_flops / findings.last_exit_flops:.0f} %" in text
    for alone in findings.exits:
        assert f"{alone.accuracy:.2f}" in text and f"{alone.calibration_error:.4f}" in text
    assert f"±{1.96 * findings.standard_error:.1f} points" in text and "300 images" in text


def test_the_figures_numbers_are_those_measured(findings):
    drawings = draw(findings, TIMINGS)
    for name, point in findings.points.items():
        shares = ", ".join(f"exit {k} {share:.1%}" for k, share in enumerate(point.measured.exit_shares))
        assert f"{name}: {shares}" in drawings["exit-shares"].alt
        assert f"{name} {point.measured.accuracy:.2f} %" in drawings["accuracy-cost"].alt
    for k, (_, risk) in enumerate(findings.risk_coverage):
        assert f"exit {k} " in drawings["risk-coverage"].alt and f"{risk[-1]:.1%}" in drawings["risk-coverage"].alt


def test_the_page_says_what_it_is_of(page):
    text = Elements(page).text
    for word in ("a <model>", "made up", "the rest", "held out", "3 epochs", "torch", "timm", "UTC", "A note."):
        assert word in text, word
    assert "a <model>" not in page  # escaped


def test_neutral_colours_follow_the_page_and_files_keep_theirs(page, findings):
    drawing = draw(findings)["accuracy-cost"]
    ink = NEUTRAL["ink"][0]
    assert ink in drawing.svg and "var(" not in drawing.svg
    assert ink not in drawing.inline() and "var(--ink)" in drawing.inline()
    assert "prefers-color-scheme: dark" in page and all(dark in page for _, dark in NEUTRAL.values())


def test_exits_have_colours_of_their_own():
    for num_exits in (2, 3, 7, 13):
        assert len(set(exit_colours(num_exits))) == num_exits


def test_without_points_curve_and_times_the_page_says_what_is_missing(findings):
    bare = dataclasses.replace(findings, points={}, curve=(), curve_samples=0)
    elements = Elements(render(draw(bare), bare, About("m", "made up", "test")))
    assert {attrs["id"] for attrs in elements.all("section")} == SECTIONS
    for words in ("timm-dfs calibrate", "--val-split", "Not measured", "nothing is recorded"):
        assert words in elements.text


# Where early exit loses


def test_points_that_are_worse_than_a_network_that_ends_earlier_are_named(findings):
    exits = [dataclasses.replace(alone, accuracy=99.0) for alone in findings.exits]
    said = where_it_loses(dataclasses.replace(findings, exits=tuple(exits)))
    for name in findings.points:
        assert any(sentence.startswith(f"{name} is no better than the network that ends at exit ") for sentence in said)


def test_points_that_lose_accuracy_or_save_nothing_are_named(findings):
    point = findings.points["balanced"]
    worse = dataclasses.replace(point.measured, accuracy=1.0, last_exit_accuracy=3.5, average_flops=1e12)
    points = {"balanced": dataclasses.replace(point, measured=worse, harmed=4.25)}
    said = " ".join(where_it_loses(dataclasses.replace(findings, points=points)))
    for words in (
        "balanced by 2.50 points",
        "balanced 4.25 %",
        "No cheaper on average than the last exit alone: balanced",
    ):
        assert words in said


def test_methods_that_are_slower_than_the_last_exit_or_save_less_time_than_arithmetic_are_named(findings):
    timings = [timing("balanced", 1, 0.8), timing("second only", 1, 1.2), timing("exit 1 alone", 64, 0.9)]
    said = where_it_loses(findings, timings)
    assert "At batch 1 slower than the last exit alone: balanced (0.80 times its images per second)." in said
    assert any(
        "second only is 1.20 times as fast, with 2.10 times fewer multiply-adds" in sentence for sentence in said
    )
    assert any(sentence.startswith("At batch 64 slower") and "exit 1 alone" in sentence for sentence in said)
    assert where_it_loses(findings, [timing("balanced", 1, 2.0)]) == where_it_loses(findings)


def test_exits_that_only_guess_are_named(findings):
    exits = (dataclasses.replace(findings.exits[0], accuracy=20.0), *findings.exits[1:])
    assert any(
        "chance (20 %)" in s and "exit 0." in s for s in where_it_loses(dataclasses.replace(findings, exits=exits))
    )


# Images


def test_the_strip_shows_the_images_that_took_each_exit(data, findings, exit_pictures):
    exits = findings.points["balanced"].exit_index
    assert [row.samples for row in exit_pictures] == torch.bincount(exits, minlength=3).tolist()
    assert all(len(row.pictures) == min(12, row.samples) for row in exit_pictures)
    assert all(
        picture.right == (picture.predicted == picture.truth) for row in exit_pictures for picture in row.pictures
    )


def test_pictures_have_the_class_that_the_exits_predict_together(model, data):
    logits, targets = data[1]
    policy = ExitPolicy([0.6, 0.6, 0.0], ensemble=[[1.0], [5.0, 1.0], [5.0, 1.0, 0.2]])
    dataset = [(torch.zeros(3, 32, 32), target) for target in targets.tolist()]
    rows = strip(model, dataset, logits, policy, "abcde", each=300)
    right = sum(picture.right for row in rows for picture in row.pictures)
    predicted = policy.predicted(logits)[policy.exit_index(logits), torch.arange(300)].argmax(-1)
    alone = logits[policy.exit_index(logits), torch.arange(300)].argmax(-1)
    assert right == (predicted == targets).sum() != (alone == targets).sum()


def test_a_picture_is_the_image_before_it_was_normalised(model):
    cfg = model.pretrained_cfg
    grey = torch.full((3, 32, 32), 0.6)
    normalised = (grey - torch.tensor(cfg["mean"])[:, None, None]) / torch.tensor(cfg["std"])[:, None, None]
    policy = ExitPolicy([0.0, 0.0, 0.0])
    (row, *_) = strip(model, [(normalised, 0)], torch.zeros(3, 1, CLASSES), policy, "abcde")
    picture = Image.open(io.BytesIO(base64.b64decode(row.pictures[0].source.partition(",")[2])))
    assert picture.size == (32, 32) and (np.asarray(picture) == 153).all()


def test_large_images_are_shown_small():
    assert len(data_uri(Image.new("RGB", (500, 300)))) < len(data_uri(Image.effect_noise((500, 300), 90))) < 20000


# Files


def test_a_report_is_a_page_and_every_figure_twice(findings, tmp_path):
    files = write_report(tmp_path / "r", findings, About("m", "made up", "test"), TIMINGS)
    assert files[0].name == PAGE and {file.suffix for file in files[1:]} == {".svg", ".png"} and len(files) == 11
    assert set((tmp_path / "r").iterdir()) == set(files) and [file.name for file in tmp_path.iterdir()] == ["r"]
    for file in files[1:]:
        if file.suffix == ".png":
            assert Image.open(file).width > 500


def test_what_is_there_is_not_overwritten(findings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="there already"):
        write_report(tmp_path, findings, About("m", "made up", "test"))
    with pytest.raises(ValueError, match="no folder"):
        write_report(tmp_path / "a" / "b", findings, About("m", "made up", "test"))


def test_the_working_directory_takes_a_report_and_remains(findings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_report(Path("."), findings, About("m", "made up", "test"))
    assert (Path.cwd() / PAGE).is_file()


def test_an_interrupted_writing_leaves_no_half_report(findings, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("timm_dfs.report.figures.Drawing.write", full)
    with pytest.raises(OSError):
        write_report(tmp_path / "r", findings, About("m", "made up", "test"))
    assert not (tmp_path / "r").exists()


# How the weights were trained


def test_packaged_weights_say_how_they_were_trained():
    words, epochs = training_of("dfs_msdnet_cifar100")
    assert words.startswith(f"{epochs} epochs on ") and "recipe" in words
    assert training_of("dfs_vgg7_cifar100") == ("", None) == training_of("hf-hub:somebody/model")
    assert training_of("dfs_msdnet_cifar100", checkpoint="own.pth") == ("", None)


def test_earlier_phases_of_training_are_counted():
    words, epochs = training_of("dfs_tf_efficientnet_lite0.cifar100_112")
    assert words.startswith("4 + 6 + 6 epochs on ") and epochs == 16


def test_a_runs_folder_need_not_name_its_machine_or_number_of_images(tmp_path):
    (tmp_path / hub.RESULTS_FILE).write_text('{"training": {"epochs": 3, "recipe": "a.yaml"}}')
    assert training_of(f"local-dir:{tmp_path}") == ("3 epochs, recipe a.yaml", 3)


def test_results_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / hub.RESULTS_FILE).write_text('{"training": {"epochs": "many"}}')
    with pytest.raises(ValueError, match=r"results\.json"):
        training_of(f"local-dir:{tmp_path}")


# The command line


def run(*args):
    return CliRunner().invoke(app, ["report", *map(str, args)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, with presets."""
    torch.manual_seed(0)
    model = tiny_vgg(pretrained_cfg_overlay=dict(num_classes=CLASSES))
    source = dict(dataset="elsewhere", split="train", samples=50)
    model.presets = {"fast": dict(thresholds=[0.0, 0.0, 0.0], fitted_on=source)}
    path = tmp_path_factory.mktemp("published") / "model"
    hub.write_weights(settled(model), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set of folders of images: 20 to hold out, 20 to test."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split in ("validation", "test"):
        for label in "abcde":
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                noise = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture
def arguments(folder, pictures, tmp_path):
    sizes = "--model-kwargs", "depths=(1, 2)", "--model-kwargs", "widths=(6, 8)"
    return (f"local-dir:{folder}", "--data-dir", pictures, "--workers", 0, "--output", tmp_path / "r", *sizes)


def test_the_command_measures_and_writes_a_page(arguments, tmp_path):
    result = run(*arguments, "--val-split", "validation", "--seconds", 0.01, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["samples"] == 20 and len(data["curve"]) == 40 and data["split"] == "test"
    assert {row["way"] for row in data["timings"]} == {LAST_EXIT, "exit 0 alone", "exit 1 alone", "fast"}
    assert sum(data["points"]["fast"]["exit_shares"]) == pytest.approx(1)
    page = (tmp_path / "r" / PAGE).read_text()
    elements = Elements(page)
    assert {attrs["id"] for attrs in elements.all("section")} == SECTIONS
    assert f"{data['points']['fast']['accuracy']:.2f}" in elements.text
    assert len(elements.all("img")) == 12  # all left at exit 0
    assert "elsewhere, train: 50 samples" in elements.text
    assert data["files"][0] == str(tmp_path / "r" / PAGE)


@pytest.mark.parametrize("split", ["test", "train"])
def test_thresholds_may_come_from_another_part_of_the_split(split):
    report._check_val_split(f"{split}[:9]", f"{split}[9:]", "x", None)


def test_times_can_be_left_out_and_what_is_missing_is_said(arguments, tmp_path):
    result = run(*arguments, "--seconds", 0)
    assert result.exit_code == 0, result.output
    said = "".join(result.stdout.split())  # a long path breaks anywhere
    assert "index.html" in said and "--val-split" in said
    assert not (tmp_path / "r" / "latency.svg").exists()
    assert "Not measured" in (tmp_path / "r" / PAGE).read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--val-split", "test"), ("--val-split is test", "held out of training")),
        (("--val-split", "test[:10]"), ("test[:10]",)),
        (("--split", "validation[5:]", "--val-split", "test[:5]"), ("not test",)),
        (("--split", "validation[5:]", "--val-split", "validation[:6]"), ("shares no images",)),
        (("--split", "validation[5:]", "--val-split", "validation[:10%]"), ("shares no images",)),
        (("--split", "validation", "--val-split", "validation"), ("--val-split is validation",)),
        (("--output", "absent/folder"), ("absent",)),
        (("--output", "."), ("there already",)),
    ],
    ids=str,
)
def test_a_mistake_gets_one_line_and_no_page(arguments, tmp_path, options, words):
    result = run(*arguments, *options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("timm-dfs: ") and all(word in line for word in words)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_is_refused_before_it_is_read(arguments):
    result = run(arguments[0], "--dataset", "wds/shards", "--data-dir", "x", *arguments[3:])
    assert result.exit_code == 2 and "wds/shards is a stream" in result.stderr


def test_a_validation_split_that_holds_the_test_images_is_refused(arguments, pictures):
    copies = shutil.copytree(pictures / "test", pictures / "copies")
    try:
        result = run(*arguments, "--val-split", "copies")
    finally:
        shutil.rmtree(copies)
    assert result.exit_code == 2 and "20 of the 20 test samples are among" in result.stderr


def test_presets_are_not_measured_on_what_they_were_fitted_to(arguments, folder, pictures):
    config = json.loads((folder / "config.json").read_text())
    own = dict(dataset=str(pictures), split="test", samples=20)
    changed = json.loads(json.dumps(config))
    changed["model_args"]["presets"]["fast"]["fitted_on"] = own
    (folder / "config.json").write_text(json.dumps(changed))
    try:
        result = run(*arguments)
    finally:
        (folder / "config.json").write_text(json.dumps(config))
    assert result.exit_code == 2 and "'fast' was fitted on test" in result.stderr


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

LOOK = """<script>addEventListener("load", () => {
  const faults = [], page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) faults.push(`page is ${page.scrollWidth} wide of ${page.clientWidth}`);
  for (const image of document.images) if (!image.naturalWidth) faults.push(`no image: ${image.alt}`);
  for (const svg of document.querySelectorAll("svg")) {
    const all = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim());
    const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([words, box], i) => {
      if (box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1)
        faults.push(`cut off: ${words}`);
      for (const [others, other] of boxes.slice(0, i))
        if (Math.min(box.right, other.right) - Math.max(box.left, other.left) > 1 &&
            Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top) > 2)
          faults.push(`overlapping: ${words} and ${others}`);
    });
  }
  const figures = document.querySelectorAll("svg").length;
  parent.document.documentElement.dataset.looked =
    `${page.clientWidth} wide, ${figures} figures; ${faults.join("; ")}`;
})</script>"""


def faults(page, width, folder):
    """What is wrong with how Chromium shows the page, after how wide it was and how many figures there were.

    It is shown in a frame, because Chromium's windows are wider than a phone.
    """
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(page + LOOK)}"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *options, "--window-size=1400,1000", "--dump-dom", (folder / "frame.html").as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return re.search(r'data-looked="([^"]*)"', seen.stdout).group(1)


browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at the page with")


@pytest.mark.slow
@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_overlaps_or_is_cut_off(page, width, tmp_path):
    assert faults(page, width, tmp_path) == f"{width} wide, 5 figures; "


@pytest.mark.slow
@browser
def test_in_a_browser_what_overlaps_or_is_cut_off_is_seen(page, tmp_path):
    broken = '<text x="9" y="-50">above</text><text x="9" y="-50">twice</text></svg>'
    seen = faults(
        page.replace("</svg>", broken, 1).replace('src="data:image/png;base64,', 'src="data:,', 1), 390, tmp_path
    )
    for fault in ("cut off: above", "overlapping: twice and above", "no image: "):
        assert fault in seen
