"""Train one or several networks with exits on a GPU, side by side on the same batches.

    python benchmarks/gpu/run.py -c benchmarks/gpu/recipes/plain.yaml --data ~/cifar100 --output ~/runs \\
        --run joint beta=joint --run dfs beta=0.5 --minutes 9

Each run is what train.py makes of the same recipe and --model-kwargs: loss, optimizer, schedule, moving average and
checkpoint, so that timm-dfs reads it. Only the images come another way: those of pack.py, and augmented on the device
or, for AutoAugment and its kind, by worker processes. Given the same output again, runs go on after their last
checkpoint; with --minutes they end by themselves at the last one that fits.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from batches import Batches
from host_augment import host_transform
from inputs import Inputs, Validation
from learner import Learner
from pack import read_split
from recipe import keywords, read_recipe
from steps import CAPTURES, Steps
from timm.data import resolve_data_config
from timm.utils import setup_default_logging, update_summary

import timm_dfs  # noqa: F401  registers the networks

_logger = logging.getLogger("gpu")


class Training:
    """Runs side by side, with their data.

    Args:
        recipe: YAML file.
        data: Folder of an unpacked data set.
        output: Folder for the runs', by name.
        runs: Each run's keyword arguments for its network.
        settings: What goes before the recipe's.
        capture: As in :class:`steps.Steps`.

    Raises:
        ValueError: If recipe and runs do not go together, or the runs ended at different epochs.
    """

    def __init__(
        self,
        recipe: Path | None,
        data: Path,
        output: Path,
        runs: dict[str, dict],
        settings: dict,
        capture: str = "branches",
    ):
        of_all = settings.get("model_kwargs") or {}
        recipes = {
            name: read_recipe(recipe, {**settings, "model_kwargs": {**of_all, **kwargs}})
            for name, kwargs in runs.items()
        }
        self.begun = time.time()
        self.args = args = next(iter(recipes.values()))
        self.output = output
        device = torch.device(args.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True  # as train.py
        config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(args.model).to_dict())
        images, labels = read_split(data, args.train_split)
        transform = host_transform(args, config["mean"], images.shape[-1])
        workers, seed, epochs = args.workers, args.seed, args.epochs + args.cooldown_epochs
        # First of all: its workers are forked, which has to be before the GPU is in use.
        self.batches = Batches(images, labels, transform, args.batch_size, workers, seed, epochs, device)
        inputs = Inputs(args, config["mean"], config["std"], device)
        self.validation = Validation(*read_split(data, args.val_split), inputs, device)
        self.learners = {
            name: Learner(own, device, len(self.batches), _folder(output / name)) for name, own in recipes.items()
        }
        for name, own in recipes.items():
            record = output / name / "args.yaml"
            if not self.learners[name].epoch or not record.exists():
                record.write_text(yaml.safe_dump(vars(own)))
        self.first = next(iter(self.learners.values()))
        if any(learner.epoch != self.first.epoch for learner in self.learners.values()):
            ends = ", ".join(f"{name} at {learner.epoch}" for name, learner in self.learners.items())
            raise ValueError(f"The runs to go on with stand at different epochs ({ends}); train them one by one.")
        shape = (args.batch_size, *images.shape[1:])
        self.hours = {name: _hours(output / name, learner.epoch) for name, learner in self.learners.items()}
        self.steps = Steps(list(self.learners.values()), inputs.augmented, shape, device, capture)

    def epoch(self) -> tuple[dict[str, dict[str, float]], float]:
        """Train an epoch; return each run's loss and accuracy in it, and its seconds."""
        started = time.perf_counter()
        # Each epoch begins with its own random state, so that a run that goes on is the one that was not interrupted.
        torch.manual_seed(int(np.random.SeedSequence((self.args.seed, self.first.epoch)).generate_state(1)[0]))
        for learner in self.learners.values():
            learner.model.train()
        for images, target in self.batches.epoch(self.first.epoch):
            self.steps(images, target)
        trained = {name: learner.end_epoch() for name, learner in self.learners.items()}
        return trained, time.perf_counter() - started

    def to_the_end(self, minutes: float = float("inf")) -> bool:
        """Train until the schedules end, or the last checkpoint that fits into ``minutes``; say whether they ended."""
        with self.steps.on_stream():
            begun = last = time.monotonic()
            longest = 0.0
            while self.first.epoch < self.first.epochs:
                trained, seconds = self.epoch()
                done = self.first.epoch
                checked = done % self.args.val_interval == 0 or done == self.first.epochs
                metrics = {
                    name: self._validate(name, learner, trained[name], seconds) if checked else None
                    for name, learner in self.learners.items()
                }
                for name, learner in self.learners.items():
                    if checked:  # all at once, so that whoever copies the checkpoints gets them of one epoch
                        learner.save(metrics[name])
                    learner.end_validation(metrics[name])
                    _logger.info(f"{name}: epoch {done - 1}, {seconds:.2f} s, {_in_words(trained[name])}")
                if checked:
                    now = time.monotonic()
                    longest, last = max(longest, now - last), now
                    if now - begun + longest > 60 * minutes:
                        break
        return self.first.epoch >= self.first.epochs

    def _validate(self, name: str, learner: Learner, trained: dict[str, float], seconds: float) -> float:
        """Validate at every exit, write it down; return what train.py calls the metric."""
        folder, epoch, rate = self.output / name, learner.epoch - 1, learner.optimizer.param_groups[0]["lr"]
        top1 = {of: self.validation(network) for of, network in learner.networks().items()}
        metric = list(top1.values())[-1][-1]  # the last exit's, of the moving average if there is one
        update_summary(epoch, dict(loss=trained["loss"]), dict(top1=metric), str(folder / "summary.csv"), rate)
        before = self.hours[name]
        hours = None if before is None else round(before + (time.time() - self.begun) / 3600, 5)
        line = dict(epoch=epoch, seconds=round(seconds, 3), hours=hours, lr=rate, train=trained, validation=top1)
        with (folder / "exits.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return metric


def _folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _hours(folder: Path, epoch: int) -> float | None:
    """Hours that a run took up to an epoch, by its record; ``None`` if that is not there."""
    if not epoch:
        return 0.0
    file = folder / "exits.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return next((line.get("hours") for line in lines if line["epoch"] == epoch - 1), None)


def _in_words(trained: dict[str, float]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value:#.4g}" for key, value in trained.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which runs, for every script that makes a :class:`Training`."""
    parser.add_argument("-c", "--config", type=Path, help="recipe, YAML as for train.py")
    parser.add_argument("--data", type=Path, required=True, help="folder that pack.py unpacked into")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--run", nargs="+", action="append", required=True, metavar="WORD", help="NAME [KEY=VALUE ...]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="before the recipe's settings")


def training(args: argparse.Namespace, capture: str) -> Training:
    """The training that parsed arguments ask for."""
    runs = {words[0]: keywords(words[1:]) for words in args.run}
    if len(runs) < len(args.run):
        raise ValueError(
            f"Two of --run have one name ({', '.join(words[0] for words in args.run)}); give each its own."
        )
    return Training(args.config, args.data, args.output, runs, keywords(args.set), capture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end at the last checkpoint that fits")
    parser.add_argument("--capture", default="branches", choices=CAPTURES, help="see steps.py")
    args = parser.parse_args()
    setup_default_logging()
    of_runs = training(args, args.capture)
    ended = of_runs.to_the_end(args.minutes)
    of_runs.batches.close()
    print("All epochs are trained." if ended else "Time is up; the same command goes on.")


if __name__ == "__main__":
    main()
