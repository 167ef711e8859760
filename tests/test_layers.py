"""Each file of the package imports only from its own room or the ones below it."""

import ast
from pathlib import Path

import pytest

import timm_dfs

PACKAGE = Path(timm_dfs.__file__).parent

ROOMS = (  # lowest first
    "version",
    "base",
    "inference",
    "wrapped",
    "training",
    "data",
    "calibration",
    "evaluation",
    "pretrained",
    "models",
    "hub",
    "export",
    "report",
    "demo",
    "space",
    "cli",
    "__main__",
)

FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def module_of(file):
    """Dotted name inside the package: ``models.dfs_vgg``, ``models`` for a folder's own file."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def height_of(module):
    """Place of a module's room in the order; a room outside it fails."""
    room = module.partition(".")[0]
    assert room in ROOMS, f"{module} is in no room that the order knows; add it."
    return ROOMS.index(room)


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
def test_a_file_imports_only_from_its_own_room_or_lower_ones(file):
    own = height_of(module_of(file))
    for module in imports_of(file):
        assert module != "", f"{file.name} imports from the package's __init__, which is above every room."
        assert height_of(module) <= own, f"{file.name} imports {module}, whose room is higher."


def test_the_imports_of_a_known_file_are_seen():
    seen = imports_of(PACKAGE / "models" / "dfs_vgg.py")
    assert {"data.cifar100", "base.heads", "base.model", "models._builder"} <= seen


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from ..models import MSDNet", "models"),
        ("from .. import inference", "inference"),
        ("import timm_dfs.cli", "cli"),
        ("from timm_dfs import predict", ""),
        ("def later():\n    from timm_dfs.evaluation.accuracy import collect_logits", "evaluation.accuracy"),
    ],
)
def test_every_way_to_import_upwards_is_seen(line, module, tmp_path, monkeypatch):
    if module == "cli":
        monkeypatch.setattr(f"{__name__}.resolve", lambda path: path)  # whether or not the file exists yet
    probe = PACKAGE / "base" / "probe.py"  # never written: only its place counts
    monkeypatch.setattr(Path, "read_text", lambda self, *args, **kwargs: line)
    assert imports_of(probe) == {module}
