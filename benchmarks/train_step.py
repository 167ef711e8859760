"""Training speed of DFS against joint training of the same network: images per second of forward and backward.

    python benchmarks/train_step.py                              # VGG7, batch 200, and MSDNet, batch 128
    python benchmarks/train_step.py dfs_vgg7_cifar100 --batch-size 64

Runs are interleaved, figures are medians, and what counts is the ratio within one run.
"""

import argparse
import platform
import statistics
import time

import timm
import torch

import timm_dfs

BATCH_SIZES = {"dfs_vgg7_cifar100": 200, "dfs_msdnet_cifar100": 128}
BETAS = (None, 0.1, 0.5, 0.9)  # None: joint training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(BATCH_SIZES))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in args.models:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for dtype in (torch.float32, torch.bfloat16):
                batch_size = args.batch_size or BATCH_SIZES[name]
                speeds = measure(name, batch_size, memory_format, dtype, args.repeats)
                figures = ", ".join(
                    f"{'joint' if beta is None else f'beta {beta}'} {speed:.1f} ({speed / speeds[None]:.2f}×)"
                    for beta, speed in speeds.items()
                )
                print(f"{name}, batch {batch_size}, {str(memory_format)[6:]}, {str(dtype)[6:]}: {figures}", flush=True)


def measure(name: str, batch_size: int, memory_format: torch.memory_format, dtype: torch.dtype, repeats: int) -> dict:
    """Median images per second for each beta."""
    models = {beta: timm.create_model(name, beta=beta).train().to(memory_format=memory_format) for beta in BETAS}
    size = models[None].pretrained_cfg["input_size"]
    x = torch.randn(batch_size, *size).contiguous(memory_format=memory_format)
    target = torch.randint(models[None].num_classes, (batch_size,))
    loss_fn = timm_dfs.ExitsLoss(torch.nn.CrossEntropyLoss())
    seconds: dict[float | None, list[float]] = {beta: [] for beta in BETAS}
    for repeat in range(repeats + 1):  # the first warms up
        for beta, model in models.items():
            start = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = loss_fn(model(x), target)
            loss.backward()
            model.zero_grad()
            if repeat > 0:
                seconds[beta].append(time.perf_counter() - start)
    return {beta: batch_size / statistics.median(times) for beta, times in seconds.items()}


if __name__ == "__main__":
    main()
