"""Failure rate of bounds on the drop in accuracy: operating points chosen on random splits of stored logits.

    python benchmarks/risk_control.py val.pt test.pt --flops 46.2e6 88.9e6 ... --max-accuracy-drop 2

Each file holds (logits (E, N, C), targets (N,)), as timm_dfs.collect_logits returns them and torch.save writes them, of
samples that the network was not trained on. The samples of all files are pooled and split at random, so that they are
exchangeable: thresholds are fitted on the first part, the point is chosen on the second, and its drop in accuracy below
the last exit is measured on the rest. That drop is an estimate of the true one; its standard deviation is printed too.
For comparison, failures are also counted for points chosen by their mean drop on the second part, without a bound.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch

import timm_dfs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--flops", nargs="+", type=float, required=True, help="multiply-adds up to each exit")
    parser.add_argument("--max-accuracy-drop", type=float, default=2.0, help="percentage points")
    parser.add_argument("--confidence-level", type=float, default=0.95)
    parser.add_argument("--by", default="max_prob", help="confidence that thresholds are compared with")
    parser.add_argument("--fit", type=int, default=2500, help="number of samples that thresholds are fitted on")
    parser.add_argument("--bound", type=int, default=2500, help="number of samples that the point is chosen on")
    parser.add_argument("--splits", type=int, default=200)
    args = parser.parse_args()

    files = [torch.load(file) for file in args.files]
    logits, targets = torch.cat([file[0] for file in files], 1), torch.cat([file[1] for file in files])
    generator = torch.Generator().manual_seed(0)
    true = {"bound": [], "mean": []}
    costs = {"bound": [], "mean": []}
    rest = len(targets) - args.fit - args.bound
    for _ in range(args.splits):
        parts = torch.randperm(len(targets), generator=generator).split([args.fit, args.bound, rest])
        fit, bound, unseen = ((logits[:, rows], targets[rows]) for rows in parts)
        points = timm_dfs.operating_frontier(fit, args.flops, points=20, confidence=args.by)
        chosen = {
            "bound": timm_dfs.control_risk(points, bound, args.max_accuracy_drop, args.confidence_level),
            "mean": by_mean(points, bound, args),
        }
        for how, point in chosen.items():
            measured = timm_dfs.measure_policy(point.policy, unseen, args.flops)
            true[how].append(measured.last_exit_accuracy - measured.accuracy)
            costs[how].append(measured.average_flops)
    scatter = 100 * math.sqrt(0.12 / rest)
    for how, drops in true.items():
        failures = sum(drop > args.max_accuracy_drop for drop in drops) / args.splits
        print(
            f"chosen by {how}: drop above {args.max_accuracy_drop} points in {failures:.1%} of {args.splits} splits; "
            f"mean drop {statistics.mean(drops):.2f}, largest {max(drops):.2f}, mean cost "
            f"{statistics.mean(costs[how]) / args.flops[-1]:.0%} of the last exit's"
        )
    print(
        f"allowed at confidence level {args.confidence_level}: {1 - args.confidence_level:.1%}; drops are measured on "
        f"{rest} samples each, with a standard deviation of about {scatter:.2f} points"
    )


def by_mean(points: list, data: tuple, args: argparse.Namespace) -> timm_dfs.OperatingPoint:
    """The cheapest point whose mean drop on ``data`` is at most the one allowed."""
    kept = []
    for point in points:
        measured = timm_dfs.measure_policy(point, data, args.flops)
        if measured.last_exit_accuracy - measured.accuracy <= args.max_accuracy_drop:
            kept.append(point)
    return min(kept, key=lambda point: point.average_flops)


if __name__ == "__main__":
    main()
