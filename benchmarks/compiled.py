"""PyTorch, eager and compiled, against ONNX Runtime: the last exit alone, interleaved on the same images, medians.

    python benchmarks/compiled.py dfs_msdnet_cifar100
    python benchmarks/compiled.py dfs_tf_efficientnet_lite0 --size 96 --no-pretrained

Compiled is ``torch.compile`` with constants folded (freezing), with and without a wrapper in C++; each batch size is
compiled by itself, and the time that takes is printed. Networks without weights are as fast as trained ones.
"""

import argparse
import copy
import statistics
import tempfile
import time

import timm
import torch
import torch._inductor.config as inductor
from pages import DEPLOYMENT, put

import timm_dfs
from timm_dfs.evaluation.bench import SETTLE
from timm_dfs.evaluation.machine import describe_machine
from timm_dfs.export import export_onnx
from timm_dfs.export.to_onnx import open_session

ONNX = "ONNX Runtime"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a dfs_* name")
    parser.add_argument("--size", type=int, help="height and width of the images, if not the model's")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--no-pretrained", action="store_true", help="random weights")
    parser.add_argument("--write", action="store_true", help=f"also put the figures into docs/{DEPLOYMENT.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = timm.create_model(args.model, pretrained=not args.no_pretrained).eval().requires_grad_(False)
    size = (model.in_chans, *([args.size] * 2 if args.size else model.pretrained_cfg["input_size"][1:]))
    model.pretrained_cfg["input_size"] = size
    fused = timm_dfs.fuse(model)
    images = {batch: torch.randn(batch, *size) for batch in args.batch_sizes}
    ways = {
        "eager": model,
        "eager, fused": lambda x: fused(x.contiguous(memory_format=torch.channels_last)),
        "compiled": compiled(model, images, cpp_wrapper=False),
        "compiled, C++ wrapper": compiled(model, images, cpp_wrapper=True),
    }
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, f"{folder}/last", layout="last")
        session = open_session(f"{folder}/last/model.onnx", args.threads)
    ways[ONNX] = lambda x: session.run(None, {"images": x.numpy()})
    lines = [
        f"`{args.model}`, {'×'.join(map(str, size))}; {describe_machine()}; medians of {args.rounds} rounds.\n",
        "| way | batch | ms | speed, ONNX Runtime = 1 |\n|---|---|---|---|",
    ]
    with torch.inference_mode():
        for batch, x in images.items():
            took = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, run in ways.items():
                    time.sleep(SETTLE)  # another runtime's threads spin for a while
                    run(x)
                    before = time.perf_counter()
                    run(x)
                    took[name].append(1e3 * (time.perf_counter() - before))
            middle = {name: statistics.median(times) for name, times in took.items()}
            for name, milliseconds in middle.items():
                lines.append(f"| {name} | {batch} | {milliseconds:.1f} | {middle[ONNX] / milliseconds:.2f} |")
    print(*lines, sep="\n")
    if args.write:
        put(DEPLOYMENT, f"compiled.py {args.model}", lines)


def compiled(model, images, cpp_wrapper):
    """The network's forward pass, compiled for each batch size."""
    inductor.freezing, inductor.cpp_wrapper = True, cpp_wrapper
    run = torch.compile(copy.deepcopy(model).forward, dynamic=False)
    with torch.inference_mode():
        for batch, x in images.items():
            before = time.perf_counter()
            run(x)
            took = time.perf_counter() - before
            print(f"compiled for batch {batch}{', C++ wrapper' * cpp_wrapper}: {took:.0f} s", flush=True)
    return run


if __name__ == "__main__":
    main()
