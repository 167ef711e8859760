"""Which way of training is the fastest on this machine: a few epochs of each, the last one's seconds.

    python benchmarks/gpu/speed.py -c benchmarks/gpu/recipes/autoaugment.yaml --data ~/cifar100 --output speed.json \\
        --run joint beta=joint --run dfs beta=0.5

Each way is a process of its own, with a limit; one that fails or does not get to its end says why, and the others go
on. With --train-script and --folders (see pack.py), timm's train.py is among them, on one run, with the crop and the
augmentation that it has for the recipe's.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

WAYS = {
    "eager": ("--capture", "off"),
    "graph": ("--capture", "chain"),
    "graph, runs as branches": ("--capture", "branches"),
    "compiled, graph": ("--capture", "chain", "--set", "torchcompile=inductor"),
}
"""Flags of run.py. With one run, a chain and branches are the same."""

SCRIPT_WAYS = {
    "train.py": (),
    "train.py, reduce-overhead": ("--torchcompile", "inductor", "--torchcompile-mode", "reduce-overhead"),
}

HERE = Path(__file__).parent


def measure_way(flags: tuple[str, ...], args: argparse.Namespace, runs: list[list[str]]) -> float | str:
    """Seconds of an epoch of all ``runs`` together by run.py, or why there are none."""
    settings = [*args.set, f"epochs={args.epochs}", f"val_interval={args.epochs}", "cooldown_epochs=0"]
    if "--set" in flags:
        place = flags.index("--set")
        settings, flags = [*settings, *flags[place + 1 :]], flags[:place]
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, str(HERE / "run.py"), *flags, "--data", str(args.data), "--output", output]
        command += ["-c", str(args.config), "--set", *settings]
        for run in runs:
            command += ["--run", *run]
        finished = _finished(command, args.seconds, output)
        if isinstance(finished, str):
            return finished
        lines = (Path(output) / runs[0][0] / "exits.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["seconds"]


def measure_script(flags: tuple[str, ...], args: argparse.Namespace) -> float | str:
    """Seconds of an epoch of the first run by train.py, or why there are none."""
    recipe = yaml.safe_load(args.config.read_text())
    images, batch = sum(1 for _ in (args.folders / "train").rglob("*.png")), recipe["batch_size"]
    if recipe.pop("aa", None):
        recipe["aa"] = "v0"  # AutoAugment for ImageNet, which takes as long as the other
    for ours in ("dataset", "input_key", "target_key"):
        recipe.pop(ours, None)
    with tempfile.TemporaryDirectory() as output:
        script = Path(output) / "train.py"  # a copy, or Python would find a checkout's timm beside it
        shutil.copy(args.train_script, script)
        config = Path(output) / "recipe.yaml"
        config.write_text(yaml.safe_dump(dict(recipe, train_split="train", val_split="")))
        command = [sys.executable, str(script), str(args.folders), "-c", str(config), *flags]
        command += ["--epochs", str(args.epochs), "--output", output, "--model-kwargs", *args.run[0][1:]]
        finished = _finished(command, args.seconds, output)
        if isinstance(finished, str):
            return finished
        rates = re.findall(r"\(\d+\.\d+s, +(\d+\.\d+)/s\)", finished.stderr)
    return images // batch * batch / float(rates[-1])


def _finished(command: list[str], seconds: float, folder: str) -> "subprocess.CompletedProcess[str] | str":
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers and compilers with it, or they would slow down the next
        process.communicate()
        return f"not done in {seconds:g} s"
    if process.returncode:
        return (stderr.strip().splitlines() or ["no reason given"])[-1]
    return subprocess.CompletedProcess(command, 0, stdout, stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", nargs="+", action="append", required=True, metavar="WORD", help="as for run.py")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="as for run.py")
    parser.add_argument(
        "--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="limit of each way")
    parser.add_argument("--train-script", type=Path, help="timm's train.py")
    parser.add_argument("--folders", type=Path, help="the images as train.py reads them")
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    args = parser.parse_args()
    args.config, args.data = args.config.resolve(), args.data.resolve()
    table = []

    def add(way: str, runs: int, found: float | str) -> None:
        table.append(dict(way=way, runs=runs, seconds=found))
        in_words = found if isinstance(found, str) else f"{found:.2f} s an epoch, {found / runs:.2f} s for each run"
        print(f"{way}, {runs} run{'s' if runs > 1 else ''}: {in_words}", flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps(table, indent=1) + "\n")

    for way in args.ways:
        for runs in [args.run] if len(args.run) == 1 else [args.run, args.run[:1]]:
            add(way, len(runs), measure_way(WAYS[way], args, runs))
    if args.train_script is not None:
        args.train_script, args.folders = args.train_script.resolve(), args.folders.resolve()
        for way, flags in SCRIPT_WAYS.items():
            add(way, 1, measure_script(flags, args))


if __name__ == "__main__":
    main()
