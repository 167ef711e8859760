"""docs/reproduction.md and its plot, generated from the shipped results and the benchmarks' results.

python benchmarks/reproduction.py
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outcome import SHARES
from study import RECIPES, SETTINGS, TEACHER, TEACHING, teaching_of
from templates import template

from timm_dfs.hub import curve
from timm_dfs.hub.both_parts import both_parts
from timm_dfs.report.published import published_results

ROOT = Path(__file__).parent.parent
TEXT, PLOT = "reproduction.md", "reproduction.svg"
DFS, JOINT = "dfs_msdnet_cifar100", "dfs_msdnet_cifar100.joint"
FINE_TUNED_DFS, FINE_TUNED_JOINT = "dfs_tf_efficientnet_lite0.cifar100_dfs", "dfs_tf_efficientnet_lite0.cifar100"
WITHOUT_EXITS = "last exit alone"
WITH_EXITS = [setting for setting in SETTINGS if setting != WITHOUT_EXITS]
DFS_05 = "one-sided 0.5"
"""DFS as in the official code, of the study's settings."""
VALUES: dict[str, Callable[[dict], list[float]]] = dict(
    top1=lambda run: run["top1"],
    together=lambda run: run["together"]["fitted"],
    gain=lambda run: [a - b for a, b in zip(run["together"]["fitted"], run["top1"])],
    disagreement=lambda run: run["disagreement"],
    early_exit=lambda run: run["early_exit"]["alone"],
    early_exit_together=lambda run: run["early_exit"]["fitted"],
)
"""What the tables of a run show, by name."""
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Quantile of Student's t, two-sided at 95 %, by the number of seeds."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of a setting minus that of joint training at one exit, seed by seed, in percentage points.

    Attributes:
        mean: Mean over the seeds.
        spread: Standard deviation over the seeds; ``None`` for one seed.
        clear: Whether the 95 % interval of the mean excludes 0.
    """

    mean: float
    spread: float | None
    clear: bool


def main() -> None:
    for name, text in generated(ROOT).items():
        (ROOT / "docs" / name).write_text(text)


def generated(root: Path) -> dict[str, str]:
    """Contents of the files under docs/, by name, generated from a checkout's results."""
    results, fine_tuned = (
        {name: json.loads((root / "hub" / name / "results.json").read_text()) for name in names}
        for names in ((DFS, JOINT), (FINE_TUNED_DFS, FINE_TUNED_JOINT))
    )
    earlier = {
        runs: {
            method: json.loads((root / "benchmarks/results" / runs / f"{name}.json").read_text())
            for method, name in dict(dfs=DFS, joint=JOINT).items()
        }
        for runs in ("epochs79", "short")
    }
    runs, plain, augmented, of_seeds = (
        [json.loads(line) for line in (root / "benchmarks/results" / name).read_text().splitlines()]
        for name in ("study.jsonl", "study_plain.jsonl", "study_randaugment.jsonl", "fine_tuned.jsonl")
    )
    both = crossed(plain, augmented)
    speeds = json.loads((root / "benchmarks/results/train_step.json").read_text())
    conflict = json.loads((root / "benchmarks/results/conflict.json").read_text())
    dfs, joint = results[DFS], results[JOINT]
    settings, fine_tuned_settings = (
        json.loads((root / "hub" / name / "config.json").read_text())["model_args"] for name in (DFS, FINE_TUNED_DFS)
    )
    text = template(
        "reproduction.md.jinja",
        signed=lambda value: f"{value:+.2f}",
        percent=lambda share: f"{share:.0%}",
        speed_up=lambda speeds: speeds["DFS 0.5"] / speeds["joint"],
    ).render(
        verdict=verdict,
        clearly_ahead=lambda found: _clear(found, 1) or "no exit",
        minus=lambda ours, theirs: [a - b for a, b in zip(ours, theirs)],
        numbers=numbers,
        dfs=dfs,
        joint=joint,
        whole_split=dict(dfs=whole_split(dfs), joint=whole_split(joint)),
        settings=settings,
        plain=earlier["epochs79"],
        short=earlier["short"],
        published=published_results("cifar100", 100, dfs["flops"]),
        whole=dfs["last_exit_flops"],
        half={name: at_most(results[name], dfs["last_exit_flops"] / 2) for name in results},
        reached=reached(dfs, joint),
        budgets=[name for name in dfs["test"]["presets"] if name.endswith("M") and name in joint["test"]["presets"]],
        study=study(runs),
        augmented=[
            dict(
                together(of_length, WITH_EXITS),
                missing=missing(of_length),
                taught={
                    name: teaching
                    for name, teaching in TEACHING.items()
                    if any(teaching_of(run["setting"]) == name for run in of_length)
                },
                without_exits=without_exits(of_length),
            )
            for of_length in divided(augmented, "epochs")
            if of_length[0]["epochs"] not in {table["epochs"] for table in both}
            or any(run["setting"] not in ("joint", DFS_05) for run in of_length)
        ],
        crossed=both,
        dfs_setting=DFS_05,
        augmentation=RECIPES["randaugment"],
        teacher=TEACHER,
        over_seeds=over_seeds(of_seeds),
        shares=SHARES,
        fine_tuned_referencing=fine_tuned_settings["referencing"],
        fine_tuned=dict(dfs=fine_tuned[FINE_TUNED_DFS], joint=fine_tuned[FINE_TUNED_JOINT]),
        distill_weight=SETTINGS["joint, distilled"]["distill_weight"],
        speeds=speeds,
        conflict=conflict,
        conflicts=conflicts_in_training(conflict["measured"]),
    )
    title = f"{DFS}, {dfs['training']['epochs']} epochs: top-1 accuracy, %"
    return {TEXT: text, PLOT: curve.draw_two(title, dfs, joint, ("DFS", "joint"))}


def conflicts_in_training(measured: list[dict]) -> dict[str, float]:
    """Conflicting pairs, on average over batches, of the gradients that each network was trained with, by its name."""
    return {
        row["network"]: row["conflicting"] * row["pairs"]
        for row in measured
        if (row["beta"] == "joint") == (row["network"] == JOINT)
    }


def whole_split(results: dict) -> dict:
    """Accuracies on the whole test split, whether half of it fitted thresholds or not."""
    return both_parts(results) or results["test"]


def numbers(differences: list[float], sign: int) -> str:
    """Exits at which a difference is positive, or negative, as a list in words."""
    return in_words([k for k, difference in enumerate(differences) if sign * difference > 0]) or "no exit"


def in_words(exits: list[int]) -> str:
    """``exit 2``, ``exits 2, 4``; nothing for none."""
    return f"exit{'s' * (len(exits) > 1)} {', '.join(map(str, exits))}" if exits else ""


def at_most(results: dict, budget: float) -> dict:
    """Most expensive point of a budgeted-batch curve within a budget; test accuracy does not decide the choice."""
    points = results["test"]["budgeted_batch"]
    return max((p for p in points if p["average_flops"] <= budget), key=lambda p: p["average_flops"])


def reached(dfs: dict, joint: dict) -> dict:
    """Cheapest points of early exit that reach the accuracy of joint training's best exit; ``None`` if none does."""
    best = max(range(len(joint["test"]["top1"])), key=lambda k: joint["test"]["top1"][k])
    accuracy = joint["test"]["top1"][best]
    points = [point for point in dfs["test"]["budgeted_batch"] if point["top1"] >= accuracy]
    own = [point for point in joint["test"]["budgeted_batch"] if point["top1"] >= accuracy]

    def cheapest(points: list[dict]) -> dict | None:
        return min(points, key=lambda point: point["average_flops"], default=None)

    most = max(dfs["test"]["budgeted_batch"], key=lambda point: point["top1"])
    return dict(exit=best, accuracy=accuracy, dfs=cheapest(points), joint=cheapest(own), dfs_best=most)


def study(runs: list[dict]) -> list[dict]:
    """Tables of the study, one per number of epochs: accuracy and difference to joint training, exit by exit."""
    tables = []
    for of_length in divided(runs, "epochs"):
        rows = compared(of_length, lambda run: run["top1"], WITH_EXITS)
        if not rows:  # joint training is still to come
            continue
        epochs, exits = of_length[0]["epochs"], len(rows[0]["mean"])
        tables.append(dict(epochs=epochs, rows=rows, exits=exits, missing=missing(of_length)))
    return tables


def missing(runs: list[dict]) -> list[str]:
    """Settings of the study, of networks with exits, that were not run."""
    return [setting for setting in WITH_EXITS if setting not in {run["setting"] for run in runs}]


def without_exits(runs: list[dict]) -> dict | None:
    """The last exit of the network that was trained for it alone, as a row of a table; ``None`` if it was not run."""
    return next(iter(compared(runs, lambda run: run["top1"][-1:], [WITHOUT_EXITS])), None)


def over_seeds(runs: list[dict]) -> list[dict]:
    """Tables of runs that fine-tune one network, for each recipe its own: runs of two are not comparable."""
    return [
        dict(
            together(of_recipe, list(dict.fromkeys(run["setting"] for run in of_recipe))), recipe=of_recipe[0]["recipe"]
        )
        for of_recipe in divided(runs, "recipe")
    ]


def divided(runs: list[dict], key: str) -> list[list[dict]]:
    """Runs divided by a value, in the order in which the values first occur."""
    return [[run for run in runs if run[key] == value] for value in dict.fromkeys(run[key] for run in runs)]


def together(runs: list[dict], settings: list[str]) -> dict:
    """Tables of comparable runs: exits alone and together, the gain and the disagreement, and early exit."""
    tables = {name: compared(runs, value, settings) for name, value in VALUES.items()}
    alike = {name: compared(runs, VALUES[name], settings, joint_alike) for name in ("together", "gain", "disagreement")}
    return dict(tables=tables, alike=alike, epochs=runs[0]["epochs"], flops=runs[0]["flops"])


def crossed(plain: list[dict], augmented: list[dict]) -> list[dict]:
    """Joint training and DFS with and without augmentation, one for each number of epochs that both were run for.

    A table has the mean accuracies of joint training and DFS without augmentation, then with it, and what DFS changes
    without and with it, then what the augmentation changes with joint training and with DFS.
    """
    found = []
    for epochs in dict.fromkeys(run["epochs"] for run in plain):
        of_cells = [
            {run["seed"]: run for run in runs if (run["epochs"], run["setting"]) == (epochs, setting)}
            for runs in (plain, augmented)
            for setting in ("joint", DFS_05)
        ]
        seeds = set.intersection(*map(set, of_cells))
        if not seeds:
            continue
        tables = {}
        for name, value in VALUES.items():
            cells = [{seed: value(runs[seed]) for seed in sorted(seeds)} for runs in of_cells]
            tables[name] = dict(
                means=[[statistics.mean(values) for values in zip(*cell.values())] for cell in cells],
                changes=[differences(cells[one], cells[other]) for one, other in ((1, 0), (3, 2), (2, 0), (3, 1))],
            )
        runs = [runs[seed] for runs in of_cells for seed in sorted(seeds)]
        machines = list(dict.fromkeys(run["machine"] for run in runs))
        found.append(dict(tables=tables, epochs=epochs, seeds=len(seeds), flops=runs[0]["flops"], machines=machines))
    return found


def joint_alike(setting: str) -> str:
    """The setting of joint training with a setting's chain, distillation and teacher."""
    _, comma, rest = setting.partition(", ")
    return f"joint{comma}{rest}"


def compared(
    runs: list[dict],
    value: Callable[[dict], list[float]],
    settings: list[str],
    reference: Callable[[str], str] = lambda setting: "joint",
) -> list[dict]:
    """Rows of a table: each setting's mean over seeds and its difference to a setting of joint training.

    Seeds that joint training was not run with yet are left out.
    """
    found: dict[str, dict[int, list[float]]] = {}
    of_joint = {run["seed"] for run in runs if run["setting"] == "joint"}
    for run in (run for run in runs if run["seed"] in of_joint and run["setting"] in {"joint", *settings}):
        found.setdefault(run["setting"], {})[run["seed"]] = value(run)
    return [
        dict(
            setting=setting,
            seeds=len(found[setting]),
            mean=[statistics.mean(values) for values in zip(*found[setting].values())],
            differences=[]
            if setting == (joint := reference(setting)) or joint not in found
            else differences(found[setting], found[joint]),
        )
        for setting in settings
        if setting in found
    ]


def differences(of_seeds: dict[int, list[float]], joint: dict[int, list[float]]) -> list[Difference]:
    """Differences to joint training with the same seeds, exit by exit."""
    pairs = [[ours - theirs for ours, theirs in zip(of_seeds[seed], joint[seed])] for seed in of_seeds if seed in joint]
    found = []
    for values in zip(*pairs):
        if len(values) == 1:
            found.append(Difference(values[0], None, clear=False))
            continue
        mean, spread = statistics.mean(values), statistics.stdev(values)
        found.append(Difference(mean, spread, abs(mean) > T_QUANTILE[len(values)] * spread / math.sqrt(len(values))))
    return found


def verdict(found: list[Difference]) -> str:
    """Sentence on the exits at which a setting is clearly ahead of or behind joint training."""
    where = {word: _clear(found, sign) for word, sign in dict(ahead=1, behind=-1).items()}
    parts = [f"clearly {word} at {exits}" for word, exits in where.items() if exits]
    return "; ".join(parts) or "no clear difference to joint training at any exit"


def _clear(found: list[Difference], sign: int) -> str:
    """Exits at which the differences are clearly positive, or negative, in words; nothing for none."""
    return in_words([k for k, difference in enumerate(found) if difference.clear and sign * difference.mean > 0])


if __name__ == "__main__":
    main()
