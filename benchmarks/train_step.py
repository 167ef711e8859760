"""Cost of a training step with each method: images per second, peak memory, and the multiply-adds that it saves.

    python benchmarks/train_step.py                                      # VGG7 and MSDNet, the fast methods
    python benchmarks/train_step.py dfs_vgg16_imagenet --batch-size 4 --methods joint "DFS 0.5" PCGrad
    python benchmarks/train_step.py --official ~/dfs                     # with a checkout of the official code

A step is forward pass, backward pass and SGD. Methods alternate, figures are medians, and only ratios within one run
are comparable. "arithmetic" is the speed-up that the saved multiply-adds (MACs) allow: the backward pass costs twice
the forward pass, one half of it for the gradients of layer inputs, of which a partition needs only the share ``beta``
where a convolution directly reads the feature. That is a bound: for a large share all are computed, which is faster.
Memory is the peak above that of the model, in a separate process.

Part of a step's time is page faults, because glibc returns large tensors to the system at once: up to a sixth of VGG7's
step, varying by chance. Set MALLOC_MMAP_THRESHOLD_=2000000000 and MALLOC_TRIM_THRESHOLD_=8000000000 in the environment
to avoid them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import METHODS, Trainer, peak_memory
from official import official_networks

import timm_dfs
from timm_dfs.base.partition import PartitionedConv2d
from timm_dfs.evaluation.machine import describe_machine

BATCH_SIZES = {"dfs_vgg7_cifar100": 200, "dfs_vgg16_imagenet": 8, "dfs_resnet18_cifar100": 64}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["dfs_vgg7_cifar100", "dfs_msdnet_cifar100"])
    default = ["joint", "DFS 0.1", "DFS 0.5", "DFS 0.9", "BYOT"]
    parser.add_argument("--methods", nargs="*", default=default, choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--official", help="checkout of the official repository (GongCheng1919/dfs), to measure too")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--output", type=Path, help="JSON file for the speeds")
    args = parser.parse_args()
    print(describe_machine())
    measured = []
    for name in args.models:
        batch_size = args.batch_size or BATCH_SIZES.get(name, 128)
        for memory_format in args.formats:
            for dtype in args.dtypes:
                speeds = measure(args, name, batch_size, memory_format, dtype)
                case = dict(model=name, batch_size=batch_size, memory_format=memory_format, dtype=dtype)
                measured.append(dict(case, images_per_second=speeds))
    if args.output is not None:
        args.output.write_text(json.dumps(dict(machine=describe_machine(), measured=measured), indent=1) + "\n")


def measure(args: argparse.Namespace, name: str, batch_size: int, memory_format: str, dtype: str) -> dict[str, float]:
    """Print a table for one network, batch size, format and type; return each method's images per second."""
    steps: dict[str, Callable] = {}
    for method in args.methods:
        trainer = Trainer(name, METHODS[method], 1e-3, 1000, DTYPES[dtype])
        trainer.model.to(memory_format=FORMATS[memory_format])
        steps[method] = trainer.step
    for method, network in official_networks(args.official, name).items() if args.official else ():
        trainer = Trainer(network, {}, 1e-3, 1000, DTYPES[dtype])
        trainer.model.to(memory_format=FORMATS[memory_format])
        steps[method] = trainer.step
    size = timm.get_pretrained_cfg(name).input_size
    x = torch.randn(batch_size, *size).contiguous(memory_format=FORMATS[memory_format])
    target = torch.randint(100, (batch_size,))
    for step in steps.values():
        step(x, target)
    trainers = {method: step.__self__ for method, step in steps.items()}
    for trainer in trainers.values():
        trainer.seconds.clear()
    for _ in range(args.repeats):
        for step in steps.values():
            step(x, target)
    speeds = {method: batch_size / statistics.median(trainer.seconds) for method, trainer in trainers.items()}
    print(f"\n{name}, batch {batch_size}, {memory_format}, {dtype}\n")
    print("| method | images/s | against joint | arithmetic | peak, MB |\n|---|---|---|---|---|")
    for method, speed in speeds.items():
        ours = method in METHODS
        gain = f"{arithmetic_gain(name, METHODS[method]):.2f}" if ours else ""
        against = f"{speed / speeds['joint']:.2f}×" if "joint" in speeds else ""
        memory = ""
        if ours and args.memory:
            peak = peak_memory(name, METHODS[method], batch_size, DTYPES[dtype], FORMATS[memory_format])
            memory = f"{peak / 1e6:.0f}"
        print(f"| {method} | {speed:.1f} | {against} | {gain} | {memory} |", flush=True)
    return speeds


def arithmetic_gain(name: str, settings: dict) -> float:
    """Multiply-adds of a training step without a partition over those with it; aggregation's are not counted."""
    model = timm.create_model(name, **settings).eval()
    total, saved = 3 * timm_dfs.exit_flops(model)[-1], 0
    trained = 1 if settings["beta"] == "joint" else settings["beta"]

    def count(module: PartitionedConv2d, args: tuple, output: torch.Tensor) -> None:
        nonlocal saved
        saved += (1 - trained) * output[0].numel() * module.weight[0].numel()

    convolutions = [module for module in model.modules() if isinstance(module, PartitionedConv2d)]
    for convolution in convolutions[1:]:  # the first reads the image
        convolution.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *model.pretrained_cfg["input_size"]))
    return total / (total - saved)


if __name__ == "__main__":
    main()
