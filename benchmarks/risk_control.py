"""How often a statement about risk fails: operating points chosen on random splits of stored logits.

    python benchmarks/risk_control.py val.pt test.pt --flops 46.2e6 88.9e6 ... --loss 2 --confidence 0.95

Each file holds (logits (E, N, C), targets (N,)), as timm_dfs.collect_logits returns them and torch.save writes them:
samples that the network was not trained on. All are thrown together and split at random, so that they are exchangeable:
thresholds are fitted on the first part, the point is chosen on the second, and what it loses against the last exit is
counted on the rest. That count is itself a sample of the true loss; how far it scatters is printed beside it. For
comparison, the share of failures where the point is chosen by its mean on the second part, without a bound.
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
    parser.add_argument("--loss", type=float, default=2.0, help="percentage points")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--by", default="max_prob", help="name of the confidence thresholds are on")
    parser.add_argument("--fit", type=int, default=2500, help="samples that thresholds are fitted on")
    parser.add_argument("--bound", type=int, default=2500, help="samples that the point is chosen on")
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
            "bound": timm_dfs.control_risk(points, bound, args.loss, args.confidence),
            "mean": by_mean(points, bound, args),
        }
        for how, point in chosen.items():
            measured = timm_dfs.measure_policy(point.policy, unseen, args.flops)
            true[how].append(measured.last_exit_accuracy - measured.accuracy)
            costs[how].append(measured.average_flops)
    scatter = 100 * math.sqrt(0.12 / rest)
    for how, losses in true.items():
        failures = sum(loss > args.loss for loss in losses) / args.splits
        print(
            f"chosen by {how}: loss above {args.loss} points in {failures:.1%} of {args.splits} splits; mean loss "
            f"{statistics.mean(losses):.2f}, greatest {max(losses):.2f}, mean cost "
            f"{statistics.mean(costs[how]) / args.flops[-1]:.0%} of the last exit's"
        )
    print(
        f"allowed with confidence {args.confidence}: {1 - args.confidence:.1%}; losses are counted on {rest} samples "
        f"each, which scatters them by about {scatter:.2f} points"
    )


def by_mean(points: list, data: tuple, args: argparse.Namespace) -> timm_dfs.OperatingPoint:
    """The cheapest point whose mean loss on ``data`` is as asked."""
    kept = []
    for point in points:
        measured = timm_dfs.measure_policy(point, data, args.flops)
        if measured.last_exit_accuracy - measured.accuracy <= args.loss:
            kept.append(point)
    return min(kept, key=lambda point: point.average_flops)


if __name__ == "__main__":
    main()
