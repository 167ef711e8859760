"""Seconds of an epoch on this GPU by each way of launching the runs' steps, measured in one process.

    python benchmarks/gpu/speed.py -c benchmarks/gpu/recipes/plain.yaml --data ~/cifar100 --output speed.jsonl \\
        --run joint beta=joint --run dfs beta=0.5

A line is written as soon as its way is measured, so that a limit on the whole (timeout 300) leaves what came before.
The images are one batch again and again: what is timed is the device, not where images come from. Compiling two runs
took an H200 machine more than three minutes of one core, and run.py did it anew, so it pays for long trainings alone.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from batches import Batches
from run import add_arguments, training
from steps import EAGER_STEPS, Steps

WAYS = [("off", None), ("chain", None), ("branches", None), ("chain", "inductor"), ("branches", "inductor")]
"""How steps are captured, and the compiler."""

REPEATS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    lines = args.output
    with tempfile.TemporaryDirectory() as folder:  # nothing is trained that is worth keeping
        args.output = Path(folder)
        of_runs = training(args, "off")
    learners = list(of_runs.learners.values())
    device = learners[0].device
    for learner in learners:
        learner.model.train()
    for capture, compiler in WAYS:
        if compiler and learners[0].task.trainable_module is learners[0].model:
            for learner in learners:
                learner.task.compile(backend=compiler)
        ways = [learners] if len(learners) == 1 or capture == "branches" else [learners, learners[:1]]
        for runs in ways:
            line = dict(capture=capture, compiler=compiler, runs=len(runs))
            try:
                steps = Steps(runs, of_runs.steps.prepare, of_runs.steps.images.shape, device, capture)
                line |= _measured(steps, of_runs.batches)
            except Exception as error:  # the other ways go on
                line |= dict(error=f"{type(error).__name__}: {str(error)[:2000]}")
            print(json.dumps(line), flush=True)
            with lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
    of_runs.batches.close()


def _measured(steps: Steps, batches: Batches) -> dict[str, float]:
    """Seconds until captured steps run, milliseconds of a step, and what an epoch of them takes."""
    images, target = next(batches.epoch(0))
    with steps.on_stream():
        begun = time.perf_counter()
        for _ in range(EAGER_STEPS + 2):
            steps(images, target)
        _wait(steps.device)
        ready = time.perf_counter()
        for _ in range(REPEATS):
            steps(images, target)
        _wait(steps.device)
        took = time.perf_counter() - ready
    step = took / REPEATS
    return dict(ready_after=round(ready - begun, 2), step_ms=round(1000 * step, 3), epoch=round(step * len(batches), 3))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
