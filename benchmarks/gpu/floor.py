"""What a training step costs at least: its arithmetic, and the bytes that its operators read and write.

python benchmarks/gpu/floor.py                    # counts, on any machine
python benchmarks/gpu/floor.py --measure          # and this GPU's own rates, for the least time of an epoch
"""

import argparse
import time
from dataclasses import dataclass

import timm
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import timm_dfs  # noqa: F401  registers the networks


@dataclass(frozen=True)
class Cost:
    """Of a step's forward and backward pass in bfloat16, as torch calls its operators one by one.

    Attributes:
        multiply_adds: Of convolutions and linear layers, for each image.
        bytes: That operators read and write, for each image, when each fetches its inputs from memory and writes its
            outputs there. Fused or cached ones move less.
        kernels: Operators called, whatever the batch; about as many kernels are launched.
    """

    multiply_adds: float
    bytes: float
    kernels: int


class _Traffic(TorchDispatchMode):
    """Adds up what operators read and write; views move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.kernels += 1
            self.bytes += sum(tensor.nbytes for tensor in _tensors((args, kwargs, outputs)))
        return outputs


def _tensors(values) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    return [tensor for value in values for tensor in _tensors(value)] if _is_container(values) else []


def _is_container(values) -> bool:
    return isinstance(values, (list, tuple, type({}.values())))


def count(model: nn.Module) -> Cost:
    """Count a network's step; what two more images add is each image's, half of it."""
    task = ClassificationTask(model.train(), nn.CrossEntropyLoss(), verbose=False)

    def step(batch: int) -> tuple[int, int, int]:
        x = torch.randn(batch, *model.pretrained_cfg["input_size"])
        with FlopCounterMode(display=False) as arithmetic, _Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = task(x, torch.zeros(batch, dtype=torch.long))["loss"]
            loss.backward()
        return arithmetic.get_total_flops() // 2, traffic.bytes, traffic.kernels

    few, more = step(2), step(4)
    return Cost((more[0] - few[0]) / 2, (more[1] - few[1]) / 2, more[2])


def rates() -> tuple[float, float]:
    """This GPU's bfloat16 multiply-adds a second in a large product, and bytes a second in a large copy."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 8192**3 / _seconds(lambda: a @ b), 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _seconds(work, repeats: int = 20) -> float:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dfs_msdnet_cifar100")
    parser.add_argument("--images", type=int, default=50_000, help="in an epoch")
    parser.add_argument("--measure", action="store_true", help="this GPU's rates, instead of the defaults below")
    parser.add_argument("--multiply-adds", type=float, default=395e12, help="a second, bfloat16")
    parser.add_argument("--bandwidth", type=float, default=3.0e12, help="bytes a second")
    args = parser.parse_args()
    arithmetic, bandwidth = rates() if args.measure else (args.multiply_adds, args.bandwidth)
    print(f"rates: {arithmetic / 1e12:.0f} T multiply-adds/s, {bandwidth / 1e12:.2f} TB/s")
    for name, beta in {"joint": "joint", "DFS 0.5": 0.5}.items():
        cost = count(timm.create_model(args.model, beta=beta))
        print(
            f"{name}: an image {cost.multiply_adds / 1e6:.0f} M multiply-adds and {cost.bytes / 1e6:.1f} MB, a step "
            f"{cost.kernels} operators; an epoch {args.images * cost.multiply_adds / arithmetic:.2f} s of arithmetic, "
            f"{args.images * cost.bytes / bandwidth:.2f} s of memory traffic"
        )


if __name__ == "__main__":
    main()
