"""docs/reproduction.md says what the results say: made here from made-up results whose outcome is known."""

import copy
import itertools
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import timm
import torch
from timm.task import ClassificationTask, LogitDistillationTask

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import reproduction  # noqa: E402
import study  # noqa: E402

OF_JOINT = [40.0, 41.0, 42.0, 43.0, 44.0]
SEEDS = {0: 0.0, 1: 0.4, 2: -0.3}
OUTCOMES = {
    "joint": lambda seed: 0.0,
    "one-sided 0.5": lambda seed: 1.0 + 0.1 * seed,  # ahead, whatever the seed
    "two-sided 0.5": lambda seed: -2.0 - 0.1 * seed,
    "one-sided 0.9": lambda seed: (-1.0, 0.5, 0.7)[seed],
}


@pytest.fixture
def root(tmp_path):
    """A checkout's results: DFS 0.5 points below joint training at every exit, its curve 1 point above."""
    dfs = json.loads((ROOT / "hub" / reproduction.DFS / "results.json").read_text())
    joint = copy.deepcopy(dfs)
    joint["model"] = reproduction.JOINT
    for half in ("held_out", "test"):
        joint[half]["top1"] = [top1 + 0.5 for top1 in dfs[half]["top1"]]
    for point in dfs["test"]["budgeted_batch"]:
        point["top1"] += 1
    for name, results in {reproduction.DFS: dfs, reproduction.JOINT: joint}.items():
        (tmp_path / "hub" / name).mkdir(parents=True)
        (tmp_path / "hub" / name / "results.json").write_text(json.dumps(results))
        (tmp_path / "hub" / name / "config.json").write_text((ROOT / "hub" / name / "config.json").read_text())
    for name in (reproduction.FINE_TUNED_DFS, reproduction.FINE_TUNED_JOINT):
        (tmp_path / "hub" / name).mkdir()
        for file in ("results.json", "config.json"):
            (tmp_path / "hub" / name / file).write_text((ROOT / "hub" / name / file).read_text())
    shutil.copytree(ROOT / "benchmarks/results/epochs79", tmp_path / "benchmarks/results/epochs79")
    measured = [
        dict(network=name, beta=beta, conflicting=share, pairs=100, mean_cosine=0.5)
        for name, beta, share in (
            (reproduction.JOINT, "joint", 0.07),
            (reproduction.JOINT, 0.5, 0.06),
            (reproduction.DFS, "joint", 0.05),
            (reproduction.DFS, 0.5, 0.04),
        )
    ]
    conflict = dict(batches=2, batch_size=9, measured=measured)
    (tmp_path / "benchmarks/results/conflict.json").write_text(json.dumps(conflict))
    (tmp_path / "benchmarks/results/short").mkdir()
    for name, behind in {reproduction.DFS: 2.0, reproduction.JOINT: 0.0}.items():
        short = dict(training=dict(dfs["training"], epochs=3), test=dict(top1=[30.0 - behind] * 7))
        (tmp_path / "benchmarks/results/short" / f"{name}.json").write_text(json.dumps(short))
    runs = [
        dict(
            setting=setting, seed=seed, epochs=epochs, top1=[epochs + base + change(seed) + shift for base in OF_JOINT]
        )
        for epochs in (2, 8)
        for setting, change in OUTCOMES.items()
        for seed, shift in SEEDS.items()
    ]
    speeds = {"joint": 100.0, "DFS 0.5": 125.0}
    case = dict(model="a", batch_size=1, memory_format="NCHW", dtype="float32", images_per_second=speeds)
    (tmp_path / "benchmarks/results/study.jsonl").write_text("\n".join(map(json.dumps, runs)))
    of_seeds = [
        dict(
            fine_tuned_run(setting, seed, 40.0 + shift + change),
            together=dict(mean=[0.0] * 4, fitted=[41.0 + shift + 2 * change] * 4),
        )
        for setting, change, seeds in (("joint", 0.0, 3), ("two-sided 0.5", -1.5, 3), ("joint, chained", 0.3, 1))
        for seed, shift in enumerate((0.0, 0.4, -0.3)[:seeds])
    ]
    (tmp_path / "benchmarks/results/fine_tuned.jsonl").write_text("\n".join(map(json.dumps, of_seeds)))
    augmented = [
        dict(
            fine_tuned_run(setting, seed, 40.0 + change),
            together=dict(mean=[0.0] * 4, fitted=[40.0 + change, 42.0, 43.0, 44.0]),
            disagreement=[30.0 - change, 20.0, 10.0, 0.0],
        )
        for setting, change in (("joint", 0.0), ("one-sided 0.5", -1.5))
        for seed in range(3)
    ]
    (tmp_path / "benchmarks/results/study_randaugment.jsonl").write_text("\n".join(map(json.dumps, augmented)))
    (tmp_path / "benchmarks/results/study_plain.jsonl").write_text("")
    (tmp_path / "benchmarks/results/train_step.json").write_text(json.dumps(dict(machine="made up", measured=[case])))
    return tmp_path


def fine_tuned_run(setting, seed, top1):
    early_exit = {way: [top1 - 3, top1 - 2, top1 - 1] for way in ("alone", "mean", "fitted")}
    of_all = dict(epochs=4, recipe="a.yaml", flops=[10e6, 20e6, 30e6, 40e6], disagreement=[30.0, 20.0, 10.0, 0.0])
    return dict(of_all, setting=setting, seed=seed, top1=[top1] * 4, early_exit=early_exit)


def edit(root, name, change):
    file = root / "hub" / name / "results.json"
    results = json.loads(file.read_text())
    change(results)
    file.write_text(json.dumps(results))


def text(root):
    return reproduction.generated(root)[reproduction.TEXT]


def cells(text, first):
    (line,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", text, re.M)
    return [cell.strip() for cell in line.split("|")]


def test_the_page_and_its_plot_are_what_the_results_make_byte_for_byte():
    for name, made in reproduction.generated(ROOT).items():
        assert (ROOT / "docs" / name).read_bytes() == made.encode(), "run: python benchmarks/reproduction.py"


def reach(root, name, top1):
    """Let a network have these accuracies on both halves of the test split."""

    def change(results):
        for half in ("held_out", "test"):
            results[half]["top1"] = top1

    edit(root, name, change)


def test_the_difference_of_the_two_rows_is_beside_the_papers(root):
    made = text(root)
    assert cells(made, "AutoAugment and Cutout: DFS − joint") == ["-0.50"] * 7
    assert cells(made, "paper, DFS − MSDNet")[0] == "+8.36"


def test_rows_are_of_both_parts_of_the_test_split(root):
    reach(root, reproduction.DFS, [70.0] * 7)
    edit(root, reproduction.DFS, lambda results: results["held_out"].update(top1=[72.0] * 7))
    assert cells(text(root), "AutoAugment and Cutout: DFS, 240 epochs") == ["71.00"] * 7


def test_so_is_how_far_each_row_is_from_the_papers(root):
    reach(root, reproduction.JOINT, [70.46, 75.64, 78, 79, 80, 80, 80.0])
    made = text(root)
    row = cells(made, "AutoAugment and Cutout: joint − the paper's DFS")
    assert row == ["-2.00", "+0.00", "+0.50", "+0.46", "+0.80", "+0.55", "+0.44"]
    assert "above the paper's DFS at exits 2, 3, 4, 5, 6 and below it at exit 0.\n" in made
    assert "differs from the paper's MSDNet by +6.11 points, the paper's DFS by +5.67: the recipe" in made
    reach(root, reproduction.JOINT, [60.0] * 7)
    made = text(root)
    assert "above the paper's DFS at no exit" in made and "a recipe without DFS" not in made


def test_a_row_below_the_papers_says_by_how_much(root):
    reach(root, reproduction.DFS, [72.46, 75, 77, 78, 79, 79, 79.0])
    assert "DFS is 0.0 to 0.6 points below the paper's row" in " ".join(text(root).split())


def test_the_shorter_pair_has_its_own_difference(root):
    assert cells(text(root), "DFS − joint, 3 epochs") == ["-2.00"] * 7


def test_the_exits_at_which_dfs_is_ahead_are_named(root):
    reach(root, reproduction.DFS, [70.0] * 7)
    reach(root, reproduction.JOINT, [69.0, 70.0, 70.5, 71.0, 69.5, 71.0, 71.0])
    assert "DFS is ahead of joint training at exits 0, 4 and behind at exits 2, 3, 5, 6." in text(root)


def test_the_conflict_in_training_is_that_of_each_networks_own_gradients(root):
    section = text(root).partition("## Gradient conflict")[2].partition("## A pretrained")[0]
    assert "| DFS | with the partition | 100 | 4.0 % | 0.500 |" in section
    assert (
        "on average 7 pairs conflict with joint training and 4 with DFS" in section
        and "has fewer conflicts." in section
    )


def test_another_precision_of_joint_training_is_named(root):
    file = root / "benchmarks/results/epochs79" / f"{reproduction.JOINT}.json"
    results = json.loads(file.read_text())
    results["training"]["other_than_recipe"] = dict(amp=False)
    file.write_text(json.dumps(results))
    assert "joint training in another precision (`amp: false`)" in text(root)


def test_a_setting_that_wins_with_every_seed_is_clearly_ahead_and_one_that_varies_is_not(root):
    made = text(root)
    for verdict in (
        "one-sided 0.5: clearly ahead at exits 0, 1, 2, 3, 4",
        "two-sided 0.5: clearly behind at exits 0, 1, 2, 3, 4",
        "one-sided 0.9: no clear difference to joint training at any exit",
    ):
        assert made.count(f"- {verdict}\n") == 2, verdict


def test_settings_of_the_study_that_were_not_run_are_named(root):
    made = text(root)
    missing = [setting for setting in reproduction.WITH_EXITS if setting not in OUTCOMES]
    assert missing and made.count(f"- not run: {'; '.join(missing)}\n") == 2


def test_settings_that_fine_tune_are_compared_with_joint_training_over_seeds(root):
    section = text(root).partition("### Settings over seeds")[2].partition("## Early exit")[0]
    alone, together, gain, *_ = section.split("| setting |")[1:]
    assert cells(alone, "two-sided 0.5") == ["3"] + ["38.53 (**-1.50 ± 0.00**)"] * 4
    assert "- two-sided 0.5: clearly behind at exits 0, 1, 2, 3\n" in alone
    assert cells(together, "two-sided 0.5") == ["3"] + ["38.03 (**-3.00 ± 0.00**)"] * 4
    assert cells(gain, "joint") == ["3"] + ["1.00"] * 4
    assert cells(gain, "two-sided 0.5") == ["3"] + ["-0.50 (**-1.50 ± 0.00**)"] * 4


def test_fine_tuning_runs_of_two_recipes_are_compared_apart(root):
    file = root / "benchmarks/results/fine_tuned.jsonl"
    of_b = dict(recipe="b.yaml", together=dict(mean=[0.0] * 4, fitted=[62.0] * 4))
    others = [dict(fine_tuned_run(setting, 0, top1), **of_b) for setting, top1 in (("joint", 60.0), ("late", 61.0))]
    file.write_text("\n".join([file.read_text(), *map(json.dumps, others)]))
    section = text(root).partition("### Settings over seeds")[2].partition("## Early exit")[0]
    first, second = section.split("\n#### ")[1:]
    assert first.startswith("a.yaml, 4 epochs") and second.startswith("b.yaml, 4 epochs")
    assert cells(second.split("| setting |")[1], "late") == ["1"] + ["61.00 (+1.00)"] * 4
    assert "late" not in first and "two-sided 0.5" not in second


def test_one_seed_has_no_spread_and_is_never_clear(root):
    section = text(root).partition("### Settings over seeds")[2]
    assert cells(section.split("| setting |")[1], "joint, chained") == ["1"] + ["40.30 (+0.30)"] * 4
    assert "- no conclusion from one seed: joint, chained\n" in section


def test_a_seed_that_joint_training_lacks_is_left_out_until_it_has_it(root):
    file = root / "benchmarks/results/fine_tuned.jsonl"
    before = text(root)
    file.write_text("\n".join([file.read_text(), json.dumps(fine_tuned_run("two-sided 0.5", 9, 99.0))]))
    assert text(root) == before


def test_seeds_are_compared_with_the_same_seeds(root):
    found = reproduction.study(
        [json.loads(line) for line in (root / "benchmarks/results/study.jsonl").read_text().splitlines()]
    )
    row = next(row for row in found[1]["rows"] if row["setting"] == "one-sided 0.5")
    assert found[1]["epochs"] == 8 and row["mean"][0] == pytest.approx(48 + 1.1 + 0.1 / 3)
    assert row["differences"][0].mean == pytest.approx(1.1) and row["differences"][0].spread == pytest.approx(0.1)


def test_early_exit_is_said_to_reach_joint_trainings_best_only_where_it_does(root):
    def cheapest(results):
        best = max(results[reproduction.JOINT]["test"]["top1"])
        return min(p["average_flops"] for p in results[reproduction.DFS]["test"]["budgeted_batch"] if p["top1"] >= best)

    results = {
        name: json.loads((root / "hub" / name / "results.json").read_text())
        for name in (reproduction.DFS, reproduction.JOINT)
    }
    assert f"Early exit with DFS reaches that at {cheapest(results) / 1e6:.1f} M" in text(root)
    edit(root, reproduction.JOINT, lambda results: results["test"]["top1"].__setitem__(6, 99.0))
    assert "with 99.00 %. Early exit with DFS does not reach that: its best is" in text(root)


def test_half_the_cost_is_half_of_the_last_exit_alone_and_no_point_beyond_it_counts(root):
    results = json.loads((root / "hub" / reproduction.DFS / "results.json").read_text())
    half = results["last_exit_flops"] / 2
    points = [point for point in results["test"]["budgeted_batch"] if point["average_flops"] <= half]
    dearest = max(points, key=lambda point: point["average_flops"])
    assert f"Within half of that, {half / 1e6:.1f} M: DFS {dearest['top1']:.2f} %" in text(root)


def test_presets_for_a_budget_are_compared(root):
    edit(root, reproduction.DFS, lambda results: results["test"]["presets"]["60M"].update(top1=71.0))
    edit(root, reproduction.JOINT, lambda results: results["test"]["presets"]["60M"].update(top1=69.5))
    assert cells(text(root), "`60M`")[2] == "+1.50"


def test_an_epochs_time_follows_from_the_speed(root):
    assert cells(text(root), "a, 1, float32 NCHW") == ["100.0", "125.0", "1.25×", "8.3", "6.7"]


def test_the_plot_has_both_curves_and_all_exits(root):
    drawn = ET.fromstring(reproduction.generated(root)[reproduction.PLOT])
    kinds = [(element.tag.rpartition("}")[2], element.get("class")) for element in drawn]
    assert kinds.count(("polyline", "curve")) == kinds.count(("polyline", "curve other")) == 1
    assert kinds.count(("circle", "exit")) == kinds.count(("circle", "curve other")) == 7


def test_the_study_says_whether_partitioned_exits_disagree_more_and_gain_more_together(root):
    section = text(root).partition("### RandAugment and erasing, 4 epochs")[2].partition("## Time")[0]
    assert cells(section.split("| setting |")[1], "one-sided 0.5") == ["3"] + ["38.50 (**-1.50 ± 0.00**)"] * 4
    assert "an exit disagrees with the last one differs by +0.0 to +1.5 percentage points" in section
    assert "the gain of the exits after the first by +1.50 to +1.50 points" in section
    assert "ahead of joint training's exits together at no exit." in section
    missing = [setting for setting in reproduction.WITH_EXITS if setting not in ("joint", "one-sided 0.5")]
    assert f"- not run: {'; '.join(missing)}\n" in section


def test_partitioned_exits_with_a_teacher_are_compared_with_taught_joint_training(root):
    file = root / "benchmarks/results/study_randaugment.jsonl"
    runs = [json.loads(line) for line in file.read_text().splitlines()]

    def taught(run):
        together = {way: [value + 5.0 for value in run["together"][way]] for way in run["together"]}
        return dict(run, setting=f"{run['setting']}, taught at 1", together=together)

    file.write_text("\n".join(json.dumps(run) for run in (*runs, *map(taught, runs))))
    section = text(root).partition("### RandAugment and erasing, 4 epochs")[2].partition("## Time")[0]
    line = section.partition("- one-sided 0.5, taught at 1: the share")[2].partition("\n- ")[0]
    assert "ahead of joint training's exits together at no exit." in line


def test_joint_training_and_dfs_are_crossed_with_the_augmentation_where_both_were_run_as_long(root):
    folder = root / "benchmarks/results"
    assert "### With RandAugment" not in text(root)

    def runs(gain_of_dfs, augmentation):
        of_settings = [("joint", 0, 50.0), ("one-sided 0.5", 0, 50.0 + gain_of_dfs), ("one-sided 0.5", 1, 99.0)]
        made = [fine_tuned_run(setting, seed, top1 + augmentation) for setting, seed, top1 in of_settings]
        together = dict(mean=[0.0] * 4, fitted=[41.0] * 4)
        return [json.dumps(dict(run, epochs=9, machine="made up", together=together)) for run in made]

    (folder / "study_plain.jsonl").write_text("\n".join(runs(2.0, 0.0)))
    with (folder / "study_randaugment.jsonl").open("a") as file:
        file.write("\n".join(["", *runs(-1.0, 5.0)]))
    made = text(root)
    assert "### RandAugment and erasing, 4 epochs" in made and "### RandAugment and erasing, 9 epochs" not in made
    section = made.partition("### With RandAugment and erasing and without, 9 epochs")[2].partition("## Time")[0]
    assert "1 seed, on made up" in section
    of_top1 = section.partition("Exits that answer together")[0]
    for first, value in {
        "crops and mirroring: joint": "50.00",
        "crops and mirroring: DFS": "52.00",
        "crops and mirroring: DFS − joint": "+2.00",
        "RandAugment and erasing: joint": "55.00",
        "RandAugment and erasing: DFS": "54.00",
        "RandAugment and erasing: DFS − joint": "-1.00",
        "augmentation, with joint training": "+5.00",
        "augmentation, with DFS": "+2.00",
    }.items():
        assert cells(of_top1, first) == [value] * 4
    assert "by +2.00, +2.00, +2.00, +2.00 points without the augmentation and by -1.00" in section


def test_the_network_without_early_exits_is_compared_at_its_last_exit_alone(root):
    file = root / "benchmarks/results/study_randaugment.jsonl"
    assert "trained for its last exit alone" not in text(root).lower()
    of_last = fine_tuned_run(reproduction.WITHOUT_EXITS, 0, 1.0)
    runs = [dict(of_last, seed=seed, top1=[1.0, 1.0, 1.0, top1]) for seed, top1 in enumerate((41.0, 42.0))]
    file.write_text("\n".join([file.read_text(), *map(json.dumps, runs)]))
    made = text(root)
    assert "alone (2 seeds), it reaches 41.50 % there, +1.50 ± 0.71 points from joint training" in made
    assert f"| {reproduction.WITHOUT_EXITS} |" not in made


def test_the_page_stands_without_runs_of_the_augmented_study(root):
    (root / "benchmarks/results/study_randaugment.jsonl").write_text("")
    assert "### RandAugment" not in text(root)


def test_runs_of_another_recipe_do_not_join_the_study(tmp_path):
    file = tmp_path / "study.jsonl"
    recipe = study.RECIPES["published"]
    assert study.read(file, recipe) == []
    file.write_text(json.dumps(dict(setting="joint", seed=0, epochs=2, top1=[1.0], recipe=recipe)))
    assert len(study.read(file, recipe)) == 1
    with pytest.raises(ValueError, match="another recipe"):
        study.read(file, study.RECIPES["randaugment"])


@pytest.mark.parametrize("recipe", study.RECIPES)
def test_all_settings_of_a_seed_train_on_the_same_images(recipe):
    augmentation = common.Augmentation(lambda images: images / 255, **study.RECIPES[recipe].get("augmentation", {}))
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    one, same, other = (augmentation(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one.shape == images.shape and one.dtype == torch.float32
    assert torch.equal(one, same) and not torch.equal(one, other)


TINY = dict(
    study.RECIPES["published"],
    model_kwargs=dict(exits=2, base=1, step=1, stem_width=4, growth_rate=2, head_width=4, num_classes=5),
    batch_size=4,
)


@pytest.fixture
def images(monkeypatch):
    """Training and held-out images; no compilation, and the mean logit as outcome: four images are too few for one."""
    monkeypatch.setattr(study, "outcome", lambda logits, targets, flops: dict(mean=logits.mean().item()))
    for task in (ClassificationTask, LogitDistillationTask):
        monkeypatch.setattr(task, "compile", lambda self: None)
    torch.manual_seed(0)
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    return (images[:8], torch.arange(8) % 5), (images[8:], torch.arange(8) % 5)


def test_an_interrupted_run_of_the_study_ends_as_if_it_had_not_been(images, tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupted(*args):
        save(*args)
        raise Interrupted

    whole, pieces = tmp_path / "whole.pt", tmp_path / "pieces.pt"
    at_once = study.run("joint", 0, 2, TINY, *images, whole)
    save = study.save
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(study, "save", interrupted)
        study.run("joint", 0, 2, TINY, *images, pieces)
    torch.manual_seed(7)
    assert torch.load(pieces)["epochs"] == 1
    assert study.run("joint", 0, 2, TINY, *images, pieces) == at_once
    expected, found = (torch.load(file)["trainer"]["model"] for file in (whole, pieces))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match=r"pieces\.pt is a run of another recipe"):
        study.run("joint", 0, 2, dict(TINY, lr=0.2), *images, pieces)


def test_a_taught_network_starts_from_the_weights_of_the_others_and_ends_elsewhere(images, tmp_path, monkeypatch):
    def recording(file, trainer, *args):
        starts.append(copy.deepcopy(trainer.model.state_dict()))
        return restore(file, trainer, *args)

    starts, restore = [], study.restore
    monkeypatch.setattr(study, "restore", recording)
    monkeypatch.setattr(study, "load_teacher", lambda: timm.create_model("test_resnet", num_classes=5))
    settings = ("joint", "joint, taught", "joint, taught at 1")
    for setting in settings:
        study.run(setting, 0, 1, TINY, *images, tmp_path / f"{setting}.pt")
    assert all(torch.equal(starts[0][name], start[name]) for start in starts for name in start)
    ends = [torch.load(tmp_path / f"{setting}.pt")["trainer"]["model"] for setting in settings]
    for one, other in itertools.combinations(ends, 2):
        assert not all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_every_setting_with_a_teacher_says_how_it_teaches():
    taught = {setting for setting, arguments in study.SETTINGS.items() if "teacher_size" in arguments}
    assert {setting for setting in study.SETTINGS if study.teaching_of(setting)} == taught


def test_erased_rectangles_have_the_data_sets_mean():
    erased = common.Augmentation(lambda images: images / 255 + 1, reprob=1.0)
    made = erased(torch.full((16, 3, 32, 32), 128, dtype=torch.uint8), torch.Generator().manual_seed(0))
    assert set(made.unique().tolist()) == {0.0, torch.tensor(128 / 255 + 1).item()}
    assert (made == 0).any(-1).any(-1).all(), "an image has no erased rectangle"


def test_the_fine_tuned_networks_differ_in_the_partition_alone():
    dfs, joint = (
        json.loads((ROOT / "hub" / name / "results.json").read_text())["training"]
        for name in (reproduction.FINE_TUNED_DFS, reproduction.FINE_TUNED_JOINT)
    )
    same = ("recipe", "earlier_phases", "epochs", "seed", "samples", "batch_size", "settings", "splits", "objective")
    assert {key: dfs[key] for key in same} == {key: joint[key] for key in same}
    args = [
        json.loads((ROOT / "hub" / name / "config.json").read_text())["model_args"]
        for name in (reproduction.FINE_TUNED_DFS, reproduction.FINE_TUNED_JOINT)
    ]
    assert {key for key in args[0] if args[0][key] != args[1][key]} == {"beta", "presets"}
