"""benchmarks/gpu on the CPU: its steps are train.py's, its runs go on where they ended, its files come back whole."""

import argparse
import io
import json
import os
import random
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import timm_dfs
from timm_dfs.cli import app

KIT = Path(__file__).parent.parent / "benchmarks" / "gpu"
sys.path.insert(0, str(KIT))

import batches as kit_batches  # noqa: E402
import device_augment  # noqa: E402
import floor as kit_floor  # noqa: E402
import host_augment  # noqa: E402
import inputs as kit_inputs  # noqa: E402
import pack  # noqa: E402
import recipe  # noqa: E402
import run as kit_run  # noqa: E402
import state as kit_state  # noqa: E402
import steps as kit_steps  # noqa: E402

sys.path.remove(str(KIT))

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
NETWORK = dict(exits=3, base=2, step=1, stem_width=4, growth_rate=4, head_width=8)
CLASSES = 3
MEAN, STD = timm.get_pretrained_cfg("dfs_msdnet_cifar100").mean, timm.get_pretrained_cfg("dfs_msdnet_cifar100").std


def random_images(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An unpacked data set: 24 training and 8 test images of three classes."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("test", 8)):
        np.save(folder / f"{split}_images.npy", random_images(count, seed=count))
        np.save(folder / f"{split}_labels.npy", np.arange(count) % CLASSES)
    return folder


def settings(**given):
    return dict(
        dict(
            model="dfs_msdnet_cifar100",
            num_classes=CLASSES,
            device="cpu",
            batch_size=8,
            epochs=3,
            lr=0.05,
            warmup_epochs=0,
            smoothing=0.1,
            model_ema=True,
            model_ema_decay=0.5,
            pad=4,
            drop=0.5,
            val_split="test",
        ),
        **given,
    )


def training(data, output, runs=None, **given):
    runs = runs or dict(dfs=NETWORK)
    return kit_run.Training(None, data, output, runs, settings(**given))


def last(folder):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / "last.pth.tar", weights_only=True)


def assert_same_state(one, other, close=False):
    compare = torch.testing.assert_close if close else lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0)
    for part in ("state_dict", "state_dict_ema"):
        assert one[part].keys() == other[part].keys()
        for key, value in one[part].items():
            compare(value, other[part][key])
    buffers = [[state["momentum_buffer"] for state in found["optimizer"]["state"].values()] for found in (one, other)]
    assert len(buffers[0]) == len(buffers[1]) > 0
    for value, its_other in zip(*buffers):
        compare(value, its_other)


# Steps.

SCHEDULES = {
    "steps, Nesterov off": dict(sched="multistep", decay_milestones=[1, 2], opt="momentum", weight_decay=5e-4),
    "cosine by updates, warm-up": dict(sched="cosine", sched_on_updates=True, warmup_epochs=1, warmup_lr=0.01),
}


@pytest.mark.parametrize("given", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("beta", [None, 0.5])
def test_steps_are_those_of_timms_task_optimizer_and_schedule(data, tmp_path, given, beta):
    """A loop written out here as train.py's is, on the batches that ours saw, loss by loss and weight by weight."""
    given = dict(given, drop=0.0, pad=0, hflip=0.0)
    kit = training(data, tmp_path, dict(one=dict(NETWORK, beta=beta)), **given)
    ours = kit.first
    args = ours.args

    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, num_classes=CLASSES, beta=beta, drop_rate=0.0, **NETWORK).train()
    model.load_state_dict(ours.model.state_dict())
    task = ClassificationTask(model, LabelSmoothingCrossEntropy(0.1), verbose=False)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    task.setup_ema(decay=0.5)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=3,
        decay_milestones=args.decay_milestones,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=3,
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    updates = 0
    for epoch in range(3):
        kit.first.model.train()
        for images, target in kit.batches.epoch(epoch):
            before = ours.loss.clone()
            kit.steps(images, target)
            loss = task((images.float() - mean) / std, target)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            task.update_ema(step=updates)
            scheduler.step_update(updates)
            torch.testing.assert_close(ours.loss - before, loss.detach())
        scheduler.step(epoch + 1)
        ours.end_epoch()
        ours.end_validation(None)
        assert [group["lr"] for group in ours.optimizer.param_groups] == [g["lr"] for g in optimizer.param_groups]
    networks = ours.networks()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(networks[""].state_dict()[key], value)
    for key, value in task.get_trainable_module(ema=True).module.state_dict().items():
        torch.testing.assert_close(networks["ema"].state_dict()[key], value)


def test_runs_side_by_side_are_the_runs_alone(data, tmp_path):
    runs = dict(joint=dict(NETWORK, beta="joint"), dfs=dict(NETWORK, beta=0.5))
    assert training(data, tmp_path / "both", runs, drop=0.0, epochs=1, pad=0, hflip=0.0).to_the_end()
    for name, kwargs in runs.items():
        assert training(data, tmp_path / "alone", {name: kwargs}, drop=0.0, epochs=1, pad=0, hflip=0.0).to_the_end()
        assert_same_state(last(tmp_path / "both" / name), last(tmp_path / "alone" / name))
    weights = [last(tmp_path / "both" / name)["state_dict"]["stem.0.0.conv.weight"] for name in runs]
    assert not torch.equal(*weights)


def test_rates_on_the_device_are_the_schedules(data, tmp_path):
    """What a captured step reads: the fused step with a rate in a tensor does what the plain one does with a number."""
    given = dict(drop=0.0, pad=0, hflip=0.0, sched_on_updates=True, warmup_epochs=1)
    kits = [training(data, tmp_path / str(k), **given) for k in range(2)]
    for group in kits[1].first.optimizer.param_groups:
        group.update(fused=True, foreach=False)
    for images, target in kits[0].batches.epoch(0):
        kits[0].steps(images, target)
        with kits[1].first.rates_of_the_device():
            assert all(isinstance(group["lr"], torch.Tensor) for group in kits[1].first.optimizer.param_groups)
            kits[1].first.update(kits[1].steps.prepare(images), target)
        kits[1].first.after_update()
    for key, value in kits[0].first.model.state_dict().items():
        torch.testing.assert_close(kits[1].first.model.state_dict()[key], value)


# What a graph can hold.


class Graphable(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: asking the device for a value, or a tensor of the processor's."""

    ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self, device):
        super().__init__()
        self.device, self.operators = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.operators += 1
        assert func.overloadpacket.__name__ not in self.ASKING, f"{func} waits for the device"
        tensors = [value for value in tree_leaves((args, kwargs, outputs)) if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {self.device}, f"{func} is between devices"
        return outputs


def assert_graphable(kit):
    """The step after those that are eager asks the device for nothing."""
    x, target = next(kit.batches.epoch(0))
    for _ in range(kit_steps.EAGER_STEPS):
        kit.steps(x, target)
    with Graphable("cpu") as watched:
        kit.steps._update_all()
    assert watched.operators > 500


OBJECTIVES = {
    "joint": dict(beta="joint"),
    "DFS": dict(beta=0.5),
    "distillation": dict(distill_weight=0.3, distill_feature_weight=0.03),
    "equilibrium": dict(gradient_equilibrium=True),
    "weights": dict(loss_weights=[1.0, 0.5, 2.0]),
    "chain": dict(beta="joint", chain=0.5),
    "the first exit's partition": dict(beta=[0.5, 1.0]),
}


@pytest.mark.parametrize("kwargs", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_captured_step_never_asks_the_device(data, tmp_path, kwargs):
    kit = training(data, tmp_path, dict(one=dict(NETWORK, **kwargs)), cutout=8, reprob=0.25, remode="const")
    assert_graphable(kit)
    with Graphable("cpu"), pytest.raises(AssertionError, match="waits"):
        kit.first.loss.item()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A network in a folder, by the name that train.py takes for a teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    model = timm.create_model("dfs_vgg7_cifar100", depths=(1, 1), widths=(4, 6), num_classes=CLASSES)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return f"local-dir:{folder}"


def test_a_captured_step_with_a_teacher_never_asks_the_device(data, tmp_path, teacher):
    runs = dict(taught=dict(NETWORK, beta="joint", teacher_size=48))
    assert_graphable(training(data, tmp_path, runs, kd_model_name=teacher, kd_temperature=1.0))


def test_a_run_with_a_teacher_is_timms_task_and_goes_on(data, tmp_path, teacher):
    given = dict(
        kd_model_name=teacher,
        kd_temperature=1.0,
        distill_loss_weight=0.9,
        task_loss_weight=0.1,
        drop=0.0,
        pad=0,
        hflip=0.0,
    )
    kit = training(data, tmp_path, **given)
    ours = kit.first
    model = timm.create_model("dfs_msdnet_cifar100", num_classes=CLASSES, drop_rate=0.0, **NETWORK).train()
    model.load_state_dict(ours.model.state_dict())
    weights = dict(distill_loss_weight=0.9, task_loss_weight=0.1, temperature=1.0)
    task = LogitDistillationTask(model, teacher, LabelSmoothingCrossEntropy(0.1), verbose=False, **weights)
    images, target = next(kit.batches.epoch(0))
    kit.steps(images, target)
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    torch.testing.assert_close(ours.loss, task((images.float() - mean) / std, target)["loss"].detach())

    assert not training(data, tmp_path, **given).to_the_end(minutes=0)
    assert not any("teacher" in key for key in last(tmp_path / "dfs")["state_dict"])
    assert training(data, tmp_path, **given).to_the_end()


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.11"),
    reason="fake CUDA tensors need a driver before torch 2.11 (seen with 2.9.1)",
)
def test_a_captured_forward_pass_takes_nothing_from_the_processor():
    """On a GPU that is not there: fake tensors have its device, and no values to ask for."""
    args = recipe.read_recipe(None, settings(cutout=8, reprob=0.25, remode="const"))
    with FakeTensorMode():
        device = torch.device("cuda:0")
        with device:
            model = timm.create_model("dfs_msdnet_cifar100", num_classes=CLASSES, drop_rate=0.5, **NETWORK)
        task = ClassificationTask(model.train(), LabelSmoothingCrossEntropy(0.1), device=device, verbose=False)
        of_recipe = kit_inputs.Inputs(args, MEAN, STD, device)
        images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device)
        target = torch.zeros(8, dtype=torch.long, device=device)
        task.criterion._batches = kit_steps.EAGER_STEPS  # as when a graph is captured
        with Graphable("cuda") as watched:
            loss = task(of_recipe.augmented(images), target)["loss"]
        assert watched.operators > 100 and loss.device == device
        with Graphable("cuda"), pytest.raises(AssertionError, match="between devices"):
            torch.ones(2).to(device)


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.11"),
    reason="fake CUDA tensors need a driver before torch 2.11 (seen with 2.9.1)",
)
@pytest.mark.parametrize("settings", [dict(chain=0.5), dict(beta=0.5, referencing="off")], ids=str)
def test_a_captured_moving_average_takes_nothing_from_the_processor(settings):
    """ModelEmaV3 reads the state dicts of both networks at every update."""
    with FakeTensorMode():
        with torch.device("cuda:0"):
            model = timm.create_model("dfs_msdnet_cifar100", num_classes=CLASSES, **NETWORK, **settings)
        with Graphable("cuda"):
            state = model.state_dict()
        assert all(value.device.type == "cuda" for value in state.values())


class PretendedGraph:
    """A graph for the CPU: holds the numbers that Python had when it was captured, and computes when replayed."""

    def hold(self, steps):
        self.steps, self.updates = steps, [learner.updates for learner in steps.learners]

    def replay(self):
        now = [learner.updates for learner in self.steps.learners]
        with ExitStack() as during:
            for learner, updates in zip(self.steps.learners, self.updates):
                learner.updates = updates
                during.enter_context(learner.rates_of_the_device())
            kit_steps.Steps._update_all(self.steps)
        for learner, updates in zip(self.steps.learners, now):
            learner.updates = updates


def test_replayed_steps_are_steps(data, tmp_path, monkeypatch):
    """Schedule, momentum, moving average and counts go on through a graph that knows only what capture showed it."""
    captured = []

    @contextmanager
    def pretended_capture(graph, stream):
        graph.hold(kit.steps)
        kit.steps._update_all = lambda: captured.append(graph)
        yield
        del kit.steps._update_all

    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", pretended_capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    runs = dict(joint=dict(NETWORK, beta="joint"), dfs=dict(NETWORK, beta=0.5))
    given = dict(epochs=2, sched_on_updates=True, warmup_epochs=1, drop=0.0)
    plain, kit = (training(data, tmp_path / way, runs, **given) for way in ("plain", "replayed"))
    for learner in (*plain.learners.values(), *kit.learners.values()):
        for group in learner.optimizer.param_groups:
            group.update(fused=True, foreach=False)
    kit.steps.captures = True
    assert plain.to_the_end() and kit.to_the_end()
    assert captured == [kit.steps.graph] and kit.steps.eager_steps == kit_steps.EAGER_STEPS
    for name in runs:
        one, other = (last(tmp_path / way / name) for way in ("plain", "replayed"))
        assert_same_state(one, other, close=True)
        assert kit.learners[name].updates == plain.learners[name].updates == 6


# Runs.


@pytest.mark.parametrize("aa", [None, "cifar10"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(data, tmp_path, aa):
    given = dict(aa=aa, cutout=8, reprob=0.25, remode="const", workers=2)
    whole = training(data, tmp_path / "whole", **given)
    assert whole.to_the_end()
    part = training(data, tmp_path / "part", **given)
    assert not part.to_the_end(minutes=0)
    assert part.first.epoch == 1
    for kit in (whole, part):
        kit.batches.close()
    rest = training(data, tmp_path / "part", **given)
    assert rest.first.epoch == 1 and rest.to_the_end()
    rest.batches.close()
    one, other = (last(tmp_path / name / "dfs") for name in ("whole", "part"))
    assert one["epoch"] == other["epoch"] == 2
    assert_same_state(one, other)
    lines = (tmp_path / "part" / "dfs" / "exits.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]
    hours = [json.loads(line)["hours"] for line in lines]
    assert hours == sorted(hours) and hours[0] > 0  # they go on, too


@pytest.mark.parametrize(
    ("change", "told"),
    {
        "rate": (dict(lr=0.1), "lr=0.05 instead of 0.1"),
        "fewer epochs": (dict(epochs=2), "epochs=3 instead of 2"),
        "augmentation": (dict(cutout=8), "cutout=0 instead of 8"),
    }.values(),
    ids=["rate", "fewer epochs", "augmentation"],
)
def test_a_checkpoint_of_another_recipe_is_refused(data, tmp_path, change, told):
    training(data, tmp_path).to_the_end(minutes=0)
    with pytest.raises(ValueError, match=f"last.pth.tar was trained with {told}; take that recipe"):
        training(data, tmp_path, **change)
    with pytest.raises(ValueError, match="model_kwargs="):
        training(data, tmp_path, dict(dfs=dict(NETWORK, beta=0.75)))
    assert training(data, tmp_path, workers=1, val_interval=3).first.epoch == 1


def test_a_run_whose_checkpoint_alone_was_carried_has_a_record_again_and_claims_no_hours(data, tmp_path):
    training(data, tmp_path).to_the_end(minutes=0)
    record = (tmp_path / "dfs" / "args.yaml").read_text()
    for name in ("args.yaml", "exits.jsonl"):
        (tmp_path / "dfs" / name).unlink()
    assert training(data, tmp_path).to_the_end()
    assert (tmp_path / "dfs" / "args.yaml").read_text() == record
    assert [json.loads(line)["hours"] for line in (tmp_path / "dfs" / "exits.jsonl").open()] == [None, None]


def test_a_record_tells_of_the_crop_that_is_made(data, tmp_path):
    for given, scale in ((dict(pad=4), None), (dict(pad=None, workers=1), [0.08, 1.0])):
        args = training(data, tmp_path / str(given["pad"]), **given).args
        assert args.scale == scale and args.script == "benchmarks/gpu/run.py"


def test_runs_that_stand_at_different_epochs_are_refused(data, tmp_path):
    training(data, tmp_path, dict(one=NETWORK), epochs=2).to_the_end(minutes=0)
    with pytest.raises(ValueError, match="one at 1, other at 0"):
        training(data, tmp_path, dict(one=NETWORK, other=NETWORK), epochs=2)


def test_the_package_reads_the_checkpoint(data, tmp_path):
    training(data, tmp_path, dict(joint=dict(NETWORK, beta="joint")), epochs=1, dataset="hfds/x").to_the_end()
    pack.write_folders(data, tmp_path / "folders")
    command = ["eval", str(tmp_path / "joint" / "last.pth.tar"), "--json", "--data-dir", str(tmp_path / "folders")]
    shown = CliRunner().invoke(app, [*command, "--dataset", "torch/image_folder", "--split", "test", "--workers", "0"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    validated = json.loads((tmp_path / "joint" / "exits.jsonl").read_text())["validation"]["ema"]
    assert told["samples"] == 8 and told["top1"] == pytest.approx(validated)


@pytest.mark.slow
@pytest.mark.skipif(SCRIPTS is None, reason="TIMM_SCRIPTS does not name a folder with timm's train.py")
def test_a_run_ends_where_train_py_does(data, tmp_path):
    """timm's real train.py: one batch an epoch, so that its order does not matter, and nothing random."""
    pack.write_folders(data, tmp_path / "folders")
    script = tmp_path / "train.py"
    script.write_text((Path(SCRIPTS) / "train.py").read_text())
    command = [sys.executable, str(script), str(tmp_path / "folders"), "--device-modules", "timm_dfs"]
    command += ["--device", "cpu", "--model", "dfs_msdnet_cifar100", "--num-classes", "3", "--batch-size", "24"]
    command += ["--epochs", "3", "--warmup-epochs", "0", "--workers", "0", "--lr", "0.05", "--no-aug", "--model-ema"]
    command += ["--model-ema-decay", "0.5", "--val-split", "test", "--output", str(tmp_path), "--experiment", "script"]
    command += ["--model-kwargs", *(f"{key}={value}" for key, value in NETWORK.items())]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    given = dict(batch_size=24, drop=0.0, pad=0, hflip=0.0)
    assert training(data, tmp_path, **given).to_the_end()
    assert_same_state(last(tmp_path / "dfs"), last(tmp_path / "script"), close=True)
    losses = [
        [float(row.split(",")[1]) for row in (tmp_path / name / "summary.csv").read_text().splitlines()[1:]]
        for name in ("dfs", "script")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# The plan.


def test_the_plans_table_is_what_was_measured():
    text = (KIT / "gpu_plan.md").read_text()
    for line in map(json.loads, (KIT.parent / "results" / "gpu_speed.jsonl").read_text().splitlines()):
        (row,) = [
            row.split("|")[2:5]
            for row in text.splitlines()
            if row.startswith("|") and row.split("|")[1].strip() == ROWS[line["capture"], line["compiler"]]
        ]
        if line["runs"] == 2:
            assert [cell.strip() for cell in row[:2]] == [f"{line['step_ms']:.1f}", f"{line['epoch'] / 2:.2f}"]
        else:
            assert row[2].strip() == f"{line['epoch']:.2f}"


ROWS = {
    ("off", None): "eager, as train.py launches",
    ("chain", None): "graph, one after the other (`--capture chain`)",
    ("branches", None): "graph, side by side (`--capture branches`)",
    ("chain", "inductor"): "compiled by inductor, graph, one after the other",
    ("branches", "inductor"): "compiled by inductor, graph, side by side",
}
"""Rows of the table by how steps are captured, and the compiler."""

# Recipes.


@pytest.mark.parametrize("file", sorted(KIT.glob("recipes/*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_read(file):
    args = recipe.read_recipe(file, dict(model_kwargs=dict(beta="joint")))
    assert args.model_kwargs["beta"] == "joint" and args.batch_size == 500 and args.epochs in (240, 300)
    assert (host_augment.host_transform(args, MEAN, 32) is None) == (file.stem == "plain")


REFUSED = {
    "an unknown setting": (dict(mixup=0.2), "mixup"),
    "another optimizer": (dict(opt="adamw"), "'adamw'"),
    "an aggregator": (dict(model_kwargs=dict(aggregator="UPGrad")), "'UPGrad'"),
    "erasing with noise": (dict(reprob=0.1, remode="pixel"), "'pixel'"),
    "float16": (dict(amp=True), "'float16'"),
    "a teacher of features": (dict(kd_distill_type="feature"), "'feature'"),
    "no rate": (dict(lr=None), "lr None"),
    "timm's crop beside ours": (dict(pad=4, color_jitter=0.4), "color_jitter would be ignored"),
}


@pytest.mark.parametrize(("given", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_this_loop_cannot_do_is_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        recipe.read_recipe(None, settings(**given))


# Augmentation on the device.


def test_crops_are_parts_of_the_padded_image_each_its_own():
    images = torch.from_numpy(random_images(200, size=8))
    cropped = device_augment.crop(images, 2, 128)
    padded = nn.functional.pad(images, (2, 2, 2, 2), value=128)
    places = []
    for image, whole in zip(cropped, padded):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(image, whole[:, y : y + 8, x : x + 8])]
        assert len(found) == 1
        places += found
    counts = torch.zeros(5, 5)
    for y, x in places:
        counts[y, x] += 1
    assert (counts > 0).sum() >= 24  # 8 a place expected: one place in 3,000 stays empty
    assert torch.equal(device_augment.crop(images, 0, 128), images)


def test_flips_are_half_of_the_images():
    images = torch.from_numpy(random_images(400, size=4))
    flipped = device_augment.flip(images, 0.5)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all() and 150 < mirrored.sum() < 250
    assert torch.equal(device_augment.flip(images, 1.0), images.flip(-1))


def test_normalised_bytes_are_timms():
    images = torch.from_numpy(random_images(2, size=4))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = (images / 255 - mean) / std
    torch.testing.assert_close(device_augment.normalise(images, mean, std), expected)


def rectangles(x):
    """Top, left, height, width of what is 0 in images of ones (B, C, H, W); height 0 where nothing is."""
    found = []
    for image in x:
        gone = image == 0
        assert (gone == gone[0]).all()
        rows, columns = gone[0].any(1).nonzero().flatten(), gone[0].any(0).nonzero().flatten()
        if not len(rows):
            found.append((0, 0, 0, 0))
            continue
        top, left, height, width = rows[0], columns[0], len(rows), len(columns)
        assert gone[0, top : top + height, left : left + width].all() and gone[0].sum() == height * width
        found.append((int(top), int(left), height, width))
    return torch.tensor(found)


def test_cutouts_are_squares_around_any_pixel_cut_at_the_edge():
    found = rectangles(device_augment.cutout(torch.ones(2000, 3, 12, 12), 4))
    for axis in range(2):
        first, length = found[:, axis], found[:, axis + 2]
        assert set(length.tolist()) == {2, 3, 4}  # with the middle at pixel 0; at 1 or 11; elsewhere
        assert ((length == 4) | (first == 0) | (first + length == 12)).all()
        middle = torch.where(first > 0, first + 2, length - 2)
        assert torch.bincount(middle, minlength=12).min() > 100  # 167 expected
    assert torch.equal(device_augment.cutout(torch.ones(2, 3, 4, 4), 0), torch.ones(2, 3, 4, 4))
    with pytest.raises(ValueError, match="3"):
        device_augment.cutout(torch.ones(2, 3, 4, 4), 3)


def test_erased_rectangles_are_distributed_as_timms():
    torch.manual_seed(0)
    found = rectangles(device_augment.erase(torch.ones(4000, 1, 32, 32), 0.25))
    erasing = RandomErasing(0.25, mode="const", device="cpu")
    random.seed(0)
    theirs = rectangles(erasing(torch.ones(4000, 1, 32, 32)))
    ours, theirs = found[found[:, 2] > 0].float(), theirs[theirs[:, 2] > 0].float()
    assert abs(len(ours) / 4000 - 0.25) < 0.03 and abs(len(theirs) / 4000 - 0.25) < 0.03
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(ours, 0), statistic(theirs, 0), rtol=0.1, atol=0)
    assert (ours[:, :2] + ours[:, 2:]).max() == 32 and ours[:, :2].min() == 0
    assert torch.equal(device_augment.erase(torch.ones(2, 1, 4, 4), 0.0), torch.ones(2, 1, 4, 4))


# Augmentation on the processor.


def brighter(image):
    return Image.fromarray(np.minimum(np.asarray(image), 254) + np.random.randint(2, dtype=np.uint8))


def test_workers_give_the_epochs_images_in_order_and_the_same_ones_whoever_works():
    images, labels = random_images(20, size=8), np.arange(20)
    seen = []
    for workers in (1, 3):
        of_epochs = kit_batches.Batches(images, labels, brighter, 4, workers, 7, 3, torch.device("cpu"))
        seen.append([[(x.clone(), y) for x, y in of_epochs.epoch(number)] for number in range(3)])
        of_epochs.close()
    for epoch, its_other in zip(*seen):
        assert sorted(torch.cat([y for _, y in epoch]).tolist()) == list(range(20))
        for (x, y), (other_x, other_y) in zip(epoch, its_other):
            assert torch.equal(x, other_x) and torch.equal(y, other_y)
            added = x.int() - torch.from_numpy(images)[y].clamp(max=254).int()
            assert set(added.flatten().tolist()) <= {0, 1}
    assert not torch.equal(seen[0][0][0][1], seen[0][1][0][1])  # another order in another epoch


def test_an_epoch_begun_late_is_the_same_epoch():
    images, labels = random_images(8, size=8), np.arange(8)
    found = []
    for first in (0, 1):
        of_epochs = kit_batches.Batches(images, labels, brighter, 4, 1, 7, 2, torch.device("cpu"))
        for number in range(first, 2):
            epoch = [x.clone() for x, _ in of_epochs.epoch(number)]
        found.append(torch.cat(epoch))
        of_epochs.close()
    assert torch.equal(*found)


def broken(image):
    raise ValueError("a broken transform")


def test_a_workers_error_reaches_the_training():
    of_epochs = kit_batches.Batches(random_images(4), np.arange(4), broken, 4, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="a broken transform"):
        list(of_epochs.epoch(0))
    of_epochs.close()


# Files.


@pytest.fixture
def parquet(tmp_path):
    """Twelve images in two splits, stored as lossless WebP."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    images = random_images(12, size=8)
    for name, rows in (("train-0", range(8)), ("test-0", range(8, 12))):
        stored = []
        for row in rows:
            buffer = io.BytesIO()
            Image.fromarray(images[row].transpose(1, 2, 0)).save(buffer, "webp", lossless=True)
            stored.append(dict(bytes=buffer.getvalue(), path=None))
        writer.write_table(pyarrow.table(dict(img=stored, fine_label=list(rows))), tmp_path / f"{name}.parquet")
    return images, sorted(tmp_path.glob("*.parquet"))


def test_packed_images_come_back_pixel_by_pixel(parquet, tmp_path):
    images, files = parquet
    pieces = pack.pack(files, tmp_path / "pieces", 3)
    assert len(pieces) == 3 and max(p.stat().st_size for p in pieces) < sum(p.stat().st_size for p in pieces) / 2
    assert pack.unpack(tmp_path / "pieces", tmp_path / "data") == dict(train=8, test=4)
    for split, expected in (("train", slice(0, 8)), ("test", slice(8, 12)), ("train[2:5]", slice(2, 5))):
        found, labels = pack.read_split(tmp_path / "data", split)
        assert (found == images[expected]).all() and labels.tolist() == list(range(12))[expected]
    with pytest.raises(ValueError, match="'valid'"):
        pack.read_split(tmp_path / "data", "valid")
    pieces[1].unlink()
    with pytest.raises(ValueError, match="images-1-of-3"):
        pack.unpack(tmp_path / "pieces", tmp_path / "data")


def test_a_checkpoint_in_pieces_comes_back(data, tmp_path):
    training(data, tmp_path, epochs=2, val_interval=1).to_the_end(minutes=0)
    checkpoint = tmp_path / "dfs" / "last.pth.tar"
    pieces = kit_state.split(checkpoint, tmp_path / "out", largest=100_000)
    assert len(pieces) > 2 and max(piece.stat().st_size for piece in pieces) <= 100_000
    kit_state.join(pieces[::-1], tmp_path / "joined" / "last.pth.tar")
    assert (tmp_path / "joined" / "last.pth.tar").read_bytes() == checkpoint.read_bytes()
    with pytest.raises(ValueError, match="00-of-"):
        kit_state.join(pieces[1:], tmp_path / "joined" / "last.pth.tar")
    pieces[0].write_bytes(b"changed")
    with pytest.raises(ValueError, match="have changed"):
        kit_state.join(pieces, tmp_path / "joined" / "last.pth.tar")


def test_a_halved_checkpoint_is_nearly_the_run_and_goes_on(data, tmp_path):
    training(data, tmp_path / "whole", epochs=2).to_the_end(minutes=0)
    checkpoint = tmp_path / "whole" / "dfs" / "last.pth.tar"
    pieces = kit_state.split(checkpoint, tmp_path / "out", half=True)
    kit_state.join(pieces, tmp_path / "joined" / "dfs" / "last.pth.tar")
    whole, halved = last(tmp_path / "whole" / "dfs"), last(tmp_path / "joined" / "dfs")
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(halved["state_dict"][key].to(value.dtype), value, rtol=2**-10, atol=1e-6)
        assert halved["state_dict"][key].dtype == (torch.float16 if value.ndim > 1 else value.dtype)
    rest = training(data, tmp_path / "joined", epochs=2)
    assert rest.first.epoch == 1 and next(rest.first.model.parameters()).dtype == torch.float32
    assert {state["momentum_buffer"].dtype for state in rest.first.optimizer.state.values()} == {torch.float32}
    assert rest.to_the_end()


# Counts.


def test_a_steps_cost_counts_arithmetic_and_traffic():
    model = timm.create_model("dfs_msdnet_cifar100", num_classes=CLASSES, beta="joint", **NETWORK)
    cost = kit_floor.count(model)
    forward = timm_dfs.exit_flops(model)[-1]
    assert 2.5 * forward < cost.multiply_adds < 4 * forward  # forward, and twice it backward less the first layer's
    assert cost.kernels > 100 and cost.bytes > 1e5
