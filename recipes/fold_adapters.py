"""Classifiers of early exits from a run with distillation of features, for a second run without labels.

    python recipes/fold_adapters.py output/train/RUN/last.pth.tar

It writes ``folded.pth.tar`` beside the checkpoint, which ``train.py --initial-checkpoint`` takes: each early exit has
the last exit's classifier behind its adapter, see ``MultiExitModel.fold_adapters``.
"""

import argparse
from pathlib import Path

import timm
import torch

import timm_dfs  # noqa: F401  registers the models
from timm_dfs.base.objective import SETTINGS
from timm_dfs.training.run import read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="train.py's last.pth.tar")
    args = parser.parse_args()
    run = read_run(args.checkpoint)
    settings = {key: value for key, value in run.arguments["model_kwargs"].items() if key in SETTINGS}
    model = timm.create_model(run.model, **run.model_args, **settings)
    with torch.serialization.safe_globals([argparse.Namespace]):
        model.load_state_dict(torch.load(args.checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    model.fold_adapters()
    file = args.checkpoint.with_name("folded.pth.tar")
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("adapters.")}
    torch.save(dict(state_dict=state), file)
    print(file)


if __name__ == "__main__":
    main()
