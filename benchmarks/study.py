"""Comparison of joint training and DFS settings: one network and schedule, the same seeds for all, two lengths.

    python benchmarks/study.py --dataset uoft-cs/cifar100 --output benchmarks/results/study.jsonl
    python benchmarks/study.py --dataset uoft-cs/cifar100 --recipe randaugment --epochs 30 \\
        --output benchmarks/results/study_randaugment.jsonl
    python benchmarks/study.py --dataset uoft-cs/cifar100 --recipe plain --epochs 60 --seeds 0 \\
        --settings joint "one-sided 0.5" --output benchmarks/results/study_plain.jsonl

Each run is one line of the output: what outcome.py says of the last 5,000 training images, which are held out. With
the same seed, all settings start from the same weights and train on the same batches. Runs that the output already
contains are skipped, and a run goes on after its last whole epoch, so the study can be interrupted; several processes,
each with its own output, can divide the seeds or settings.

The network is a small MSDNet, trained with SGD and one cycle of the learning rate.
"""

import argparse
import json
from pathlib import Path

import timm
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
    "joint, taught": dict(beta="joint", teacher_size=96),
    "one-sided 0.5, taught": dict(beta=0.5, referencing="one_sided", teacher_size=96),
    "joint, taught at 1": dict(beta="joint", teacher_size=96),
    "one-sided 0.5, taught at 1": dict(beta=0.5, referencing="one_sided", teacher_size=96),
    "one-sided 0.9, taught at 1": dict(beta=0.9, referencing="one_sided", teacher_size=96),
    "joint, chained, taught at 1": dict(beta="joint", chain=0.5, teacher_size=96),
    "last exit alone": dict(beta="joint", loss_weights=[0.0, 0.0, 0.0, 0.0, 1.0]),
}
"""Model arguments of each setting. The weight of distillation is that of the official ResNet recipe, the
chain BoostNet's; "0.5 to 1" partitions the first two exits' features alone; "taught" is by :data:`TEACHER`, which sees
the images at the size it was trained at, as :data:`TEACHING` says; "last exit alone" is the network without early
exits."""

TEACHER = "dfs_tf_efficientnet_lite0.cifar100"
"""The teacher of the settings that have one, by its last exit: from ImageNet weights, fine-tuned on the same training
images, without the held-out ones."""

_WEIGHTS = dict(distill_loss_weight=0.9, task_loss_weight=0.1)

TEACHING = {"taught": dict(_WEIGHTS, temperature=4.0), "taught at 1": dict(_WEIGHTS, temperature=1.0)}
"""Weights and temperature of its loss: those usual on CIFAR-100 since Hinton et al. (arXiv 1503.02531); and, as this
teacher was trained with label smoothing, so that its predictions are soft as they are, a temperature of 1."""

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
RECIPES["plain"] = dict(RECIPES["published"], dtype="bfloat16")
RECIPES["randaugment"] = dict(RECIPES["plain"], augmentation=dict(aa="rand-m9-mstd0.5-inc1", reprob=0.25))
"""By name. The augmentation that is published is crops and mirroring alone; the same in bfloat16, which takes less time
("plain"); and that with RandAugment and erasing, the modern form of AutoAugment with Cutout, which the official code
has on by default. No setting in float32 is compared with one in bfloat16."""


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
                state = args.output.with_name(f"{args.output.stem}, {setting}, seed {seed}, {epochs} epochs.pt")
                result = run(setting, seed, epochs, recipe, train, held_out, state)
                with args.output.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                state.unlink()
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


def teaching_of(setting: str) -> str | None:
    """The key of :data:`TEACHING` by which a setting's networks are taught; ``None`` without a teacher."""
    return next((name for name in TEACHING if setting.endswith(f", {name}")), None)


def run(setting: str, seed: int, epochs: int, recipe: dict, train: tuple, held_out: tuple, state: Path) -> dict:
    """Train one network and measure every exit's accuracy, in percent, on the held-out images.

    Args:
        setting: One of :data:`SETTINGS`.
        seed: Seed of weights and batches.
        epochs: Length of the training.
        recipe: One of :data:`RECIPES`.
        train: Images and classes.
        held_out: Images and classes.
        state: File that is written after every epoch; where there is one, the run goes on from it.

    Raises:
        ValueError: If the file is of another recipe.
    """
    kwargs = dict(recipe["model_kwargs"], **SETTINGS[setting])
    teaching = teaching_of(setting)
    taught = dict(teacher=load_teacher(), **TEACHING[teaching]) if teaching else {}  # draws random numbers
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batch_size, samples = recipe["batch_size"], len(train[0])
    steps = epochs * (samples // batch_size)
    trainer = Trainer(recipe["model"], kwargs, recipe["lr"], steps, getattr(torch, recipe["dtype"]), **taught)
    torch.compiler.reset()  # otherwise it stops compiling after eight networks of a class
    trainer.task.compile()  # 1.15 times faster
    normalise = normaliser(trainer.model)
    augmentation = Augmentation(normalise, **recipe.get("augmentation", {}))
    every_exit = trainer.model.objective
    for epoch in range(restore(state, trainer, generator, recipe), epochs):
        only_last = setting in BACKBONE_FIRST and epoch < epochs // 2
        trainer.model.train_for(last_exit_only(trainer.model) if only_last else every_exit)
        order = torch.randperm(samples, generator=generator)
        for chosen in order[: samples // batch_size * batch_size].split(batch_size):
            trainer.step(augmentation(train[0][chosen], generator), train[1][chosen])
        save(state, trainer, generator, recipe, epoch + 1)
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


def load_teacher() -> timm_dfs.MultiExitModel:
    """The network that teaches."""
    return timm.create_model(TEACHER, pretrained=True)


def save(file: Path, trainer: Trainer, generator: torch.Generator, recipe: dict, epochs: int) -> None:
    """Write what a run needs to go on after some epochs, in one piece."""
    of_random = dict(batches=generator.get_state(), torch=torch.get_rng_state())
    state = dict(trainer=trainer.state_dict(), random=of_random, recipe=recipe, epochs=epochs)
    torch.save(state, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def restore(file: Path, trainer: Trainer, generator: torch.Generator, recipe: dict) -> int:
    """Go on from a file of :func:`save`; the number of epochs that it has, 0 without a file.

    Raises:
        ValueError: If the file is of another recipe.
    """
    if not file.exists():
        return 0
    state = torch.load(file)
    if state["recipe"] != recipe:
        raise ValueError(f"{file} is a run of another recipe; delete it, or give another --output.")
    trainer.load_state_dict(state["trainer"])
    generator.set_state(state["random"]["batches"])
    torch.set_rng_state(state["random"]["torch"])
    return state["epochs"]


def last_exit_only(model: timm_dfs.MultiExitModel) -> Objective:
    """Objective that trains the last exit alone."""
    return Objective(loss_weights=[0.0] * (model.num_exits - 1) + [1.0])


if __name__ == "__main__":
    main()
