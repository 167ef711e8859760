"""Export to ONNX and ExecuTorch: files that exit early in runtimes without PyTorch."""

from .to_executorch import export_executorch
from .to_onnx import Export, export_onnx

__all__ = ["Export", "export_executorch", "export_onnx"]
