"""Comparison of training methods: accuracy of every exit, step time, peak memory, gradient conflict.

    python benchmarks/methods.py --dataset uoft-cs/cifar100 --steps 400 --seeds 0 1 2

Every method trains the same network from the same weights on the same batches with the same schedule. Methods alternate
step by step, so that other load on the machine affects all of them. Accuracy is measured on the last 5,000 training
images, which are held out; gradient conflict on 500 of them, after training. Means ± standard deviations are over
seeds. Needs the extras data and aggregation.
"""

import argparse
import json
import statistics
from pathlib import Path

import timm
import torch
from common import METHODS, Trainer, augment, load, normaliser, peak_memory

import timm_dfs
from timm_dfs.evaluation.machine import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dfs_msdnet_cifar100")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--dataset", default="uoft-cs/cifar100", help="on the Hub, or a folder with its parquet files")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="largest learning rate")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()

    print(describe_machine(), flush=True)
    train, held_out = load(args.dataset)
    runs = {name: [] for name in args.methods}
    for seed in args.seeds:
        for name, result in run(args, seed, train, held_out).items():
            runs[name].append(result)
            print(f"seed {seed}, {name}: {' '.join(f'{value:.2f}' for value in result['top1'])}", flush=True)
    for name in args.methods:
        memory = peak_memory(args.model, dict(args.model_kwargs, **METHODS[name]), args.batch_size)
        for result in runs[name]:
            result["peak_memory"] = memory
    print(table(runs))
    if args.output is not None:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        args.output.write_text(json.dumps(dict(machine=describe_machine(), settings=settings, runs=runs), indent=1))


def run(args: argparse.Namespace, seed: int, train: tuple, held_out: tuple) -> dict[str, dict]:
    """Train all methods from one seed, alternating between them, and measure each."""
    trainers = {}
    for name in args.methods:
        torch.manual_seed(seed)
        trainers[name] = Trainer(args.model, dict(args.model_kwargs, **METHODS[name]), args.lr, args.steps)
    normalise = normaliser(next(iter(trainers.values())).model)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        chosen = torch.randint(len(train[0]), (args.batch_size,), generator=generator)
        x, target = normalise(augment(train[0][chosen], generator)), train[1][chosen]
        for trainer in trainers.values():
            trainer.step(x, target)
    loader = [(normalise(x), target) for x, target in zip(held_out[0].split(250), held_out[1].split(250))]
    results = {}
    for name, trainer in trainers.items():
        conflict = timm_dfs.gradient_conflict(trainer.model, loader[:2])
        results[name] = dict(
            seed=seed,
            top1=timm_dfs.anytime_accuracy(*timm_dfs.collect_logits(trainer.model, loader)).tolist(),
            step_seconds=statistics.median(trainer.seconds),
            conflicting=conflict.conflicting,
            mean_cosine=conflict.cosine[~conflict.cosine.isnan() & (conflict.cosine < 1 - 1e-6)].mean().item(),
        )
    return results


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown table: one row for each method, mean ± standard deviation over seeds."""
    exits = len(next(iter(runs.values()))[0]["top1"])
    lines = [
        "| method | " + " | ".join(f"exit {k}" for k in range(exits)) + " | step, s | peak, MB | conflicting |",
        "|---|" + "---|" * (exits + 3),
    ]
    for name, results in runs.items():
        cells = [spread([result["top1"][k] for result in results], 2) for k in range(exits)]
        cells.append(spread([result["step_seconds"] for result in results], 3))
        cells.append(f"{results[0]['peak_memory'] / 1e6:.0f}")
        cells.append(spread([100 * result["conflicting"] for result in results], 1) + " %")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
