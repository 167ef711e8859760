"""Exporting a network with exits to ONNX."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ..base.evaluating import as_images, require_classes, require_exits
from ..base.model import MultiExitModel
from ..base.new_folder import is_new, new_folder
from ..calibration.logits import check_data
from ..calibration.operating_point import Data
from ..inference.policy import ExitPolicy
from ..inference.prediction import Prediction, predict, resolve_policy
from .conditional import conditional_graph
from .cut import cut, shrinks
from .metadata import describe, to_model
from .network import BATCH, check_opset, plain, require, trace
from .quantize import Quantization, all_logits, quantize, refit
from .router import Router
from .stages import last_graph, routing, stage_graphs
from .verify import Check, Run, verify

LAYOUTS = ("graph", "stages", "last")

MODEL_FILE, ROUTER_FILE = "model.onnx", "router.json"

VERIFIED = 8
"""Images of noise to verify with, unless there are more exits."""


@dataclass(frozen=True)
class Export:
    """Exported files and the findings of their verification.

    Attributes:
        folder: Where it is.
        layout: ``"graph"``, ``"stages"`` or ``"last"``.
        files: Bytes of each file, by name.
        weights: Bytes of the network's weights in float32.
        exits: The exits in the files.
        shrinks: For each early exit of them, whether the batch shrinks behind it. Where it does not, all images are
            computed on until every one has exited.
        checks: The comparisons with :func:`timm_dfs.predict`; of int8 with the quantized network without early exits.
        quantization: What int8 changed on the calibration images; ``None`` without.
    """

    folder: Path
    layout: str
    files: dict[str, int]
    weights: int
    exits: tuple[int, ...]
    shrinks: tuple[bool, ...]
    checks: tuple[Check, ...]
    quantization: Quantization | None = None


def export_onnx(
    model: MultiExitModel,
    folder: str | Path,
    policy: ExitPolicy | str | None = None,
    layout: str = "graph",
    *,
    opset: int = 18,
    batch_size: int | None = None,
    softmax: bool = False,
    images: torch.Tensor | None = None,
    calibration: Data | None = None,
) -> Export:
    """Write a network with exits as ONNX that predicts as :func:`timm_dfs.predict` does, and verify it.

    Layouts:

    - ``"graph"``: one ``model.onnx`` that exits early by itself. Inputs: ``images`` (B, C, H, W) float32 and,
      optionally, ``thresholds`` (E,) float32, whose default is the policy's. Outputs: ``logits`` (B, classes) and
      ``exit_index`` (B,) int64.
    - ``"stages"``: one file for each exit, a ``router.json`` that says how they follow on each other, and a
      ``router.py`` that does it with numpy and onnxruntime. For runtimes without control flow.
    - ``"last"``: one ``model.onnx`` without early exits, to compare with. Output: ``logits``.

    Exits that the policy never uses are left out of the files. With an ensemble, every exit of the files contributes to
    those after it, whatever threshold it is given later; with patience, every one counts.

    Args:
        model: A network with exits. The files hold its weights in float32, batch norms folded.
        folder: Where to write; it must not exist, or be empty. Either all files appear in it or none.
        policy: A policy or the name of one of the model's presets. The layout ``"last"`` needs none.
        layout: One of those above.
        opset: Version of ONNX's operators, at least 18.
        batch_size: The only number of images the file takes; ``None``: any.
        softmax: Put out ``probabilities``, of logits divided by their exit's temperature, instead of ``logits``.
        images: Images (N, C, H, W) to verify with, normalised; by default noise. Their height and width become those
            of the file's input.
        calibration: Images (N, C, H, W), normalised, and their classes (N,), held out of training: quantize to int8
            with them, and choose thresholds by which as many of them leave at each exit as before.

    Returns:
        Files and checks.

    Raises:
        ValueError: If an argument is outside what is said above, the network cannot be expressed, or the verification
            fails.
        ModuleNotFoundError: Without the extra ``deploy``.
        OSError: If the files cannot be written.

    Example:
        >>> import tempfile, timm, timm_dfs
        >>> model = timm.create_model("dfs_vgg7_cifar100", depths=(1, 1), widths=(4, 4), num_classes=3)
        >>> policy = timm_dfs.ExitPolicy([0.5, 0.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(timm_dfs.export_onnx(model, f"{folder}/vgg", policy).files)
        ['model.onnx']
    """
    folder = Path(folder)
    check_arguments(model, folder, layout, batch_size, softmax)
    preset = policy if isinstance(policy, str) else None
    policy = policy_of(model, policy, layout)
    check_opset(opset)
    require("onnxruntime")
    exported = plain(model)
    if images is None:
        least, size = max(VERIFIED, len(policy.answering)), batch_size or 1
        images = noise(model, size * -(-least // size))  # whole batches
    images = as_images(exported, images)
    if (batch_size is not None and len(images) % batch_size) or not len(images):
        raise ValueError(f"There are {len(images)} images to verify with; give a multiple of {batch_size or 1}.")
    warn_of_untrained(model, policy)
    channels, height, width = images.shape[1:]
    network = trace(exported, (channels, height, width), opset)
    if calibration is None:
        with torch.inference_mode():
            logits = torch.stack(exported.forward_exits(images))
        quantization = None
    else:
        given, targets = as_images(exported, calibration[0]), calibration[1]
        if given.shape[2:] != images.shape[2:]:
            raise ValueError(
                f"The calibration images are {given.shape[2]} x {given.shape[3]} pixels, but the file takes "
                f"{height} x {width}; prepare them at that size, or give images of their size to verify with."
            )
        before = all_logits(network, given)
        check_data("calibration", (before, targets))
        network = quantize(network, given)
        quantization = refit(policy, before, all_logits(network, given), targets)
        policy = policy.with_thresholds(quantization.thresholds)
        logits = all_logits(network, images)
    stages = cut(network, policy.answering)
    facts = describe(exported, (channels, height, width), layout, None if layout == "last" else policy, preset)
    facts["precision"] = "float32" if quantization is None else "int8"
    batch = BATCH if batch_size is None else batch_size
    if layout == "graph":
        graphs = {MODEL_FILE: conditional_graph(network, stages, policy, model.num_classes, batch, softmax)}
    elif layout == "last":
        graphs = {MODEL_FILE: last_graph(network, stages[0], model.num_classes, batch, softmax)}
    else:
        names = [f"stage_{place}.onnx" for place in range(len(stages))]
        graphs = dict(zip(names, stage_graphs(network, stages, model.num_classes, batch)))
    with new_folder(folder) as partial:
        for name, graph in graphs.items():
            (partial / name).write_bytes(to_model(graph, opset, facts).SerializeToString())
        if layout == "stages":
            about = dict(routing(network, stages, policy, list(graphs)), **facts)
            if batch_size is not None:
                about["batch_size"] = batch_size
            (partial / ROUTER_FILE).write_text(json.dumps(about, indent=1, allow_nan=False) + "\n")
            shutil.copy(Path(__file__).with_name("router.py"), partial)
        run = runner(partial, layout, model.num_exits)

        def expect(policy: ExitPolicy) -> Prediction:
            if quantization is None:
                return predict(exported, images, policy)
            exits = policy.exit_index(logits)
            return Prediction(policy.predicted(logits)[exits, torch.arange(len(exits))], exits)

        checks = verify(expect, logits, policy, images, run, batch_size, softmax)
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    weights = sum(tensor.numel() * 4 for tensor in exported.parameters())
    fewer = tuple(shrinks(network, stage) for stage in stages[1:])
    return Export(folder, layout, files, weights, policy.answering, fewer, checks, quantization)


def runner(folder: Path, layout: str, num_exits: int, threads: int = 0) -> Run:
    """An exported folder in its runtime: ONNX Runtime, or ExecuTorch for ``.pte`` files."""
    if layout == "stages":
        return Router(folder, threads)
    session = open_session(folder / MODEL_FILE, threads)
    if layout == "graph":
        return lambda images, thresholds: session.run(None, {"images": images, "thresholds": thresholds})

    def last(images: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (logits,) = session.run(None, {"images": images})
        return logits, np.full(len(logits), num_exits - 1)

    return last


def open_session(file: Path, threads: int = 0, settings: dict[str, str] | None = None) -> Any:
    """ONNX Runtime's session of a file on the CPU, with entries of its session configuration."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # else it warns that thresholds may be overridden
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])


def noise(model: MultiExitModel, count: int) -> torch.Tensor:
    """Noise (count, C, H, W) as images in the size of the model's input."""
    size = (model.in_chans, *model.pretrained_cfg["input_size"][1:])
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def check_arguments(model: Any, folder: Path, layout: str, batch_size: int | None, softmax: bool) -> None:
    """Raise ``ValueError`` where an argument of an export is outside its range."""
    require_exits(model)
    if not isinstance(model, MultiExitModel):
        raise ValueError(f"{type(model).__name__} is compiled or wrapped; give the model itself.")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; choose one of {', '.join(map(repr, LAYOUTS))}.")
    require_classes(model)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}; give a number of images from 1 on, or None for any.")
    if softmax and layout == "stages":
        raise ValueError("Stages put out logits, which the router needs; leave softmax out, or use the layout graph.")
    if not is_new(folder):
        raise ValueError(f"{folder} exists and is not an empty folder; give one that does not exist.")


def policy_of(model: MultiExitModel, policy: ExitPolicy | str | None, layout: str) -> ExitPolicy:
    """The policy that the files of a layout predict with."""
    if layout == "last":
        if policy is not None:
            raise ValueError("The layout 'last' has no early exits; leave the policy out.")
        return ExitPolicy([*[None] * (model.num_exits - 1), 0.0])
    if policy is None:
        known = ", ".join(map(repr, model.presets)) or "none"
        raise ValueError(f"The layout {layout!r} needs a policy: an ExitPolicy or a preset; this model has {known}.")
    policy = resolve_policy(model, policy)
    if len(policy.answering) == 1:
        raise ValueError(f"No early exit can be reached by {policy}; use the layout 'last', or lower a threshold.")
    return policy


def warn_of_untrained(model: MultiExitModel, policy: ExitPolicy) -> None:
    """Warn of classifiers of early exits with biases of 0, and of batch norms with the statistics of no image."""
    biases = {k: getattr(classifier, "bias", None) for k, classifier in enumerate(model.get_classifier())}
    fresh = [k for k in policy.answering[:-1] if biases[k] is not None and not biases[k].detach().any()]
    if fresh:
        warnings.warn(
            f"The classifiers of exits {', '.join(map(str, fresh))} look untrained: their biases are 0.", stacklevel=3
        )
    norms = [name for name, part in model.named_modules() if isinstance(part, _BatchNorm) and _saw_nothing(part)]
    if norms:
        warnings.warn(
            f"The network looks untrained: {len(norms)} batch norms, {norms[0]} the first, have seen no image.",
            stacklevel=3,
        )


def _saw_nothing(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not mean.any() and bool((variance == 1).all())
