"""Comparison of joint training and DFS settings: one network and schedule, the same seeds for all, two lengths.

    python benchmarks/study.py --dataset uoft-cs/cifar100 --output benchmarks/results/study.jsonl
    python benchmarks/study.py --dataset uoft-cs/cifar100 --recipe randaugment --epochs 30 \\
        --output benchmarks/results/study_randaugment.jsonl

Each run is one line of the output: what outcome.py says of the last 5,000 training images, which are held out. With
the same seed, all settings start from the same weights and train on the same batches. Runs that the output already
contains are skipped, so the study can be interrupted, and several processes can divide the seeds or settings.

The network is a small MSDNet, trained with SGD and one cycle of the learning rate.
"""

import argparse
import json
from pathlib import Path

import torch
from common import Augmentation, Trainer, load, normaliser
from outcome import outcome

import timm_dfs
from timm_dfs.base.objective import Objective
from timm_dfs.evaluation.machine import describe_machine

SETTINGS = {
    "joint": dict(beta="joint"),
    "one-sided 0.3": dict(beta=0.3, referencing="one_sided"),
    "one-sided 0.5": dict(beta=0.5, referencing="one_sided"),
    "one-sided 0.7": dict(beta=0.7, referencing="one_sided"),
    "one-sided 0.9": dict(beta=0.9, referencing="one_sided"),
    "one-sided 0.5 to 1": dict(beta=[0.5, 0.75, 1.0, 1.0], referencing="one_sided"),
    "two-sided 0.5": dict(beta=0.5, referencing="two_sided"),
    "joint, distilled": dict(beta="joint", distill_weight=0.3),
    "joint, backbone first": dict(beta="joint"),
    "one-sided 0.5, distilled": dict(beta=0.5, referencing="one_sided", distill_weight=0.3),
    "joint, chained": dict(beta="joint", chain=0.5),
    "one-sided 0.5, chained": dict(beta=0.5, referencing="one_sided", chain=0.5),
    "one-sided 0.9, chained": dict(beta=0.9, referencing="one_sided", chain=0.5),
}
"""Model arguments of each setting. The weight of distillation is that of the official ResNet recipe, the
chain BoostNet's; "0.5 to 1" partitions the first two exits' features alone."""

BACKBONE_FIRST = {"joint, backbone first"}
"""Settings that train the last exit alone for the first half, then all exits (Kubaty et al., ICML 2025)."""

RECIPES = {
    "published": dict(
        model="dfs_msdnet_cifar100",
        model_kwargs=dict(
            exits=5, base=2, step=1, stem_width=8, growth_rate=8, head_width=64, num_classes=100, drop_rate=0.0
        ),
        lr=0.1,
        batch_size=128,
        dtype="float32",
    )
}
RECIPES["randaugment"] = dict(
    RECIPES["published"], dtype="bfloat16", augmentation=dict(aa="rand-m9-mstd0.5-inc1", reprob=0.25)
)
"""By name of the augmentation: that which is published, crops and mirroring alone, and RandAugment with erasing, the
modern form of AutoAugment with Cutout, which the official code has on by default. The second uses bfloat16 for time's
sake: no setting of one is compared with one of the other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="uoft-cs/cifar100", help="on the Hub, or a folder with its parquet files")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs="*", default=[2, 6])
    parser.add_argument("--recipe", choices=list(RECIPES), default="published", help="of the augmentation")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines, one for each run")
    args = parser.parse_args()

    recipe = RECIPES[args.recipe]
    train, held_out = load(args.dataset)
    for epochs in args.epochs:
        for seed in args.seeds:
            for setting in args.settings:
                if any(same(run, setting, seed, epochs) for run in read(args.output, recipe)):
                    continue
                result = run(setting, seed, epochs, recipe, train, held_out)
                with args.output.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                top1 = " ".join(f"{value:.2f}" for value in result["top1"])
                print(f"{epochs} epochs, seed {seed}, {setting}: {top1}", flush=True)


def read(file: Path, recipe: dict) -> list[dict]:
    """The runs in a file; none if it does not exist.

    Raises:
        ValueError: If they were made with another recipe.
    """
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if any(run["recipe"] != recipe for run in runs):
        raise ValueError(f"{file} has runs of another recipe, which are not comparable; give another --output.")
    return runs


def same(run: dict, setting: str, seed: int, epochs: int) -> bool:
    """Whether a run has this setting, seed and number of epochs."""
    return (run["setting"], run["seed"], run["epochs"]) == (setting, seed, epochs)


def run(setting: str, seed: int, epochs: int, recipe: dict, train: tuple, held_out: tuple) -> dict:
    """Train one network and measure every exit's accuracy, in percent, on the held-out images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batch_size, samples = recipe["batch_size"], len(train[0])
    kwargs = dict(recipe["model_kwargs"], **SETTINGS[setting])
    steps = epochs * (samples // batch_size)
    trainer = Trainer(recipe["model"], kwargs, recipe["lr"], steps, getattr(torch, recipe["dtype"]))
    torch.compiler.reset()  # otherwise it stops compiling after eight networks of a class
    trainer.task.compile()  # 1.15 times faster
    normalise = normaliser(trainer.model)
    augmentation = Augmentation(normalise, **recipe.get("augmentation", {}))
    every_exit = trainer.task.criterion.objective
    for epoch in range(epochs):
        only_last = setting in BACKBONE_FIRST and epoch < epochs // 2
        trainer.task.criterion.objective = last_exit_only(trainer.model) if only_last else every_exit
        order = torch.randperm(samples, generator=generator)
        for chosen in order[: samples // batch_size * batch_size].split(batch_size):
            trainer.step(augmentation(train[0][chosen], generator), train[1][chosen])
    loader = [(normalise(x), target) for x, target in zip(held_out[0].split(250), held_out[1].split(250))]
    logits, targets = timm_dfs.collect_logits(trainer.model, loader)
    return dict(
        setting=setting,
        seed=seed,
        epochs=epochs,
        **outcome(logits, targets, timm_dfs.exit_flops(trainer.model, lazy=True)),
        recipe=recipe,
        machine=describe_machine(),
    )


def last_exit_only(model: timm_dfs.MultiExitModel) -> Objective:
    """Objective that trains the last exit alone."""
    return Objective(loss_weights=[0.0] * (model.num_exits - 1) + [1.0])


if __name__ == "__main__":
    main()
