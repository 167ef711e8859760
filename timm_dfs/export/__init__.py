"""Export to ONNX: files that exit early in runtimes without PyTorch."""

from .to_onnx import Export, export_onnx

__all__ = ["Export", "export_onnx"]
