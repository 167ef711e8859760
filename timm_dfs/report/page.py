"""The report as one self-contained page, and its figures as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..base.new_folder import is_new, new_folder
from ..evaluation.bench import LAST_EXIT, Timing
from .about import About
from .drawbacks import where_it_loses
from .figures import Drawing, draw
from .findings import Findings
from .pictures import ExitPictures
from .theme import EARLY, NEUTRAL, exit_colours

PAGE = "index.html"


def write_report(
    folder: Path,
    findings: Findings,
    about: About,
    timings: Sequence[Timing] = (),
    chosen: str | None = None,
    strip: Sequence[ExitPictures] = (),
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write ``index.html`` and every figure as SVG and PNG into a new folder, all of them or none.

    Args:
        folder: Folder that does not exist yet or is empty.
        findings: Measured accuracies and costs.
        about: Model, data, machine and training.
        timings: Times of the network, if measured.
        chosen: Name of the operating point in the head of the page and the strip of images.
        strip: Images by the exit that they took.
        notes: Further sentences for the reader.

    Returns:
        Paths of the files, the page first.

    Raises:
        ValueError: If the folder holds files, or its parent does not exist.
        ModuleNotFoundError: If matplotlib or jinja2 is not installed.
    """
    check_new(folder)
    drawings = draw(findings, timings)
    page = render(drawings, findings, about, timings, chosen, strip, notes)
    with new_folder(folder) as new:
        (new / PAGE).write_text(page, encoding="utf-8")
        files = [new / PAGE, *(file for drawing in drawings.values() for file in drawing.write(new))]
    return [folder / file.name for file in files]


def check_new(folder: Path) -> None:
    """Raise ``ValueError`` unless a report can be written to ``folder`` without replacing anything."""
    if not folder.resolve().parent.is_dir():
        raise ValueError(f"--output is {folder}; there is no folder {folder.parent}.")
    if not is_new(folder):
        raise ValueError(f"--output is {folder}, which is there already; give a folder that does not exist.")


def render(
    drawings: Mapping[str, Drawing],
    findings: Findings,
    about: About,
    timings: Sequence[Timing] = (),
    chosen: str | None = None,
    strip: Sequence[ExitPictures] = (),
    notes: Sequence[str] = (),
) -> str:
    """HTML of the page; arguments as for :func:`write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("timm_dfs.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["millions"] = lambda count: f"{count / 1e6:,.1f}"
    environment.filters["words"] = lambda label: label.replace("_", " ")  # allows a line break
    environment.filters["svg"] = lambda drawing: Markup(drawing.inline())
    return environment.get_template("page.html").render(
        about=about,
        findings=findings,
        drawings=drawings,
        timings=timings,
        chosen=None if chosen is None else findings.points[chosen],
        chosen_name=chosen,
        fastest=max(
            (timing for timing in timings if timing.way == chosen), key=lambda timing: timing.batch_size, default=None
        ),
        strip=strip,
        notes=notes,
        losses=where_it_loses(findings, timings),
        colours=exit_colours(len(findings.exits)),
        early=EARLY,
        themes=[{name: pair[i] for name, pair in NEUTRAL.items()} for i in (0, 1)],
        last_exit_alone=LAST_EXIT,
    )
