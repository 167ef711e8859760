"""The comparison of fine-tuning runs: what is measured on held-out logits, and which runs may be compared."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import fine_tuned  # noqa: E402
import outcome  # noqa: E402

CLASSES = 4


def answers(correct):
    """Logits (E, N, C) and targets of exits that are right about the samples that ``correct`` (E, N) says, and sure.

    No two samples are alike: thresholds may not be measured on samples that they were fitted on.
    """
    targets = torch.arange(correct.shape[1]) % CLASSES
    predicted = torch.where(correct, targets, (targets + 1) % CLASSES)
    logits = 5.0 * torch.nn.functional.one_hot(predicted, CLASSES)
    return logits + 0.1 * torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)), targets


def test_accuracy_and_disagreement_are_those_of_each_exit():
    correct = torch.rand(3, 400, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.5], [0.7], [0.9]])
    found = outcome.outcome(*answers(correct), [1, 2, 3])
    assert found["top1"] == pytest.approx([100 * row.float().mean().item() for row in correct], abs=1e-3)
    assert found["disagreement"] == pytest.approx(
        [100 * (row != correct[-1]).float().mean().item() for row in correct], abs=1e-3
    )
    assert found["flops"] == [1, 2, 3]


def test_exits_together_are_weighted_by_what_they_are_worth():
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(2, 400, generator=generator) < torch.tensor([[0.4], [0.95]])
    found = outcome.outcome(*answers(correct), [1, 2])
    assert found["together"]["fitted"][1] == found["top1"][1]  # the bad exit has next to no weight
    assert found["together"]["mean"][1] < found["together"]["fitted"][1]


def test_early_exit_within_the_cost_of_one_exit_is_that_exit():
    found = outcome.outcome(*answers(torch.tensor([[True, False], [True, True]]).repeat(1, 200)), [50, 100])
    assert found["early_exit"]["alone"][0] == found["top1"][0] == 50  # half of the cost: no sample may go on


@pytest.mark.parametrize(
    "name, arguments",
    {
        "joint": dict(model_kwargs=dict(beta="joint")),
        "two-sided 0.5": dict(model_kwargs=dict(beta=0.5)),
        "one-sided 0.9": dict(model_kwargs=dict(beta=0.9, referencing="one_sided")),
        "joint, chained 0.5": dict(model_kwargs=dict(beta="joint", chain=0.5)),
        "joint, chained 0.3": dict(model_kwargs=dict(beta="joint", chain=0.3)),
        "one-sided 0.5": dict(model="dfs_msdnet_cifar100", model_kwargs=dict(beta=0.5)),  # its default
        "joint, taught by a, teacher_size 96, kd_temperature 2.0": dict(
            model_kwargs=dict(beta="joint", teacher_size=96), kd_model_name="a", kd_temperature=2.0
        ),
    }.items(),
)
def test_a_setting_is_named_by_what_distinguishes_it(name, arguments):
    assert fine_tuned.setting(dict(model="dfs_vgg7_cifar100") | arguments) == name


RECIPE = dict(lr=0.1, epochs=4, seed=42, model_kwargs=dict(head="wide", beta=0.5))


@pytest.mark.parametrize(
    "change",
    [dict(seed=43), dict(model_kwargs=dict(head="wide", beta="joint", chain=0.5)), dict(pretrained_path="a")],
)
def test_runs_may_differ_in_seed_and_setting(change):
    fine_tuned.check_recipe(Path("a"), RECIPE, RECIPE | change)


@pytest.mark.parametrize(
    "change, named", [(dict(lr=0.2), "lr"), (dict(model_kwargs=dict(head="auto", beta=0.5)), "model_kwargs")]
)
def test_a_run_of_another_recipe_is_refused(change, named):
    with pytest.raises(ValueError, match=f"a differs from the recipe in {named}"):
        fine_tuned.check_recipe(Path("a"), RECIPE, RECIPE | change)


def test_runs_that_differ_in_what_the_recipe_does_not_name_are_refused():
    plain = RECIPE | dict(cutmix=0.0, pretrained=False)
    for change in (dict(cutmix=1.0), dict(pretrained=True)):
        with pytest.raises(ValueError, match=f"b differs from a in {next(iter(change))}"):
            fine_tuned.check_alike(Path("b"), plain | change, Path("a"), plain)
    taught = RECIPE | dict(seed=43, experiment="b", kd_model_name="c", kd_temperature=2.0)
    fine_tuned.check_alike(Path("b"), taught, Path("a"), RECIPE | dict(experiment="a", kd_temperature=1.0))


def test_runs_from_other_weights_are_refused(tmp_path):
    def start(name, **arguments):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.yaml").write_text(yaml.safe_dump(RECIPE | arguments))
        return dict(RECIPE, initial_checkpoint=str(tmp_path / name / "last.pth.tar"))

    one, alike, longer = start("one"), start("alike", seed=43), start("longer", epochs=40)
    fine_tuned.check_alike(Path("b"), alike, Path("a"), one)
    with pytest.raises(ValueError, match=r"longer differs from .*one in epochs"):
        fine_tuned.check_alike(Path("b"), longer, Path("a"), one)
    with pytest.raises(ValueError, match="b differs from a in having an initial_checkpoint"):
        fine_tuned.check_alike(Path("b"), RECIPE, Path("a"), one)
    with pytest.raises(ValueError, match="b differs from a in file of pretrained_path"):
        paths = [RECIPE | dict(pretrained_path=path) for path in ("x/other.pth", "x/base.pth")]
        fine_tuned.check_alike(Path("b"), paths[0], Path("a"), paths[1])
    fine_tuned.check_alike(Path("b"), RECIPE | dict(pretrained_path="y/base.pth"), Path("a"), paths[1])


def test_a_run_that_was_resumed_from_another_ones_checkpoint_is_refused():
    fine_tuned.check_start(Path("here/a"), RECIPE | dict(resume="there/a/last.pth.tar"))
    with pytest.raises(ValueError, match=r"here/a was resumed from there/b/last\.pth\.tar"):
        fine_tuned.check_start(Path("here/a"), RECIPE | dict(resume="there/b/last.pth.tar"))


def test_a_run_that_went_on_from_another_setting_or_seed_is_refused(tmp_path):
    run = RECIPE | dict(model="dfs_vgg7_cifar100", initial_checkpoint=str(tmp_path / "last.pth.tar"))
    for change, refused in ((dict(seed=43), True), (dict(model_kwargs=dict(beta="joint")), True), ({}, False)):
        before = dict(model=run["model"], seed=42, model_kwargs=dict(beta=0.5)) | change
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(before))
        if refused:
            with pytest.raises(ValueError, match=r"a is two-sided 0\.5, seed 42, but went on from "):
                fine_tuned.check_start(Path("a"), run | dict(model_kwargs=dict(beta=0.5)))
        else:
            fine_tuned.check_start(Path("a"), run | dict(model_kwargs=dict(beta=0.5)))


def test_a_run_that_went_on_from_weights_of_unknown_origin_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"a went on from .*, beside which there is no args\.yaml"):
        fine_tuned.check_start(Path("a"), RECIPE | dict(initial_checkpoint=str(tmp_path / "last.pth.tar")))


def test_a_run_that_has_not_ended_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuned, "read_run", lambda file: type("Run", (), dict(epoch=2)))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(ValueError, match="stopped after 3 of 4 epochs"):
        fine_tuned.measured(tmp_path, RECIPE)
