"""A recipe's settings: train.py's names and defaults, and the few that train.py has no flag for."""

import argparse
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

DEFAULTS: dict[str, Any] = dict(
    # train.py's own, with its defaults
    device_modules=None,
    model=None,
    num_classes=None,
    gp=None,
    in_chans=None,
    model_kwargs={},
    drop=0.0,
    dataset="",
    data_dir=None,
    train_split="train",
    val_split="validation",
    input_key=None,
    target_key=None,
    device="cuda",
    amp=False,
    amp_dtype="float16",
    channels_last=False,
    workers=4,
    batch_size=128,
    epochs=300,
    opt="sgd",
    opt_kwargs={},
    momentum=0.9,
    weight_decay=2e-5,
    lr=None,
    sched="cosine",
    sched_on_updates=False,
    warmup_epochs=5,
    warmup_lr=1e-5,
    warmup_prefix=False,
    min_lr=0.0,
    decay_milestones=[90, 180, 270],
    decay_epochs=90,
    decay_rate=0.1,
    cooldown_epochs=0,
    smoothing=0.1,
    kd_model_name=None,
    kd_distill_type="logit",
    kd_loss_type="kl",
    kd_temperature=4.0,
    distill_loss_weight=None,
    task_loss_weight=None,
    train_crop_mode=None,
    scale=[0.08, 1.0],
    ratio=[3 / 4, 4 / 3],
    hflip=0.5,
    color_jitter=0.4,
    train_interpolation="random",
    aa=None,
    reprob=0.0,
    remode="pixel",
    model_ema=False,
    model_ema_decay=0.9998,
    torchcompile=None,
    torchcompile_mode=None,
    seed=42,
    val_interval=1,
    checkpoint_hist=10,
    # ours
    pad=None,  # crop from so many pixels of padding, and flip, on the device, instead of train.py's crop
    pad_value=128,
    cutout=0,  # side of the square
)

OPTIMIZERS = {"sgd", "momentum"}
"""torch's SGD, with and without Nesterov momentum: the one whose fused step takes its rate from the device."""


OF_TIMMS_CROP = {"train_crop_mode", "scale", "ratio", "color_jitter", "train_interpolation"}
"""Settings of the crop that ``pad`` replaces."""

SCRIPT = "benchmarks/gpu/run.py"
"""What a run's record says of the script that made it; train.py's has nothing there."""


def read_recipe(file: Path | None, settings: dict[str, Any]) -> argparse.Namespace:
    """Read a YAML file of train.py's kind.

    Args:
        file: The file, if any.
        settings: What goes before the file's; ``model_kwargs`` are merged.

    Raises:
        ValueError: If a setting is unknown or would be ignored here.
    """
    given = yaml.safe_load(file.read_text()) if file is not None else {}
    model_kwargs = {**(given.get("model_kwargs") or {}), **settings.get("model_kwargs", {})}
    given = {**given, **settings, "model_kwargs": model_kwargs}
    unknown = sorted(given.keys() - DEFAULTS.keys())
    if unknown:
        raise ValueError(f"This loop does not know {', '.join(unknown)}; leave it out, or train with train.py.")
    args = argparse.Namespace(**{**DEFAULTS, **given})
    without_effect = sorted(given.keys() & OF_TIMMS_CROP)
    if args.pad is not None and without_effect:
        raise ValueError(f"pad is {args.pad}, with which {', '.join(without_effect)} would be ignored; leave them out.")
    _check(args)
    args.script = SCRIPT
    if args.pad is not None:
        vars(args).update(dict.fromkeys(OF_TIMMS_CROP))  # so that no record tells of a crop that was not made
    return args


def _check(args: argparse.Namespace) -> None:
    if not args.model or not args.lr:
        raise ValueError(f"model is {args.model!r} and lr {args.lr!r}; a recipe names both.")
    if args.opt not in OPTIMIZERS:
        raise ValueError(f"opt is {args.opt!r}; this loop has {' and '.join(sorted(OPTIMIZERS))}, train.py the others.")
    if args.sched == "plateau":
        raise ValueError("sched is 'plateau', which wants the loss at every update; take another, or train.py.")
    if args.sched == "none":
        raise ValueError("sched is 'none', for which timm makes no schedule; take 'constant'.")
    if args.model_kwargs.get("aggregator"):
        raise ValueError(
            f"aggregator is {args.model_kwargs['aggregator']!r}, which waits for the device; use train.py."
        )
    if args.kd_distill_type != "logit":
        raise ValueError(f"kd_distill_type is {args.kd_distill_type!r}; a teacher of every exit gives its 'logit'.")
    if args.reprob and args.remode != "const":
        raise ValueError(f"remode is {args.remode!r}; this loop erases with 'const' only.")
    if args.amp and args.amp_dtype != "bfloat16":
        raise ValueError(f"amp_dtype is {args.amp_dtype!r}; this loop scales no loss, so take 'bfloat16'.")


def keywords(words: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` words as train.py reads them.

    Raises:
        ValueError: If a word has no ``=``.
    """
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is no setting; write NAME=VALUE.")
    parser = argparse.ArgumentParser()
    parser.add_argument("--words", nargs="*", default={}, action=ParseKwargs)
    return parser.parse_args(["--words", *words]).words
