"""Benchmarks write figures into the documentation between marks, and leave the rest of a page alone."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pages  # noqa: E402

PAGE = "# Page\n\n<!-- benchmarks/x.py A: begin -->\nold\n<!-- benchmarks/x.py A: end -->\n\nText.\n"


def test_figures_replace_those_between_their_marks_and_nothing_else(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(PAGE)
    for _ in range(2):
        pages.put(file, "x.py A", ["| a |", "|---|"])
        assert file.read_text() == PAGE.replace("old\n", "\n| a |\n|---|\n\n")


@pytest.mark.parametrize("page", ["# Page\n", PAGE.replace("end", "END"), PAGE.replace(" A: begin", " B: begin")])
def test_a_page_without_the_marks_is_refused_and_left_as_it_is(page, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(page)
    with pytest.raises(ValueError, match=r"page\.md lacks the lines '<!-- benchmarks/x\.py A: begin"):
        pages.put(file, "x.py A", ["new"])
    assert file.read_text() == page


@pytest.mark.parametrize("page", ["DEPLOYMENT", "SERVING"])
def test_the_marks_of_a_page_come_in_pairs_and_name_programs_that_write_them(page):
    marks = re.findall(r"<!-- benchmarks/(\w+\.py)(.*): (begin|end) -->", getattr(pages, page).read_text())
    assert marks
    for (program, of, first), (*same, last) in zip(marks[::2], marks[1::2], strict=True):
        assert (first, last) == ("begin", "end") and [program, of] == same
        assert f"put({page}" in (ROOT / "benchmarks" / program).read_text()
