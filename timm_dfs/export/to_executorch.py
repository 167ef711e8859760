"""Exporting a network with exits to ExecuTorch."""

import json
import shutil
from pathlib import Path

import torch

from ..base.evaluating import as_images
from ..base.model import MultiExitModel
from ..base.new_folder import new_folder
from ..inference.policy import ExitPolicy
from ..inference.prediction import predict
from .metadata import describe
from .network import plain, require
from .program import StageProgram, cut_program
from .stages import rules
from .to_onnx import (
    ROUTER_FILE,
    VERIFIED,
    Export,
    check_arguments,
    noise,
    policy_of,
    runner,
    warn_of_untrained,
)
from .verify import verify

EXTRA = "executorch"


def export_executorch(
    model: MultiExitModel,
    folder: str | Path,
    policy: ExitPolicy | str | None = None,
    *,
    images: torch.Tensor | None = None,
) -> Export:
    """Write a network with exits as ExecuTorch programs that predict as :func:`timm_dfs.predict` does, and verify them.

    There is one ``.pte`` file for each exit, lowered to XNNPACK, a ``router.json`` that says how they follow on each
    other, and a ``router.py`` that does it in Python. The files take one image at a time. Exits that the policy never
    uses are left out.

    Args:
        model: A network with exits. The files hold its weights in float32.
        folder: Where to write; it must not exist, or be empty. Either all files appear in it or none.
        policy: A policy or the name of one of the model's presets.
        images: Images (N, C, H, W) to verify with, normalised; by default noise. Their height and width become those
            of the files' input.

    Returns:
        Files and checks.

    Raises:
        ValueError: If an argument is outside what is said above, the network cannot be expressed, or the verification
            fails.
        ModuleNotFoundError: Without the extra ``executorch``.
        OSError: If the files cannot be written.

    Example:
        Skipped by the tests, which run without the extra:

        >>> import tempfile, timm, timm_dfs
        >>> model = timm.create_model("dfs_vgg7_cifar100", depths=(1, 1), widths=(4, 4), num_classes=3)
        >>> policy = timm_dfs.ExitPolicy([0.5, 0.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(timm_dfs.export_executorch(model, f"{folder}/vgg", policy).files)  # doctest: +SKIP
        ['router.json', 'router.py', 'stage_0.pte', 'stage_1.pte']
    """
    folder = Path(folder)
    check_arguments(model, folder, "stages", 1, False)
    preset = policy if isinstance(policy, str) else None
    policy = policy_of(model, policy, "stages")
    require("executorch.exir", EXTRA)
    exported = plain(model)
    images = as_images(exported, noise(model, max(VERIFIED, len(policy.answering))) if images is None else images)
    if not len(images):
        raise ValueError("There are 0 images to verify with; give at least one.")
    warn_of_untrained(model, policy)
    with torch.inference_mode():
        logits = torch.stack(exported.forward_exits(images))
    stages = cut_program(exported, images[:1], policy.answering)
    names = [f"stage_{place}.pte" for place in range(len(stages))]
    channels, height, width = images.shape[1:]
    facts = describe(exported, (channels, height, width), "stages", policy, preset, [EXTRA])
    about = dict(stages=_order(stages, names), batch_size=1, precision="float32", **rules(policy))
    with new_folder(folder) as partial:
        for name, program in zip(names, _lowered(stages, images[:1])):
            (partial / name).write_bytes(program)
        (partial / ROUTER_FILE).write_text(json.dumps({**about, **facts}, indent=1, allow_nan=False) + "\n")
        shutil.copy(Path(__file__).with_name("router.py"), partial)
        try:
            run = runner(partial, "stages", model.num_exits)
            checks = verify(lambda each: predict(exported, images, each), logits, policy, images, run, 1, False)
        except RuntimeError as error:
            raise ValueError(f"ExecuTorch cannot run the stages: {error}. Nothing was written.") from error
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    weights = sum(tensor.numel() * 4 for tensor in exported.parameters())
    return Export(folder, "stages", files, weights, policy.answering, (True,) * (len(stages) - 1), checks)


def _order(stages: list[StageProgram], names: list[str]) -> list[dict]:
    return [
        dict(
            file=name,
            exit_index=stage.exit_index,
            inputs=stage.inputs,
            logits="logits",
            outputs=stage.outputs,
            keeps=stage.keeps,
            shrinks=bool(stage.keeps),
        )
        for stage, name in zip(stages, names, strict=True)
    ]


def _lowered(stages: list[StageProgram], images: torch.Tensor) -> list[bytes]:
    """Each stage as ExecuTorch's bytes.

    Raises:
        ValueError: If ExecuTorch cannot express one.
    """
    exir = require("executorch.exir", EXTRA)
    xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", EXTRA)
    values = {"images": images}
    programs = []
    for stage in stages:
        inputs = tuple(values[name] for name in stage.inputs)
        try:
            with torch.no_grad():
                program = torch.export.export(stage.module, inputs, strict=False)
                states = (state.contiguous() for state in stage.module(*inputs)[1:])  # as ExecuTorch puts them out
                values.update(zip(stage.outputs, states))
            edge = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
            programs.append(bytes(edge.to_executorch().buffer))
        except Exception as error:  # ExecuTorch raises many kinds
            reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"The stage of exit {stage.exit_index} cannot be lowered to ExecuTorch: {reason[0][:300]}"
            ) from error
    return programs
