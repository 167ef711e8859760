"""timm's real, unmodified train.py trains every exit. It is in timm's repository, not in its wheel."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import timm_dfs  # noqa: F401  registers the models

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
NETWORK = dict(exits=3, base=2, step=1, stem_width=4, growth_rate=4, head_width=8)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SCRIPTS is None, reason="TIMM_SCRIPTS does not name a folder with timm's train.py"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set in folders: train and validation, three classes of flat colours."""
    root = tmp_path_factory.mktemp("pictures")
    for split in ("train", "validation"):
        for label in range(3):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(8):
                colour = np.full((32, 32, 3), 20 * i, np.uint8)
                colour[..., label] = 255
                Image.fromarray(colour).save(root / split / str(label) / f"{i}.png")
    return root


def model_kwargs(**settings):
    return ("--model-kwargs", *(f"{key}={value}" for key, value in dict(NETWORK, **settings).items()))


def run(pictures, output, *flags, launcher=(), environment=None):
    # A script's folder comes first on Python's path, and timm's repository also holds the package: run a copy.
    script = output / "train.py"
    script.write_text((Path(SCRIPTS) / "train.py").read_text())
    python = [sys.executable, *launcher] if launcher else [sys.executable]
    command = [*python, str(script), str(pictures), "--device-modules", "timm_dfs", "--device", "cpu"]
    command += ["--model", "dfs_msdnet_cifar100", *model_kwargs()]
    command += ["--num-classes", "3", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0", "--workers", "0"]
    command += ["--output", str(output), "--experiment", "run", "--lr", "0.05", "--smoothing", "0", *flags]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=output, env=dict(os.environ, **environment or {})
    )


def train(pictures, output, *flags, **options):
    finished = run(pictures, output, *flags, **options)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return torch.load(output / "run" / "last.pth.tar", weights_only=False)


def torchrun(processes):
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))


TRAINED = {
    "smoothing": ("--smoothing", "0.1"),
    "mixup and cutmix": ("--mixup", "0.2", "--cutmix", "0.5"),
    "binary cross-entropy": ("--bce-loss",),
    "JSD over augmentation splits": ("--jsd-loss", "--aug-splits", "2", "--aa", "rand-m3"),
    "bf16, channels_last": ("--amp", "--amp-dtype", "bfloat16", "--channels-last"),
    "compiled": ("--torchcompile", "eager"),
    "EMA": ("--model-ema", "--model-ema-decay", "0.5"),
    "accumulation": ("--grad-accum-steps", "2"),
    "clipped": ("--clip-grad", "1.0"),
    "adaptive clipping": ("--clip-grad", "0.1", "--clip-mode", "agc"),
    "head scale and bias": ("--head-init-scale", "0.5", "--head-init-bias", "0.1"),
    "layer decay": ("--layer-decay", "0.8", "--opt", "adamw"),
    "checkpointing": ("--grad-checkpointing",),
    "joint": model_kwargs(beta="joint"),
    "a beta for each exit": model_kwargs(beta="[0.5,0.9]"),
    "chained": model_kwargs(beta="joint", chain=0.5, gradient_equilibrium=True),
    "chained, EMA": (*model_kwargs(chain=0.5), "--model-ema", "--model-ema-decay", "0.5"),
    "chained, aggregation": model_kwargs(chain=0.5, aggregator="UPGrad"),
    "weights": model_kwargs(loss_weights="(1,0.5,1)"),
    "distillation": model_kwargs(distill_weight=0.3, distill_feature_weight=0.03),
    "equilibrium": model_kwargs(gradient_equilibrium=True),
    "heads only": model_kwargs(train_backbone=False),
    "aggregation": model_kwargs(aggregator="UPGrad"),
    "aggregation in bf16": (*model_kwargs(aggregator="PCGrad"), "--amp", "--amp-dtype", "bfloat16"),
}


@pytest.mark.parametrize("flags", TRAINED.values(), ids=TRAINED)
def test_every_exit_is_trained_whatever_the_flags(pictures, tmp_path, flags):
    started = 0.1 if "--head-init-bias" in flags else 0.0
    trained = train(pictures, tmp_path, *flags)
    for k in range(NETWORK["exits"]):
        bias = trained["state_dict"][f"heads.{k}.fc.bias"]
        assert (bias != started).any(), f"exit {k} was not trained"
        if "--model-ema" in flags:
            assert not torch.equal(trained["state_dict_ema"][f"heads.{k}.fc.bias"], bias)


REFUSED = {
    "features of another network": (("--kd-model-name", "x", "--kd-distill-type", "feature"), "distill_weight"),
    "TorchScript": (("--torchscript",), "TorchScript"),
    "accumulation of aggregates": ((*model_kwargs(aggregator="UPGrad"), "--grad-accum-steps", "2"), "accumulated"),
    "an unknown aggregator": (model_kwargs(aggregator="pcgrad"), "'PCGrad'"),
    "betas of the wrong number": (model_kwargs(beta="[0.5]"), "2 early exits"),
    "weights of the wrong number": (model_kwargs(loss_weights="(1,1)"), "loss_weights has 2 entries"),
    "a flag of other networks": (("--drop-path", "0.1"), "drop_path_rate"),
}


@pytest.mark.parametrize(("flags", "reason"), REFUSED.values(), ids=REFUSED)
def test_unsupported_flags_stop_with_the_reason(pictures, tmp_path, flags, reason):
    finished = run(pictures, tmp_path, *flags)
    assert finished.returncode != 0
    assert reason in finished.stderr.strip().splitlines()[-1]


def test_reentrant_checkpointing_stops_with_the_reason(pictures, tmp_path):
    finished = run(pictures, tmp_path, "--grad-checkpointing", environment=dict(TIMM_REENTRANT_CKPT="1"))
    assert finished.returncode != 0 and "reentrant" in finished.stderr.strip().splitlines()[-1]


def test_the_log_has_loss_and_accuracy_of_every_exit(pictures, tmp_path):
    finished = run(pictures, tmp_path)
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("Exits 0 to 2:")][:1]
    loss, accuracy = line.partition("Loss:")[2].split("Acc@1:")
    assert len(loss.split()) == len(accuracy.split()) == 3


def test_heads_only_leaves_the_backbone_as_it_was(pictures, tmp_path):
    train(pictures, tmp_path, "--epochs", "1")
    before = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)["state_dict"]
    start = tmp_path / "start.pth.tar"
    torch.save(before, start)
    flags = ("--initial-checkpoint", str(start), *model_kwargs(train_backbone=False), "--experiment", "heads")
    train(pictures, tmp_path, *flags)
    after = torch.load(tmp_path / "heads" / "last.pth.tar", weights_only=False)["state_dict"]
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"heads"}


@pytest.mark.parametrize("settings", [{}, dict(aggregator="UPGrad"), dict(train_backbone=False)], ids=str)
def test_two_processes_train_every_exit(pictures, tmp_path, settings):
    trained = train(pictures, tmp_path, *model_kwargs(**settings), launcher=torchrun(2))
    for k in range(NETWORK["exits"]):
        assert (trained["state_dict"][f"heads.{k}.fc.bias"] != 0).any()


@pytest.mark.parametrize(
    ("flags", "launcher"),
    [
        (("--task-loss-weight", "0.5"), ()),
        (("--torchcompile", "eager", "--amp", "--amp-dtype", "bfloat16"), ()),
        (model_kwargs(aggregator="UPGrad", chain=0.5), torchrun(2)),
        (model_kwargs(teacher_loss="dkd", teacher_size=48), ()),
    ],
    ids=["weighted", "compiled in bf16", "two processes, aggregation, chained", "decoupled, at its own size"],
)
def test_another_network_teaches_every_exit(pictures, tmp_path, flags, launcher):
    save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path / "teacher", model_args={})
    teacher = ("--kd-model-name", f"local-dir:{tmp_path / 'teacher'}")
    trained = train(pictures, tmp_path, *teacher, *flags, launcher=launcher)
    for k in range(NETWORK["exits"]):
        assert (trained["state_dict"][f"heads.{k}.fc.bias"] != 0).any()
    assert not any("teacher" in key for key in trained["state_dict"])


def test_a_teacher_of_other_classes_stops_with_the_reason(pictures, tmp_path):
    save_for_hf(timm.create_model("test_resnet", num_classes=4), tmp_path / "teacher", model_args={})
    finished = run(pictures, tmp_path, "--kd-model-name", f"local-dir:{tmp_path / 'teacher'}")
    assert finished.returncode != 0 and "trained on 4 classes" in finished.stderr.strip().splitlines()[-1]


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(pictures, tmp_path):
    """Where train.py is deterministic: under torchrun, which orders by epoch, without augmentation or dropout."""
    flags = ("--no-aug", "--model-ema", "--model-ema-decay", "0.5", "--epochs", "3")
    whole = train(pictures, tmp_path, *flags, launcher=torchrun(2))
    first = tmp_path / "run" / "checkpoint-0.pth.tar"
    train(pictures, tmp_path, *flags, "--resume", str(first), "--experiment", "resumed", launcher=torchrun(2))
    resumed = torch.load(tmp_path / "resumed" / "last.pth.tar", weights_only=False)
    assert resumed["epoch"] == whole["epoch"] == 2
    for part in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(resumed[part][key], value) for key, value in whole[part].items()), part
    states = [checkpoint["optimizer"]["state"] for checkpoint in (whole, resumed)]
    assert all(
        torch.equal(states[1][key]["momentum_buffer"], value["momentum_buffer"]) for key, value in states[0].items()
    )
    assert resumed["optimizer"]["param_groups"][0]["lr"] == whole["optimizer"]["param_groups"][0]["lr"]
    losses = [(tmp_path / name / "summary.csv").read_text().splitlines()[-1] for name in ("run", "resumed")]
    assert losses[0] == losses[1]


def test_a_checkpoint_starts_another_run_and_is_evaluated_at_every_exit(pictures, tmp_path):
    train(pictures, tmp_path, "--epochs", "1")
    start = str(tmp_path / "run" / "last.pth.tar")
    overlay = ("--pretrained", "--pretrained-path", start, "--experiment", "second")
    train(pictures, tmp_path, *overlay)
    command = [sys.executable, "-m", "timm_dfs.cli", "eval", str(tmp_path / "second" / "last.pth.tar"), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert '"samples": 24' in shown.stdout


def test_timms_own_validation_runs_with_the_plugin(pictures, tmp_path):
    train(pictures, tmp_path, "--epochs", "1")
    checkpoint = str(tmp_path / "run" / "last.pth.tar")
    (tmp_path / "validate.py").write_text((Path(SCRIPTS) / "validate.py").read_text())
    command = [sys.executable, "-m", "timm_dfs.cli", "timm", str(tmp_path / "validate.py"), str(pictures)]
    command += ["--model", "dfs_msdnet_cifar100", *model_kwargs(), "--num-classes", "3", "--checkpoint", checkpoint]
    command += ["--device", "cpu", "--workers", "0", "--batch-size", "8"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert '"top1"' in shown.stdout


def test_the_model_of_a_run_has_the_given_arguments(pictures, tmp_path):
    trained = train(pictures, tmp_path, *model_kwargs(beta="joint"))
    model = timm.create_model("dfs_msdnet_cifar100", num_classes=3, beta="joint", **NETWORK)
    model.load_state_dict(trained["state_dict"])
