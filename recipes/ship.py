"""From a finished run of timm's train.py to the model's folder under hub/: weights, config, results, card.

    python recipes/ship.py output/train/RUN --recipe recipes/dfs_msdnet_cifar100_short.yaml

Thresholds are fixed on the recipe's validation split, which it holds out of training; the test split is only
measured. What is measured is the shipped half-precision file.
"""

import argparse
import json
import platform
import shutil
import subprocess
from pathlib import Path

import datasets
import timm
import torch
import yaml

import timm_dfs
from timm_dfs import card, hub
from timm_dfs.budget import BudgetPoint
from timm_dfs.flops import last_exit_flops
from timm_dfs.images import dataset_loader

BALANCED = (
    "the cheapest of 40 points with geometric exit fractions that is at least as accurate as the last exit on those "
    "images, or the most accurate where none is"
)

HUB = Path(__file__).parent.parent / "hub"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="train.py's output folder: args.yaml, last.pth.tar")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe the run was made with")
    args = parser.parse_args()

    recipe, run = (yaml.safe_load(file.read_text()) for file in (args.recipe, args.run / "args.yaml"))
    differing = [
        key for key, value in recipe.items() if run[key] != value and key not in ("dataset", "train_split", "val_split")
    ]
    if differing:
        parser.error(f"the run differs from the recipe in {', '.join(differing)}")
    checkpoint = args.run / "last.pth.tar"
    epochs = torch.load(checkpoint, map_location="cpu", weights_only=False)["epoch"] + 1
    if epochs != run["epochs"]:
        parser.error(f"the run stopped after {epochs} of {run['epochs']} epochs")

    trained = timm.create_model(
        run["model"],
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(checkpoint)),
        **run["model_kwargs"],
    )
    folder = HUB / (run["model"] + ".new")  # takes the old one's place when it is whole
    hub.write_weights(trained, folder)

    def shipped() -> timm_dfs.MultiExitModel:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def logits_of(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        keys = run["input_key"], run["target_key"]
        loader = dataset_loader(shipped(), run["dataset"], run["data_dir"], split, *keys, batch_size=128, workers=1)
        return timm_dfs.collect_logits(shipped(), loader)

    flops, lazy = timm_dfs.exit_flops(trained), timm_dfs.exit_flops(trained, lazy=True)
    val, test = logits_of(run["val_split"]), logits_of("test")
    point = balanced(val, lazy)
    thresholds = [None if value == float("inf") else value for value in point.thresholds[:-1]] + [0.0]
    trained.presets = {"balanced": dict(thresholds=thresholds, confidence="max_prob")}
    hub.write_weights(trained, folder)

    presets = {name: measure(timm_dfs.ExitPolicy(**preset), test, lazy) for name, preset in trained.presets.items()}
    results = dict(
        model=run["model"],
        dataset=recipe["dataset"].removeprefix("hfds/"),
        flops=flops,
        flops_lazy=lazy,
        last_exit_flops=last_exit_flops(trained),
        golden_logits=hub.golden_logits(shipped()),
        balanced=BALANCED,
        held_out=dict(split=run["val_split"], **accuracy(val)),
        test=dict(
            split="test",
            **accuracy(test),
            presets=presets,
            budgeted_batch=[
                dict(average_flops=p.average_flops, top1=p.accuracy) for p in timm_dfs.budgeted_batch(val, test, lazy)
            ],
        ),
        training=dict(
            recipe=args.recipe.name,
            epochs=epochs,
            seed=run["seed"],
            samples=len(datasets.load_dataset(run["dataset"].removeprefix("hfds/"), split=run["train_split"])),
            batch_size=run["batch_size"],
            hardware=f"{torch.get_num_threads()} threads of {processor()}",
            hours=(checkpoint.stat().st_mtime - (args.run / "args.yaml").stat().st_mtime) / 3600,
            versions=dict(torch=torch.__version__, timm=timm.__version__, timm_dfs=timm_dfs.__version__),
        ),
        shipped_from_commit=subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
    )
    (folder / hub.RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n")
    card.write_card(folder)
    final = HUB / run["model"]
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    print((final / hub.CARD_FILE).read_text())


def accuracy(split: tuple[torch.Tensor, torch.Tensor]) -> dict:
    logits, targets = split
    return dict(
        samples=len(targets),
        top1=timm_dfs.anytime_accuracy(logits, targets).tolist(),
        top5=timm_dfs.anytime_accuracy(logits, targets, topk=5).tolist(),
        ece=timm_dfs.calibration_error(logits, targets).tolist(),
    )


def balanced(val: tuple[torch.Tensor, torch.Tensor], flops: list[int]) -> BudgetPoint:
    """What :data:`BALANCED` says, on the validation split."""
    last = timm_dfs.anytime_accuracy(*val)[-1].item()
    curve = timm_dfs.budgeted_batch(val, val, flops)
    return min(
        (point for point in curve if point.accuracy >= last),
        key=lambda point: point.average_flops,
        default=max(curve, key=lambda point: point.accuracy),
    )


def measure(policy: timm_dfs.ExitPolicy, test: tuple[torch.Tensor, torch.Tensor], flops: list[int]) -> dict:
    logits, targets = test
    exits = policy.exit_index(logits)
    answers = logits.argmax(-1).gather(0, exits[None])[0]
    return dict(
        top1=100 * (answers == targets).double().mean().item(),
        average_flops=torch.tensor(flops, dtype=torch.float64)[exits].mean().item(),
        exit_shares=(torch.bincount(exits, minlength=len(flops)) / len(exits)).tolist(),
    )


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
