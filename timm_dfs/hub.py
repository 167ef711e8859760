"""What is published of a model: one folder with weights, config, measured results and the card made from them."""

import json
from pathlib import Path
from string import Template

import torch
from huggingface_hub import EvalResult, ModelCardData
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from .multi_exit import MultiExitModel, evaluating
from .weights import CONFIG_FILE, WEIGHTS_FILE

RESULTS_FILE = "results.json"
CARD_FILE = "README.md"


def write_weights(model: MultiExitModel, folder: Path) -> None:
    """Write a model's weights in half precision, and the config timm rebuilds it from, presets included."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for key, value in model.state_dict().items():
        weights[key] = (value.half() if value.is_floating_point() else value).contiguous()
        if not weights[key].isfinite().all():
            raise ValueError(
                f"{key} does not fit into half precision, or was not finite: its largest value is {value.max()}."
            )
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    save_config_for_hf(model, str(folder / CONFIG_FILE))


def golden_batch(model: MultiExitModel) -> torch.Tensor:
    """Two images that are the same everywhere, to compare a model's logits on: (2, C, H, W)."""
    shape = (2, *model.pretrained_cfg["input_size"])
    return torch.arange(torch.Size(shape).numel()).mul(0.37).sin().reshape(shape)


def golden_logits(model: MultiExitModel) -> list[list[list[float]]]:
    """The first five logits of every exit for each image of :func:`golden_batch`: exits × images × 5."""
    with evaluating(model), torch.inference_mode():
        return torch.stack(model.forward_exits(golden_batch(model)))[:, :, :5].tolist()


def write_card(folder: Path) -> None:
    """Write the card of a folder from its results and config alone."""
    (folder / CARD_FILE).write_text(card(folder))


def card(folder: Path) -> str:
    """The card (Markdown with the Hub's metadata) of a folder, from its results and config alone."""
    results = json.loads((folder / RESULTS_FILE).read_text())
    config = json.loads((folder / CONFIG_FILE).read_text())
    name = config["architecture"]
    if results["dataset"] != "uoft-cs/cifar100":
        raise ValueError(f"The card's text is about CIFAR-100, but {folder} was evaluated on {results['dataset']}.")
    test = results["test"]
    metadata = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license="apache-2.0",
        datasets=[results["dataset"]],
        tags=["image-classification", "timm", "early-exit", "multi-exit", "timm-dfs"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=results["dataset"],
                dataset_name="CIFAR-100, test",
                metric_type="accuracy",
                metric_name=f"top-1, exit {k}",
                metric_value=round(top1, 2),
            )
            for k, top1 in enumerate(test["top1"])
        ],
    )
    rows = [
        f"| {k} | {top1:.2f} | {top5:.2f} | {ece:.4f} | {cost / 1e6:.1f} | {lazy / 1e6:.1f} |"
        for k, (top1, top5, ece, cost, lazy) in enumerate(
            zip(test["top1"], test["top5"], test["ece"], results["flops"], results["flops_lazy"], strict=True)
        )
    ]
    presets = [
        f"| `{preset}` | {point['top1']:.2f} | {point['average_flops'] / 1e6:.1f} | "
        f"{point['average_flops'] / results['last_exit_flops']:.0%} |"
        for preset, point in test["presets"].items()
    ]
    training = results["training"]
    model_args = config["model_args"]
    return Template(_CARD).substitute(
        metadata=metadata.to_yaml(),
        name=name,
        beta=model_args["beta"],
        referencing=model_args["referencing"],
        table="\n".join(rows),
        presets="\n".join(presets),
        whole=f"{results['last_exit_flops'] / 1e6:.1f}",
        choice=results["balanced"],
        samples=f"{test['samples']:,}",
        epochs=training["epochs"],
        recipe=training["recipe"],
        train_samples=f"{training['samples']:,}",
        held_out=f"{results['held_out']['samples']:,}",
        seed=training["seed"],
        hardware=training["hardware"],
        hours=f"{training['hours']:.1f}",
        versions=", ".join(f"{package} {version}" for package, version in training["versions"].items()),
    )


_CARD = """---
$metadata
---

# $name

A network with several exits, trained with Deep Feature Surgery (beta $beta, referencing $referencing). Each image
can leave at the first exit that is confident enough.

Trained for $epochs epochs with timm's `train.py`: what that gives, no more. The paper trains for 300.

## Use

```python
import timm
import timm_dfs  # registers $name

model = timm.create_model("$name", pretrained=True).eval()
prediction = timm_dfs.predict(model, images, "balanced")  # logits, and the exit that answered each image
```

## Accuracy and cost of each exit

On the $samples images of the test split. Cost in millions of multiply-adds per image, up to and including the exit:
as published (all that the training forward computes) and lazy (what early exit computes). The last exit alone, no
other head computed, costs $whole.

| exit | top-1, % | top-5, % | ECE | published | lazy |
|---|---|---|---|---|---|
$table

## Operating points

Thresholds were fixed on the $held_out held-out training images and applied to the test split. `balanced` is $choice.
The last column compares with the last exit alone.

| preset | top-1, % | average multiply-adds, M | share of the whole |
|---|---|---|---|
$presets

## Training

- $train_samples images of the training split, recipe `$recipe`, seed $seed
- $hardware; $hours hours between the run's first file and its last, on a machine that did other work too
- $versions

Everything measured is in `results.json`.

## Limits and risks

CIFAR-100's images are 32×32 and its 100 classes are arbitrary: for anything else the answer is wrong, and can be
confident all the same. Early exit trusts the confidence of early exits; on images unlike CIFAR-100's its thresholds
promise nothing. Not for decisions about people.

## Citation

```bibtex
@inproceedings{gong2024deep,
  title     = {Deep Feature Surgery: Towards Accurate and Efficient Multi-Exit Networks},
  author    = {Gong, Cheng and Chen, Yao and Luo, Qiuyang and Lu, Ye and Li, Tao and Zhang, Yuzhi and Sun, Yufei
               and Zhang, Le},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024}
}
```
"""
