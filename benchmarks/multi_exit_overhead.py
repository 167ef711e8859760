"""Cost of a MultiExit's exits relative to the backbone, in time and in multiply-adds.

    python benchmarks/multi_exit_overhead.py --rounds 15

Backbone and MultiExit have the same weights and alternate; figures are medians of the rounds, without gradients.
"""

import argparse
import statistics
import time

import timm
import torch

import timm_dfs
from timm_dfs.evaluation.flops import last_exit_flops
from timm_dfs.evaluation.machine import describe_machine

MODELS = ("resnet50", "convnext_tiny", "vit_small_patch16_224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(f"{describe_machine()}; batch {args.batch_size}, {args.rounds} rounds")
    print("| backbone | plain, ms | all exits, ms | more time | more multiply-adds |\n|---|---|---|---|---|")
    for name in args.models:
        plain = timm.create_model(name).eval()
        model = timm_dfs.MultiExit(timm.create_model(name)).eval()
        model.backbone.load_state_dict(plain.state_dict())
        x = torch.randn(args.batch_size, *plain.pretrained_cfg["input_size"])
        took: dict[str, list[float]] = {"plain": [], "exits": []}
        with torch.inference_mode():
            for _ in range(args.rounds + 1):
                for key, run in (("plain", plain), ("exits", model.forward_exits)):
                    start = time.perf_counter()
                    run(x)
                    took[key].append(1e3 * (time.perf_counter() - start))
        base, exits = (statistics.median(times[1:]) for times in took.values())
        ratio = statistics.median(b / a for a, b in zip(took["plain"][1:], took["exits"][1:]))
        more = timm_dfs.exit_flops(model, lazy=True)[-1] / last_exit_flops(model)
        print(f"| {name} | {base:.0f} | {exits:.0f} | {ratio - 1:+.1%} | {more - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
