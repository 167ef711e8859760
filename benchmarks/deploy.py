"""Speed of early exit inside one ONNX graph, against the last exit alone in the same runtime.

Each round runs the same images through every way, one after another, with a pause and a batch that is not timed before
each; the ratio is the median over the rounds. Run it from the checkout:

    python benchmarks/deploy.py dfs_msdnet_cifar100 --exports exports --dataset hfds/uoft-cs/cifar100
    python benchmarks/deploy.py dfs_efficientnet_lite0 --exports exports --size 128 --no-pretrained

With ``--int8``, networks are quantized with images of the data set's split ``--calibration-split`` and run beside those
in float32. Without a data set images are noise: only the operating point at half the cost, fitted to those images, then
means something. Networks without weights are as fast as trained ones: of them, speed is measured, not accuracy.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import timm
import torch
from exports import export_once
from pages import DEPLOYMENT, put

import timm_dfs
from timm_dfs.data.datasets import dataset_loader
from timm_dfs.evaluation.bench import SETTLE, exits_logits, halving_policy
from timm_dfs.evaluation.machine import processor
from timm_dfs.export.timing import graph_of
from timm_dfs.export.to_onnx import open_session

HALF, LAST = "half the cost", "last exit"

TOGETHER = f"{HALF}, exits together"
"""The same share of images at each exit, by the mean of the exits' logits: what an ensemble costs in the graph."""

PATIENCE = "patience 2"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a dfs_* name")
    parser.add_argument("--size", type=int, help="height and width of the images, if not the model's")
    parser.add_argument("--dataset", help="as in timm's train.py; by default noise")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=64, help="how many images; each round times all of them")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30, help="for each batch size and number of threads")
    parser.add_argument("--exports", type=Path, required=True, help="folder for the exported files, which are kept")
    parser.add_argument("--policies", nargs="+", help="presets to measure; all by default, and half the cost")
    parser.add_argument("--int8", action="store_true", help="quantized networks, too; needs a data set")
    parser.add_argument("--calibration-split", default="train[45000:]", help="images for int8")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights")
    parser.add_argument("--write", action="store_true", help=f"also put the figures into docs/{DEPLOYMENT.name}")
    args = parser.parse_args()
    if uneven := [size for size in args.batch_sizes if args.images % size]:
        parser.error(f"{args.images} images do not fill batches of {', '.join(map(str, uneven))}")
    return args


def main():
    args = arguments()
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=not args.no_pretrained).eval()
    if args.size:
        model.pretrained_cfg["input_size"] = (model.in_chans, args.size, args.size)
    images, _ = some_images(model, args, args.split, args.images)
    policies = {name: timm_dfs.ExitPolicy.from_preset(preset) for name, preset in model.presets.items()}
    logits = exits_logits(model, images)
    policies[HALF] = halving_policy(model, logits, images.shape[1:])
    policies[TOGETHER] = together(policies[HALF], logits)
    if model.num_exits > 3:
        policies[PATIENCE] = timm_dfs.ExitPolicy([2] * model.num_exits, "patience")
    if args.policies:
        policies = {name: policies[name] for name in args.policies}
    ways = {LAST: (export_once(args.exports, model, None), None)}
    for name, policy in policies.items():  # those that differ in their thresholds only, an input, share a file
        file = export_once(args.exports, model, policy, graph_of(policy))
        ways[name] = file, np.asarray(policy.thresholds, np.float32)
    if args.int8:
        calibration = some_images(model, args, args.calibration_split, 512)
        ways[f"{LAST}, int8"] = export_once(args.exports, model, None, calibration=calibration), None
        for name, policy in policies.items():  # each has its own thresholds inside, fitted to the quantized network
            ways[f"{name}, int8"] = export_once(args.exports, model, policy, calibration=calibration), None
    images_of = "noise" if args.dataset is None else f"{args.dataset.rpartition('/')[2]}, {args.split}"
    lines = [
        f"`{args.model}`, {'×'.join(map(str, images.shape[1:]))}, images of {images_of}; {processor()}; "
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, timm {timm.__version__}.\n"
    ]
    measured = {}
    for threads in args.threads:
        for batch_size in args.batch_sizes:
            cell = measured[threads, batch_size] = measure(ways, images.numpy(), threads, batch_size, args.seconds)
            print(f"{threads} threads, batch {batch_size}: {cell}", flush=True)
    lines += table(measured)
    print(*lines, sep="\n")
    if args.write:
        put(DEPLOYMENT, f"deploy.py {args.model}{', int8' if args.int8 else ''}", lines)


def table(measured):
    """Lines of a table: a row for each way, a column for each number of threads and batch size."""
    heads = [f"{threads} thread{'s' * (threads > 1)}, batch {size}" for threads, size in measured]
    lines = [f"| way | multiply-adds | {' | '.join(heads)} |", f"|{'---|' * (2 + len(heads))}"]
    alone = [f"{cell.milliseconds:.3g} ms" for cell in measured.values()]
    lines.append(f"| {LAST}, time of a batch | 1.00 | {' | '.join(alone)} |")
    for way in next(iter(measured.values())).speeds:
        cells = [(cell.macs[way], cell.speeds[way]) for cell in measured.values()]
        speeds = [f"{speed:.2f} ({speed / ratio:.2f})" for ratio, speed in cells]
        lines.append(f"| {way} | {cells[0][0]:.2f} | {' | '.join(speeds)} |")
    return lines


def together(policy, logits):
    """A policy of the mean of the exits' logits by which as many images leave at each exit as by another."""
    exits = policy.exit_index(logits)
    fractions = torch.bincount(exits, minlength=len(policy.thresholds)) / len(exits)
    thresholds = timm_dfs.find_thresholds(timm_dfs.ensemble_logits(logits), fractions)
    return timm_dfs.ExitPolicy(thresholds, ensemble="mean")


def some_images(model, args, split, count):
    """Images (N, C, H, W) and their classes (N,)."""
    if args.dataset is None:
        shape = (count, model.in_chans, *model.pretrained_cfg["input_size"][1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.zeros(count, dtype=torch.int64)
    columns = dict(input_key="img", target_key="fine_label")
    loader = dataset_loader(model, args.dataset, None, split, **columns, batch_size=64, workers=0, samples=count)
    images, targets = zip(*loader)
    return torch.cat(images), torch.cat(targets)


class Cell(NamedTuple):
    """What was measured with one number of threads and one batch size.

    Attributes:
        milliseconds: Median time of a batch by the last exit alone.
        macs: Multiply-adds of the last exit alone over those of each other way.
        speeds: Time of the last exit alone over that of each other way, medians.
    """

    milliseconds: float
    macs: dict[str, float]
    speeds: dict[str, float]


def measure(ways, images, threads, batch_size, seconds):
    """Time each way, and the last exit alone, in turn."""
    sessions = {name: open_session(file, threads) for name, (file, _) in ways.items()}
    facts = {name: session.get_modelmeta().custom_metadata_map for name, session in sessions.items()}
    batches = np.split(images, len(images) // batch_size)

    def run(name, batches=batches):
        given = {} if ways[name][1] is None else {"thresholds": ways[name][1]}
        return [sessions[name].run(None, {"images": batch, **given})[-1] for batch in batches]

    whole = float(facts[LAST]["last_exit_macs"])
    others = [name for name in ways if name != LAST]
    macs = dict.fromkeys(others, 1.0)
    for name in others:
        if "exits" in facts[name]:
            costs = dict(zip(json.loads(facts[name]["exits"]), json.loads(facts[name]["exit_macs"])))
            macs[name] = whole / statistics.fmean(costs[k] for k in np.concatenate(run(name)).tolist())
    took = {name: [] for name in ways}
    start = time.perf_counter()
    while len(took[LAST]) < 5 or time.perf_counter() - start < seconds:
        for name, times in took.items():
            # Another session's threads spin for a while, and would take the processor from this one's.
            time.sleep(SETTLE)
            run(name, batches[:1])
            before = time.perf_counter()
            run(name)
            times.append(time.perf_counter() - before)
    speeds = {name: statistics.median(a / b for a, b in zip(took[LAST], took[name], strict=True)) for name in others}
    return Cell(1000 * statistics.median(took[LAST]) / len(batches), macs, speeds)


if __name__ == "__main__":
    main()
