"""Reference router for exported stages: early exit on the host, for runtimes without control flow.

It needs numpy and onnxruntime, neither torch nor timm_dfs; for ``.pte`` files it needs executorch and torch instead.
Export writes a copy of it beside the stages. From a shell, ``python router.py images.npy`` prints each image's class
and exit.
"""

import json
import sys
from pathlib import Path

import numpy as np


class Router:
    """Runs the stages of an exported folder; the batch shrinks as images exit.

    Args:
        folder: The folder with ``router.json``.
        threads: Threads of each stage; 0 for as many as there are cores. ExecuTorch takes no number of threads.
    """

    def __init__(self, folder, threads=0):
        self.about = json.loads((Path(folder) / "router.json").read_text())
        self.stages = [(stage, self.open(Path(folder) / stage["file"], threads)) for stage in self.about["stages"]]

    def open(self, file, threads):
        """Object whose ``run(None, inputs by name)`` returns a stage's outputs; override it for another runtime."""
        if file.suffix == ".pte":
            return Program(file)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the stages wait for each other
        return onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])

    def __call__(self, images, thresholds=None):
        """Logits (B, classes) and exits (B,) of images (B, C, H, W) float32; ``thresholds``: one for each exit."""
        own = self.about["thresholds"]
        thresholds = own if thresholds is None else list(thresholds)
        if len(thresholds) != len(own):
            raise ValueError(f"There are {len(thresholds)} thresholds for {len(own)} exits; give one for each exit.")
        thresholds = np.array([np.inf if value is None else value for value in thresholds], np.float32)
        here = {stage["exit_index"] for stage, _ in self.stages}
        highest = max(len(thresholds) - 2, 0) if self.about["confidence"] == "patience" else 1
        if any(k not in here and value <= highest for k, value in enumerate(thresholds)):
            raise ValueError(f"thresholds is {thresholds}; only exits {sorted(here)} are in these stages.")
        fixed = self.about.get("batch_size", len(images))
        if len(images) != fixed:
            raise ValueError(f"There are {len(images)} images; these stages take {fixed} at a time.")
        rows = np.arange(len(images))  # of the active images
        logits = np.zeros((len(images), self.about["num_classes"]), np.float32)
        exits = np.zeros(len(images), np.int64)
        memory = dict(broken=np.zeros(len(images), bool))
        state = {"images": images}
        done = np.zeros(len(images), bool)  # of the active ones, those computed on where the batch cannot shrink
        for stage, session in self.stages:
            outputs = session.run(None, {name: state[name] for name in stage["inputs"]})
            state.update(zip(stage["outputs"], outputs[1:]))
            k, last = stage["exit_index"], stage is self.stages[-1][0]
            scores = self.combined(k, outputs[0], memory)
            confident = self.confidence(k, scores, memory) >= thresholds[k]
            leaving = ~done & ((confident & ~memory["broken"]) | last)
            logits[rows[leaving]], exits[rows[leaving]] = scores[leaving], k
            done |= leaving
            if done.all():
                break
            if stage["shrinks"]:
                keep = np.flatnonzero(~done)
                state = {name: take(state[name], keep, len(rows)) for name in stage["keeps"]}
                memory = {name: value[keep] for name, value in memory.items()}
                rows, done = rows[keep], done[keep]
        return logits, exits

    def combined(self, k, logits, memory):
        """Logits (B, classes) of the policy at exit k; an ensemble notes the exit's own in ``memory``."""
        if self.about["weights"] is None:
            return logits
        memory[f"logits {k}"] = logits
        return sum(memory[f"logits {j}"] * np.float32(weight) for j, weight in self.about["weights"][str(k)].items())

    def confidence(self, k, logits, memory):
        """Confidence (B,) of exit k; notes in ``memory`` what later exits need of it."""
        largest = logits.max(1)
        memory["broken"] |= ~np.isfinite(largest)
        kind, temperatures = self.about["confidence"], self.about["temperatures"]
        if kind == "patience":
            prediction = logits.argmax(1)
            same = prediction == memory.get("prediction", -1)
            memory["agreed"] = (memory.get("agreed", 0) + 1) * same
            memory["prediction"] = prediction
            return memory["agreed"].astype(np.float32)
        with np.errstate(invalid="ignore"):  # rows with NaN go to the last exit
            scaled = (logits - largest[:, None]) / np.float32(temperatures[k] if temperatures else 1)
            p = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
        if kind == "max_prob":
            return p.max(1)
        if kind == "margin":
            best = np.sort(p, 1)[:, -2:]
            return best[:, -1] - best[:, :-1].sum(1)
        if kind != "entropy":
            raise ValueError(f"router.json has the confidence {kind!r}, which this router does not compute.")
        entropy = -(p * np.log(np.maximum(p, np.finfo(np.float32).tiny))).sum(1)
        return np.maximum(1 - entropy / np.float32(np.log(max(2, p.shape[1]))), 0)


class Program:
    """ExecuTorch's program of a stage, with the ``run`` of onnxruntime's sessions. Inputs are in the stage's order."""

    def __init__(self, file):
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(file)
        self.forward = self.program.load_method("forward")

    def run(self, names, inputs):
        import torch

        outputs = self.forward.execute([torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values()])
        return [output.numpy().copy() for output in outputs]


def take(tensor, keep, batch):
    """Rows of the images ``keep`` of a tensor that has one or several rows for each of ``batch`` images."""
    return tensor.reshape(batch, -1, *tensor.shape[1:])[keep].reshape(-1, *tensor.shape[1:])


if __name__ == "__main__":
    router, images = Router(Path(__file__).parent), np.load(sys.argv[1]).astype(np.float32)
    size = router.about.get("batch_size", max(len(images), 1))
    for batch in np.split(images, range(size, len(images), size)):
        filled = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), np.float32)])
        for scores, left_at, _ in zip(*router(filled), batch):
            print(scores.argmax(), left_at)
