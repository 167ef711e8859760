"""Exported files of benchmarks, kept from one run to the next as long as network, policy and exporter are the same."""

import hashlib
from pathlib import Path

import torch

import timm_dfs.export
from timm_dfs.export import export_onnx
from timm_dfs.export.to_onnx import MODEL_FILE
from timm_dfs.hub.folder import full_name


def export_once(root, model, policy, does=None, calibration=None):
    """File of a network with a policy, or of its last exit alone, exported unless it is there.

    Args:
        root: Folder of all files.
        model: The network, which the file is known by: its weights and image size, not only its name.
        policy: The policy inside; ``None`` for the last exit alone.
        does: What of the policy the file must agree with; by default everything.
        calibration: Images and classes for int8, which the file is known by, too.
    """
    exporter = sorted(Path(timm_dfs.export.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(repr((model.pretrained_cfg["input_size"], policy if does is None else does)).encode())
    for file in exporter:
        digest.update(file.read_bytes())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(value))
    for part in calibration or ():
        digest.update(_bytes(part))
    layout = "last" if policy is None else "graph"
    folder = root / f"{full_name(model)}-{layout}{'-int8' if calibration else ''}-{digest.hexdigest()[:12]}"
    if not folder.exists():
        print(folder.name, export_onnx(model, folder, policy, layout, calibration=calibration), flush=True)
    return folder / MODEL_FILE


def _bytes(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
