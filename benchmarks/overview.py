"""The README's picture, accuracy against cost of the models in hub/ measured on CIFAR-100, from their results.json.

python benchmarks/overview.py
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from templates import template

ROOT = Path(__file__).parent.parent
PICTURE = "accuracy-cost.svg"
DATASET = "uoft-cs/cifar100"
WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 40, 48
COLOURS = ("#1f77b4", "#d9700f", "#7b5bd6", "#2a9d8f", "#b5304f")


@dataclass(frozen=True)
class Axis:
    """Linear scale from values to pixels, with round ticks.

    Attributes:
        ticks: Values with a grid line; the first and the last bound the axis.
        start: Pixel of the first tick.
        end: Pixel of the last tick.
    """

    ticks: list[float]
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.start + share * (self.end - self.start), 1)


def main() -> None:
    (ROOT / "docs" / PICTURE).write_text(picture(ROOT))


def picture(root: Path) -> str:
    """SVG of the budgeted-batch curves, presets and last exits of all models with results on :data:`DATASET`."""
    models = [read(file) for file in sorted((root / "hub").glob("*/results.json"))]
    models = [model for model in models if model["dataset"] == DATASET]
    costs = [cost for model in models for cost, _ in model["curve"]]
    accuracies = [top1 for model in models for _, top1 in [*model["curve"], model["last"]]]
    return template("overview.svg.jinja").render(
        dataset=DATASET,
        models=list(zip(COLOURS[: len(models)], models, strict=True)),
        x=Axis(ticks(0, max(costs), 50), LEFT, WIDTH - RIGHT),
        y=Axis(ticks(min(accuracies), max(accuracies), 2), HEIGHT - BOTTOM, TOP),
        width=WIDTH,
        height=HEIGHT,
    )


def read(file: Path) -> dict:
    """Name, training method, curve, presets and last exit of a model; costs in millions, accuracies in percent."""
    results = json.loads(file.read_text())
    test = results["test"]
    beta = json.loads(file.with_name("config.json").read_text())["model_args"]["beta"]

    def point(entry: dict) -> tuple[float, float]:
        return entry["average_flops"] / 1e6, entry["top1"]

    return dict(
        name=results["model"],
        dataset=results["dataset"],
        method="joint training" if beta == "joint" else "DFS",
        curve=[point(entry) for entry in test["budgeted_batch"]],
        presets={name: point(entry) for name, entry in test["presets"].items()},
        last=(results["last_exit_flops"] / 1e6, test["top1"][-1]),
    )


def ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of ``step`` that enclose ``low`` and ``high``."""
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


if __name__ == "__main__":
    main()
