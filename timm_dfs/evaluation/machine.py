"""The machine that figures are measured on."""

import platform
from importlib.metadata import version
from pathlib import Path

import timm
import torch


def processor() -> str:
    """This machine's processor, by name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def threads() -> str:
    """Number of threads that torch computes with, e.g. ``"2 threads"``."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


def describe_machine(*packages: str) -> str:
    """Processor, threads and versions, to print beside measurements: torch's, timm's and those of further packages."""
    versions = dict(torch=torch.__version__, timm=timm.__version__, **{name: version(name) for name in packages})
    return ", ".join([processor(), threads(), *(f"{name} {number}" for name, number in versions.items())])
