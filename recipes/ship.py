"""From a finished run of timm's train.py to the model's folder under hub/: weights, config, results, card.

    python recipes/ship.py output/train/RUN --recipe recipes/dfs_msdnet_cifar100_short.yaml

Thresholds are fixed on the recipe's validation split, which it holds out of training; the test split is only
measured. What is measured is the shipped half-precision file.
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path

import datasets
import timm
import torch
import yaml

import timm_dfs
from timm_dfs import hub
from timm_dfs.budget import BudgetPoint
from timm_dfs.flops import last_exit_flops
from timm_dfs.images import dataset_loader

HUB = Path(__file__).parent.parent / "hub"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="train.py's output folder: args.yaml, last.pth.tar")
    parser.add_argument("--dataset", help="where the recipe's data set is, as given to train.py")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe the run was made with")
    args = parser.parse_args()

    recipe = yaml.safe_load(args.recipe.read_text())
    dataset = args.dataset or recipe["dataset"]
    run = yaml.safe_load((args.run / "args.yaml").read_text())
    checkpoint = args.run / "last.pth.tar"
    trained = timm.create_model(
        run["model"],
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(checkpoint)),
        **run["model_kwargs"],
    )
    folder = HUB / run["model"]
    hub.write_weights(trained, folder)

    def shipped() -> timm_dfs.MultiExitModel:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def logits_of(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        keys = run["input_key"], run["target_key"]
        return timm_dfs.collect_logits(shipped(), dataset_loader(shipped(), dataset, None, split, *keys, 128, 1))

    flops, lazy = timm_dfs.exit_flops(trained), timm_dfs.exit_flops(trained, lazy=True)
    val, test = logits_of(recipe["val_split"]), logits_of("test")
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
        held_out=dict(split=recipe["val_split"], **accuracy(val)),
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
            epochs=run["epochs"],
            seed=run["seed"],
            samples=len(datasets.load_dataset(dataset.removeprefix("hfds/"), split=recipe["train_split"])),
            batch_size=run["batch_size"],
            hardware=f"{torch.get_num_threads()} threads of {processor()}",
            hours=(checkpoint.stat().st_mtime - (args.run / "args.yaml").stat().st_mtime) / 3600,
            versions=dict(torch=torch.__version__, timm=timm.__version__, timm_dfs=timm_dfs.__version__),
            commit=subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip(),
        ),
    )
    (folder / hub.RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n")
    hub.write_card(folder)
    print((folder / hub.CARD_FILE).read_text())


def accuracy(split: tuple[torch.Tensor, torch.Tensor]) -> dict:
    logits, targets = split
    return dict(
        samples=len(targets),
        top1=timm_dfs.anytime_accuracy(logits, targets).tolist(),
        top5=timm_dfs.anytime_accuracy(logits, targets, topk=5).tolist(),
        ece=timm_dfs.calibration_error(logits, targets).tolist(),
    )


def balanced(val: tuple[torch.Tensor, torch.Tensor], flops: list[int]) -> BudgetPoint:
    """The cheapest operating point that is at least as accurate as the last exit, on the validation split."""
    last = timm_dfs.anytime_accuracy(*val)[-1].item()
    return min(
        (point for point in timm_dfs.budgeted_batch(val, val, flops) if point.accuracy >= last),
        key=lambda point: point.average_flops,
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
