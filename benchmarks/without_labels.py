"""Early exits that learnt without labels, on images like those they learnt from and on others: figures and docs page.

    python benchmarks/without_labels.py output/train/RUN/last.pth.tar --data-dir photographs/val \
        --alike alike --others others

``--alike`` and ``--others`` are folders of class folders in the data folder, named by ImageNet's synsets. Thresholds
are fitted on every other image of a folder and measured on the rest. Without a checkpoint the page is written anew from
the stored figures.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
import yaml
from templates import template

import timm_dfs
from timm_dfs.calibration.presets import operating_points
from timm_dfs.data.datasets import dataset_loader, open_dataset
from timm_dfs.evaluation.flops import Costs
from timm_dfs.evaluation.machine import describe_machine
from timm_dfs.hub import from_checkpoint as export
from timm_dfs.training.run import read_run

ROOT = Path(__file__).parent.parent
RECIPE = "dfs_tf_efficientnet_lite0_without_labels.yaml"
FIGURES, PAGE = "benchmarks/results/without_labels.json", "docs/without_labels.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="train.py's last.pth.tar")
    parser.add_argument("--data-dir", help="folder with the folders to measure on")
    parser.add_argument("--alike", help="images of the classes that half of the photographs of training show")
    parser.add_argument("--others", help="images of all classes of the network")
    args = parser.parse_args()
    if args.checkpoint is not None and not (args.data_dir and args.alike and args.others):
        parser.error("a checkpoint is measured on --alike and --others in --data-dir; give all three")
    if args.checkpoint is not None:
        found = measure(args.checkpoint, args.data_dir, dict(alike=args.alike, others=args.others))
        (ROOT / FIGURES).write_text(json.dumps(found, indent=1) + "\n")
    (ROOT / PAGE).write_text(page(ROOT))


def measure(checkpoint: Path, data_dir: str, folders: dict[str, str]) -> dict:
    """Accuracy and cost of each exit and preset on each folder.

    Raises:
        ValueError: If the run did not follow the recipe to its end.
    """
    run = read_run(checkpoint)
    recipe = yaml.safe_load((ROOT / "recipes" / RECIPE).read_text())
    if changed := [key for key, value in recipe.items() if run.arguments[key] != value]:
        raise ValueError(f"{checkpoint} is of a run that differs from {RECIPE} in {', '.join(changed)}.")
    if run.epoch + 1 != recipe["epochs"]:
        raise ValueError(f"{checkpoint} is of epoch {run.epoch + 1}, and {RECIPE} has {recipe['epochs']}.")
    model = export.trained_model(run, checkpoint)
    # The backbone's own size, which train.py's --input-size replaced.
    model.pretrained_cfg["input_size"] = timm.get_pretrained_cfg(run.model).input_size
    costs = Costs(model)
    lazy = costs.of_exits(lazy=True)
    found = dict(
        model=run.model,
        recipe=RECIPE,
        epochs=recipe["epochs"],
        photographs=len(open_dataset("", run.arguments["data_dir"], run.arguments["train_split"])),
        flops=lazy,
        last_exit_flops=costs.of_last_exit_alone(),
        machine=describe_machine(),
        images={},
    )
    for use, folder in folders.items():
        logits, targets = timm_dfs.collect_logits(model, dataset_loader(model, "", data_dir, folder))
        fitted_on, tested = ((logits[:, k::2], targets[k::2]) for k in (0, 1))
        points = operating_points(fitted_on, lazy, None, True)
        found["images"][use] = dict(
            export.accuracy((logits, targets)),
            classes=len(torch.unique(targets)),
            fitted_on=len(fitted_on[1]),
            tested_on=len(tested[1]),
            presets={name: export.measured(point, tested, lazy) for name, point in points.items()},
        )
    return found


def page(root: Path) -> str:
    """The docs page, from a checkout's figures."""
    found = json.loads((root / FIGURES).read_text())
    return template("without_labels.md.jinja").render(found=found, **found["images"])


if __name__ == "__main__":
    main()
