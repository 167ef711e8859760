"""Figures that benchmarks put into pages of the documentation, between marks."""

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"

DEPLOYMENT, SERVING = DOCS / "deployment.md", DOCS / "serving.md"


def put(page: Path, of: str, lines: list[str]) -> None:
    """Replace what a page has between two marks.

    Args:
        page: A Markdown file.
        of: The benchmark and what it measured, ``deploy.py NAME``. The marks are comments that contain it.
        lines: The figures, as Markdown.

    Raises:
        ValueError: If the page lacks the marks.
    """
    begin, end = (f"<!-- benchmarks/{of}: {word} -->\n" for word in ("begin", "end"))
    before, first, rest = page.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"{page.name} lacks the lines {begin!r} and {end!r}; put them where the figures belong.")
    page.write_text("\n".join([before + begin, *lines, "", end + after]))
