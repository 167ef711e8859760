"""A report of a network with exits: one HTML page to look at, and its figures as SVG and PNG."""

from .about import About, training_of
from .drawbacks import where_it_loses
from .figures import Drawing, draw, require_plots
from .findings import ExitAlone, Findings, Point, find
from .page import PAGE, check_new, render, write_report
from .pictures import ExitPictures, Picture, strip
from .published import Published, published_results

__all__ = [
    "PAGE",
    "About",
    "Drawing",
    "ExitAlone",
    "ExitPictures",
    "Findings",
    "Picture",
    "Point",
    "Published",
    "check_new",
    "draw",
    "find",
    "published_results",
    "render",
    "require_plots",
    "strip",
    "training_of",
    "where_it_loses",
    "write_report",
]
