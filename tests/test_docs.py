"""The documentation names what exists, its examples run, and its tables agree with the code."""

import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from test_layers import PACKAGE, ROOMS
from typer.testing import CliRunner

import timm_dfs
from timm_dfs_cli import COMMANDS, app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.parametrize("page", ["index", "backbones"])
def test_the_python_blocks_of_a_page_run(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    names = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), page, "exec"), names)
    assert page != "index" or len(names["curve"]) == 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_options_that_a_page_shows_exist(page):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.S))
    for line in re.findall(r"^timm-dfs (.*)$", blocks.replace("\\\n", " "), re.M):
        command, *arguments = shlex.split(line, comments=True)
        shown = CliRunner().invoke(app, [command, "--help"], env=dict(COLUMNS="200")).stdout
        options = [argument for argument in arguments if argument.startswith("--") and command != "timm"]
        assert command in COMMANDS and [option for option in options if f"{option} " not in shown] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`((?:timm_dfs|tests|benchmarks|recipes|hub|docs|\.ci)/[\w./-]+)`", page.read_text())
    absent = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert absent == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)  # code may look like a link
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_api_reference_has_every_public_name_once():
    listed = re.findall(r"^::: timm_dfs\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(listed) == sorted(timm_dfs.__all__)


def test_the_architecture_page_lists_the_rooms_in_their_order():
    rows = re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+) \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    listed = [re.sub(r"/|\.py", "", name) for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    existing = [room for room in listed if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()]
    assert existing == [room for room in ROOMS if room != "version"]


def test_code_that_the_architecture_page_names_exists():
    files = [
        file for folder in (PACKAGE, *map(ROOT.joinpath, ("tests", "benchmarks"))) for file in folder.rglob("*.py")
    ]
    sources = [file.read_text() for file in files if file != Path(__file__)]
    words = set(re.findall(r"\w+", " ".join([*sources, *map(str, files), *map(str, ROOT.iterdir())])))
    named = re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "architecture.md").read_text())
    assert [code for code in named if not set(re.findall(r"[^\W\d]\w*", code)) <= words] == []


def test_the_supported_versions_are_those_of_pyproject_and_ci():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = dict(re.findall(r"^\| (Python|torch|timm) \| (.+?) \|$", (ROOT / "README.md").read_text(), re.M))
    bounds = dict(re.fullmatch(r"([\w-]+)(?:\[.*\])?(?:>=([\d.]+)\S*)?", d).groups() for d in project["dependencies"])
    assert table["torch"] == f"{bounds['torch']} and newer"
    assert table["timm"] == f"{bounds['timm']} and newer"

    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith("Programming Language :: Python :: ")]
    assert tested == named
    assert project["requires-python"] == f">={tested[0]}"
    assert table["Python"] == f"{tested[0]} to {tested[-1]}"

    lowest = subprocess.run([ROOT / ".ci" / "constraints", "lowest"], capture_output=True, text=True, check=True)
    assert set(lowest.stdout.split()) == {f"torch=={bounds['torch']}", f"timm=={bounds['timm']}"}


def test_the_site_links_names_that_its_page_documents():
    hooks = runpy.run_path(str(ROOT / ".ci" / "mkdocs_hooks.py"))
    page = '<h3 id="a.b">b</h3> :func:<code>~a.b</code> :class:<code>a.c</code>'
    expected = '<h3 id="a.b">b</h3> <a href="#a.b"><code>b</code></a> <code>c</code>'
    assert hooks["on_page_content"](page) == expected


def test_the_site_shows_examples_as_code():
    griffe = pytest.importorskip("griffe", reason="the site needs the docs extra")
    code = 'def f():\n    """One.\n\n    Example:\n        >>> f()\n    """\n'
    extensions = griffe.load_extensions(str(ROOT / ".ci" / "griffe_doctests.py"))
    with griffe.temporary_pypackage("probe", {"__init__.py": code}) as package:
        probe = griffe.load("probe", search_paths=[package.tmpdir], extensions=extensions)
    sections = probe["f"].docstring.parse("google")
    assert [section.kind.value for section in sections] == ["text", "examples"]


def test_the_notebook_has_no_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs():
    nbformat = pytest.importorskip("nbformat", reason="running a notebook needs the docs extra")
    nbclient = pytest.importorskip("nbclient", reason="running a notebook needs the docs extra")
    pytest.importorskip("skimage", reason="the photographs come from scikit-image")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "rocket" in printed
