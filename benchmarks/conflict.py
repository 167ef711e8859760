"""Conflict between the exits' gradients of the shipped MSDNets, trained with DFS and jointly, on training images.

    python benchmarks/conflict.py --dataset uoft-cs/cifar100 --output benchmarks/results/conflict.json

Each network is measured twice: with the partition that DFS trains with, and without one. So one sees what the partition
removes, and whether networks that were trained with it conflict less.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from common import load, normaliser

import timm_dfs
from timm_dfs.evaluation.machine import describe_machine

NETWORKS = ("dfs_msdnet_cifar100.joint", "dfs_msdnet_cifar100")
BETAS = ("joint", 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="uoft-cs/cifar100", help="on the Hub, or a folder with its parquet files")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    (images, labels), _ = load(args.dataset)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: args.batches * args.batch_size]
    measured = []
    for name in NETWORKS:
        for beta in BETAS:
            model = timm.create_model(name, pretrained=True, beta=beta).eval()
            normalise = normaliser(model)
            loader = [(normalise(images[some]), labels[some]) for some in chosen.split(args.batch_size)]
            found = timm_dfs.gradient_conflict(model, loader)
            first, second = torch.triu_indices(model.num_exits, model.num_exits, offset=1)
            cosines = found.cosine[:, first, second]
            row = dict(
                network=name,
                beta=beta,
                conflicting=found.conflicting,
                pairs=int((~cosines.isnan()).sum()),
                mean_cosine=cosines.nanmean().item(),
            )
            print(row, flush=True)
            measured.append(row)
    results = dict(batches=args.batches, batch_size=args.batch_size, measured=measured, machine=describe_machine())
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
