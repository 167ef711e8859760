"""Speed of early exit inside one ONNX graph, against the last exit alone in the same runtime.

Each round runs the same images through every way, one after another; the ratio is the median over the rounds. Run it
from the checkout:

    python benchmarks/deploy.py dfs_msdnet_cifar100 --exports exports --dataset hfds/uoft-cs/cifar100
    python benchmarks/deploy.py dfs_efficientnet_lite0 --exports exports --size 128 --no-pretrained

Without a data set images are noise: only the operating point at half the cost, fitted to those images, then means
something. Networks without weights are as fast as trained ones; their exits' speed is measured, not their accuracy.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch

import timm_dfs
from timm_dfs.data.datasets import dataset_loader
from timm_dfs.evaluation.bench import exits_logits, halving_policy
from timm_dfs.evaluation.machine import processor
from timm_dfs.export import export_onnx
from timm_dfs.export.to_onnx import open_session

HALF = "half the cost"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a dfs_* name")
    parser.add_argument("--size", type=int, help="height and width of the images, if not the model's")
    parser.add_argument("--dataset", help="as in timm's train.py; by default noise")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=256, help="how many different images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30, help="for each batch size and number of threads")
    parser.add_argument("--exports", type=Path, required=True, help="folder for the exported files, which are kept")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights")
    return parser.parse_args()


def main():
    args = arguments()
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=not args.no_pretrained).eval()
    if args.size:
        model.pretrained_cfg["input_size"] = (model.in_chans, args.size, args.size)
    images = some_images(model, args)
    policies = {name: timm_dfs.ExitPolicy.from_preset(preset) for name, preset in model.presets.items()}
    policies[HALF] = halving_policy(model, exits_logits(model, images), images.shape[1:])
    files = {name: exported(model, args, name, policy, "graph") for name, policy in policies.items()}
    last = exported(model, args, "last", None, "last")
    print(f"{args.model}, {'×'.join(map(str, images.shape[1:]))}, images: {args.dataset or 'noise'}")
    print(
        f"{processor()}; onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, timm {timm.__version__}. "
        "Ratios to the last exit alone in ONNX Runtime, fp32, medians of interleaved rounds."
    )
    print("| policy | threads | batch | ratio of multiply-adds | early exit | share | rounds |")
    print("|---|---|---|---|---|---|---|")
    for threads in args.threads:
        for batch_size in args.batch_sizes:
            measure(files, policies, last, images.numpy(), threads, batch_size, args.seconds)


def some_images(model, args):
    if args.dataset is None:
        shape = (args.images, model.in_chans, *model.pretrained_cfg["input_size"][1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    columns = dict(input_key="img", target_key="fine_label")
    loader = dataset_loader(
        model, args.dataset, None, args.split, **columns, batch_size=64, workers=0, samples=args.images
    )
    return torch.cat([x for x, _ in loader])


def exported(model, args, name, policy, layout):
    """The file of a policy, exported unless it is there; policies with one confidence and the same exits share it."""
    key = layout if policy is None else "-".join(map(str, (layout, policy.confidence, *policy.answering)))
    folder = args.exports / f"{args.model}-{'x'.join(map(str, model.pretrained_cfg['input_size']))}-{key}"
    if not folder.exists():
        result = export_onnx(model, folder, policy, layout)
        print(f"{name}: {folder.name}, largest difference {max(c.largest_difference for c in result.checks):.1e}")
    return folder / "model.onnx"


def measure(files, policies, last, images, threads, batch_size, seconds):
    sessions = {file: open_session(file, threads) for file in {*files.values(), last}}
    facts = {file: session.get_modelmeta().custom_metadata_map for file, session in sessions.items()}
    thresholds = {name: np.asarray(policy.thresholds, np.float32) for name, policy in policies.items()}
    batches = [images[i : i + batch_size] for i in range(0, len(images) - batch_size + 1, batch_size)]
    batches = batches[: max(1, 64 // batch_size)]

    def run(name):
        exits = []
        for batch in batches:
            if name is None:
                sessions[last].run(None, {"images": batch})
            else:
                exits.append(sessions[files[name]].run(None, {"images": batch, "thresholds": thresholds[name]})[1])
        return exits

    whole = float(facts[last]["last_exit_macs"])
    ratios = {}
    for name in policies:
        costs = dict(zip(json.loads(facts[files[name]]["exits"]), json.loads(facts[files[name]]["exit_macs"])))
        ratios[name] = whole / statistics.fmean(costs[k] for k in np.concatenate(run(name)).tolist())
    took = {name: [] for name in (None, *policies)}
    run(None)
    start = time.perf_counter()
    while len(took[None]) < 5 or time.perf_counter() - start < seconds:
        for name, times in took.items():
            before = time.perf_counter()
            run(name)
            times.append(time.perf_counter() - before)
    for name in policies:
        speedup = statistics.median(a / b for a, b in zip(took[None], took[name], strict=True))
        ratio = ratios[name]
        row = (name, threads, batch_size, f"{ratio:.2f}", f"{speedup:.2f}", f"{speedup / ratio:.2f}", len(took[None]))
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
