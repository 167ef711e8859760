"""Figures of a report, drawn with matplotlib, each with a description in words."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.bench import LAST_EXIT, Timing
from .findings import Findings
from .published import Published
from .theme import EARLY, exit_colours, light, themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8
"""Width in inches: narrow enough for readable text on a phone, where a figure is as wide as the screen."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "timm-dfs",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "text.color": light("ink"),
    "axes.labelcolor": light("ink"),
    "axes.edgecolor": light("muted"),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": light("grid"),
    "grid.linewidth": 0.8,
    "xtick.color": light("muted"),
    "ytick.color": light("muted"),
    "xtick.labelcolor": light("ink"),
    "ytick.labelcolor": light("ink"),
    "legend.frameon": False,
    "figure.facecolor": light("surface"),
}

_MARKERS = "D^vsPX*<>hpd8"
"""Markers of operating points, repeated if there are more points."""


@dataclass(frozen=True)
class Drawing:
    """A drawn figure.

    Attributes:
        name: Name of its files, without suffix.
        alt: Description of its contents for readers who do not see it.
        svg: Content of the SVG file.
        png: Content of the PNG file.
    """

    name: str
    alt: str
    svg: str
    png: bytes

    def inline(self) -> str:
        """SVG for embedding in a page: full width, in the page's colours, with ids that are unique in the page."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r"url\(#", f"url(#{self.name}-", svg)
        svg = re.sub(r'href="#', f'href="#{self.name}-', svg)
        return themed(svg)

    def write(self, folder: Path) -> list[Path]:
        """Write ``name.svg`` and ``name.png``."""
        files = [folder / f"{self.name}.svg", folder / f"{self.name}.png"]
        files[0].write_text(self.svg, encoding="utf-8")
        files[1].write_bytes(self.png)
        return files


def require_plots() -> None:
    """Raise ``ModuleNotFoundError`` with the remedy if figures cannot be drawn."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"A report needs {error.name} from the plots extra: pip install 'timm-dfs[plots]'."
        ) from error


def draw(findings: Findings, timings: Sequence[Timing] = ()) -> dict[str, Drawing]:
    """All figures that the findings have data for, by name.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require_plots()
    wanted: list[tuple[str, Callable[[Any, Any], str], Any, float]] = [
        ("accuracy-cost", _accuracy_cost, findings, 4.2),
        ("reliability", _reliability, findings, 0.6 + 1.45 * -(-len(findings.exits) // 3)),
        ("risk-coverage", _risk_coverage, findings, 4.2),
    ]
    if findings.published:
        wanted.append(("published", partial(_published, published=findings.published), findings, 4.4))
    if findings.points:
        wanted.append(("exit-shares", _exit_shares, findings, 1.3 + 0.36 * len(findings.points)))
    if timings:
        wanted.append(
            ("latency", _latency, timings, 0.5 + 0.24 * (len(timings) + len({t.batch_size for t in timings})))
        )
    return {name: _drawing(name, paint, of, height) for name, paint, of, height in wanted}


def _drawing(name: str, paint: Callable[[Any, Any], str], of: Any, height: float) -> Drawing:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        alt = paint(figure, of)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.savefig(png, format="png", dpi=200)
    return Drawing(name, alt, svg.getvalue(), png.getvalue())


def _accuracy_cost(figure: Figure, findings: Findings) -> str:
    axes = figure.add_subplot()
    if findings.curve:
        axes.plot(
            [point.average_flops / 1e6 for point in findings.curve],
            [point.accuracy for point in findings.curve],
            color=EARLY,
            linewidth=2,
            label="early exit, geometric fractions",
        )
    if findings.rivals:
        axes.plot(
            [rival.flops_M for rival in findings.rivals],
            [rival.top1 for rival in findings.rivals],
            linestyle="none",
            marker="x",
            markersize=6,
            color=light("muted"),
            label="networks without exits, published",
        )
    _static_exits(axes, [alone.flops for alone in findings.exits], findings)
    _operating_points(axes, {name: point.measured.average_flops for name, point in findings.points.items()}, findings)
    _cost_and_accuracy_axes(figure, axes)
    first, last = findings.exits[0], findings.exits[-1]
    points = "; ".join(
        f"{name} {point.measured.accuracy:.2f} % at {point.measured.average_flops / 1e6:,.1f} M"
        for name, point in findings.points.items()
    )
    curve = "a curve of early exit at geometric exit fractions, " if findings.curve else ""
    return (
        f"Accuracy against mean cost: {curve}and each exit alone, from {first.accuracy:.2f} % at "
        f"{first.flops / 1e6:,.1f} M multiply-adds (exit 0) to {last.accuracy:.2f} % at {last.flops / 1e6:,.1f} M "
        f"(exit {len(findings.exits) - 1}). Operating points: {points or 'none'}."
        + (f" Crosses: {len(findings.rivals)} published networks without exits." if findings.rivals else "")
    )


def _published(figure: Figure, findings: Findings, published: Published) -> str:
    axes = figure.add_subplot()
    styles = itertools.cycle(("-", "--", "-.", ":"))
    for k, (method, curve) in enumerate(published.budgeted_batch_M.items()):
        colour = light("ink") if k == 0 else light("muted")
        axes.plot(*zip(*curve), color=colour, linestyle=next(styles), linewidth=1.6, label=f"{method}, published")
    for (method, accuracies), marker in zip(published.exits.items(), itertools.cycle("os^v")):
        axes.plot(
            published.flops_M,
            accuracies,
            linestyle="none",
            marker=marker,
            markersize=5,
            markerfacecolor=light("surface"),
            markeredgecolor=light("ink"),
            label=f"{method}'s exits, published",
        )
    if findings.published_curve:
        axes.plot(
            [point.average_flops / 1e6 for point in findings.published_curve],
            [point.accuracy for point in findings.published_curve],
            color=EARLY,
            linewidth=2,
            label="these weights, early exit",
        )
    _static_exits(axes, findings.published_flops, findings, "these weights, each exit")
    if findings.points:
        axes.plot(
            [point.published_flops / 1e6 for point in findings.points.values()],
            [point.measured.accuracy for point in findings.points.values()],
            linestyle="none",
            marker="D",
            markersize=5.5,
            markerfacecolor=light("ink"),
            markeredgecolor=light("surface"),
            zorder=4,
            label="these weights, operating points",
        )
    _cost_and_accuracy_axes(figure, axes)
    best = {method: max(top1 for _, top1 in curve) for method, curve in published.budgeted_batch_M.items()}
    return (
        f"Accuracy against mean cost beside published results of {published.title}, with costs in the published "
        f"convention. Best accuracy of the published curves: "
        f"{', '.join(f'{method} {top1:.2f} %' for method, top1 in best.items())}; best exit of these weights: "
        f"{max(alone.accuracy for alone in findings.exits):.2f} %."
    )


def _static_exits(axes: Axes, flops: Sequence[float], findings: Findings, label: str = "each exit alone") -> None:
    colours = exit_colours(len(findings.exits))
    costs, accuracies = [cost / 1e6 for cost in flops], [alone.accuracy for alone in findings.exits]
    axes.plot(costs, accuracies, color=colours[len(colours) // 2], linewidth=1, alpha=0.5, marker="o", label=label)
    for k, (cost, accuracy) in enumerate(zip(costs, accuracies)):
        height = 3 + k / len(costs)  # an exit covers the one before it, its number included
        axes.scatter(cost, accuracy, s=130, color=colours[k], zorder=height)
        axes.annotate(
            str(k),
            (cost, accuracy),
            ha="center",
            va="center_baseline",
            color="white",
            fontsize=8,
            weight="bold",
            zorder=height,
        )


def _operating_points(axes: Axes, costs: dict[str, float], findings: Findings) -> None:
    for (name, cost), marker in zip(costs.items(), itertools.cycle(_MARKERS)):
        axes.plot(
            cost / 1e6,
            findings.points[name].measured.accuracy,
            linestyle="none",
            marker=marker,
            markersize=9,
            markerfacecolor=light("ink"),
            markeredgecolor=light("surface"),
            zorder=4,
            label=name,
        )


def _cost_and_accuracy_axes(figure: Figure, axes: Axes) -> None:
    axes.set_xlabel("mean multiply-adds per image, millions")
    axes.set_ylabel("top-1, %")
    axes.margins(0.06, 0.1)
    figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handletextpad=0.5)


def _exit_shares(figure: Figure, findings: Findings) -> str:
    axes = figure.add_subplot()
    colours = exit_colours(len(findings.exits))
    names = list(findings.points)
    before = [0.0] * len(names)
    for k, colour in enumerate(colours):
        shares = [100 * findings.points[name].measured.exit_shares[k] for name in names]
        axes.barh(names, shares, left=before, color=colour, height=0.72, label=f"exit {k}")
        for row, (share, start) in enumerate(zip(shares, before)):
            if share >= _ROOM:
                axes.text(
                    start + share / 2, row, f"{share:.0f}", ha="center", va="center_baseline", color="white", fontsize=9
                )
        before = [start + share for start, share in zip(before, shares)]
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of the images, %")
    _exit_legend(figure, len(colours))
    rows = (
        f"{name}: " + ", ".join(f"exit {k} {share:.1%}" for k, share in enumerate(point.measured.exit_shares))
        for name, point in findings.points.items()
    )
    return f"Share of the images that take each exit, by operating point. {'; '.join(rows)}."


_ROOM = 7
"""Narrowest part of a bar that gets a number, in percent."""


def _exit_legend(figure: Figure, num_exits: int) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, num_exits),
        columnspacing=1.2,
        handlelength=1.2,
        handletextpad=0.5,
    )


_FEW = 20
"""Number of samples in a bin below which its accuracy is too uncertain to show in full colour."""


def _reliability(figure: Figure, findings: Findings) -> str:
    share, accuracy, _ = findings.reliability
    num_exits, bins = share.shape
    rows = -(-num_exits // 3)
    grid = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[num_exits:]:
        axes.set_axis_off()
    starts = [b / bins for b in range(bins)]
    for k, colour in enumerate(exit_colours(num_exits)):
        axes = grid.flat[k]
        many = (share[k] * findings.samples >= _FEW).tolist()
        axes.bar(
            starts,
            accuracy[k].nan_to_num(0.0).tolist(),
            width=0.9 / bins,
            align="edge",
            color=[(colour, 1.0 if enough else 0.35) for enough in many],
        )
        axes.plot([0, 1], [0, 1], color=light("muted"), linestyle="--", linewidth=1)
        axes.set_title(f"exit {k} · ECE {findings.exits[k].calibration_error:.3f}", fontsize=9)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.tick_params(labelbottom=k + 3 >= num_exits)
    figure.supxlabel("confidence", fontsize=10)
    figure.supylabel("share of correct predictions", fontsize=10)
    errors = ", ".join(f"exit {k} {alone.calibration_error:.3f}" for k, alone in enumerate(findings.exits))
    return (
        f"Reliability diagrams, one per exit: share of correct predictions by confidence. Calibration error: {errors}."
    )


def _risk_coverage(figure: Figure, findings: Findings) -> str:
    axes = figure.add_subplot()
    told = []
    for k, ((coverage, risk), colour) in enumerate(zip(findings.risk_coverage, exit_colours(len(findings.exits)))):
        step = max(1, len(coverage) // 250)
        seen = coverage >= 0.01  # below, a point stands for too few samples
        shown = [(100 * values[seen].flip(0)[::step].flip(0)).tolist() for values in (coverage, risk)]
        axes.plot(*shown, color=colour, linewidth=1.6, label=f"exit {k}")
        half = int((coverage - 0.5).abs().argmin())
        told.append(f"exit {k} {risk[half]:.1%} and {risk[-1]:.1%}")
    axes.set_xlabel("images predicted, highest confidence first, %")
    axes.set_ylabel("wrong predictions among them, %")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    _exit_legend(figure, len(findings.exits))
    return f"Risk against coverage, one curve per exit. Errors at half of the images and at all: {', '.join(told)}."


def _latency(figure: Figure, timings: Sequence[Timing]) -> str:
    sizes = sorted({timing.batch_size for timing in timings})
    panels = figure.subplots(len(sizes), 1, squeeze=False)[:, 0]
    ways = list(dict.fromkeys(timing.way for timing in timings))
    cut_off = [way for way in ways if way.startswith("exit ") and way.endswith(" alone")]
    colour_of = dict(zip(cut_off, exit_colours(len(cut_off) + 1)), **{LAST_EXIT: light("muted")})
    for axes, size in zip(panels, sizes):
        rows = [timing for timing in timings if timing.batch_size == size]
        axes.barh(ways, [t.p50 for t in rows], color=[colour_of.get(way, EARLY) for way in ways], height=0.72)
        ends = [t.p50 if t.p95 is None else t.p95 for t in rows]
        axes.hlines(range(len(rows)), [t.p50 for t in rows], ends, color=light("muted"), linewidth=1.2)
        for row, t in enumerate(rows):
            axes.annotate(
                f"{t.p50:,.1f}" if t.p95 is None else f"{t.p50:,.1f} (p95 {t.p95:,.1f})",
                (ends[row], row),
                (4, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=8,
            )
        axes.set_xlim(0, 1.6 * max(ends))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.set_title(f"batch of {size}: milliseconds", loc="left")
    told = (
        f"{t.way} at batch {t.batch_size} {t.p50:,.1f}" + ("" if t.p95 is None else f" (95 % below {t.p95:,.1f})")
        for t in timings
    )
    return f"Median latency of a batch in milliseconds: {'; '.join(told)}."
