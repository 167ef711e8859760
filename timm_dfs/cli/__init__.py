"""Commands of ``timm-dfs``. Each file registers its own; ``timm_dfs_cli`` lists them and imports the one that runs."""

from timm_dfs_cli import app, main

__all__ = ["app", "main"]
