"""Each file of the package imports only from its own layer or the ones below."""

import ast
from pathlib import Path

import pytest

import timm_dfs

PACKAGE = Path(timm_dfs.__file__).parent

LAYERS = (  # lowest first
    {"cifar100", "partition", "equilibrium", "objective", "policy", "budget", "factory", "taps", "remaining"}
    | {"temperature", "threshold_search", "operating_points", "risk", "downloads", "version", "machine"},
    {"heads", "multi_exit", "flops", "exit_points", "feature_heads", "encoders", "wrapped", "fusion"},
    {"sources", "weights", "models.*"},
    {"images", "inference", "evaluate", "losses", "aggregation", "task", "conflict", "checkpoints", "hub", "demo"}
    | {"presets", "bench", "curve", "card", "export", "publish", "space", "report.*"},
    {"cli.*"},
)

FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def module_of(file):
    """Dotted name inside the package: ``models.dfs_vgg``, ``models`` for a folder's own file."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module):
    """Height of a module; a module outside the table fails."""
    names = {module, module.partition(".")[0] + ".*"}
    heights = [height for height, layer in enumerate(LAYERS) if names & layer]
    assert len(heights) == 1, f"{module} has no place in the table of layers; give it one."
    return heights[0]


def resolve(path):
    """The module of the package that a dotted path, perhaps of a name inside a module, lives in."""
    parts = path.split(".")
    while parts:
        place = PACKAGE.joinpath(*parts)
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            return ".".join(parts)
        parts.pop()
    return ""  # the package itself


def imports_of(file):
    """Modules of this package that a file imports, anywhere in it."""
    folder = list(file.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["timm_dfs", *folder[: len(folder) + 1 - node.level], *filter(None, [node.module])]
            paths = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        found |= {
            resolve(path.removeprefix("timm_dfs").removeprefix("."))
            for path in paths
            if path == "timm_dfs" or path.startswith("timm_dfs.")
        }
    return found


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_file_imports_only_from_its_own_layer_or_lower_ones(file):
    own = layer_of(module_of(file))
    for module in imports_of(file):
        assert module != "", f"{file.name} imports from the package's __init__, which sits above every layer."
        assert layer_of(module) <= own, f"{file.name} imports {module}, which sits in a higher layer."


def test_the_imports_of_a_known_file_are_seen():
    seen = imports_of(PACKAGE / "models" / "dfs_vgg.py")
    assert {"cifar100", "heads", "multi_exit", "weights"} <= seen


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from .models import MSDNet", "models"),
        ("from . import inference", "inference"),
        ("import timm_dfs.cli", "cli"),
        ("from timm_dfs import predict", ""),
        ("def later():\n    from timm_dfs.evaluate import collect_logits", "evaluate"),
    ],
)
def test_every_way_to_import_upwards_is_seen(line, module, tmp_path, monkeypatch):
    if module == "cli":
        monkeypatch.setattr(f"{__name__}.resolve", lambda path: path)  # whether or not the file exists yet
    probe = PACKAGE / "partition_probe.py"  # never written: only its place counts
    monkeypatch.setattr(Path, "read_text", lambda self, *args, **kwargs: line)
    assert imports_of(probe) == {module}
