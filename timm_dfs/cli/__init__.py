"""The command line, ``timm-dfs``. Each file's commands register themselves."""

from . import bench, calibrate, data, export, hub, images, models, report, scripts, space  # noqa: F401
from .base import app


def main() -> None:
    """Entry point of ``timm-dfs``."""
    app()
