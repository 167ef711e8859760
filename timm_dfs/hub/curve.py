"""Plots of accuracy against compute, of one model or two, as an SVG that is byte for byte the same on every machine.

They are drawn here and not by a plotting library because CI compares the files with newly drawn ones, and a library's
output changes with its version.
"""

import math
from collections.abc import Callable, Iterable
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 640, 400

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 34, 52

_STYLE = (
    "text{font:12px sans-serif;fill:#333}.title{font-size:14px;font-weight:bold}.grid{stroke:#ddd}"
    ".curve{fill:none;stroke:#1f77b4;stroke-width:2}.exit{fill:#d62728}.preset{fill:#2ca02c}"
    ".other{stroke:#ff7f0e;stroke-dasharray:6 3}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}}"
)

Point = tuple[float, float]
"""Millions of multiply-adds per image, and top-1 accuracy in percent."""


def draw(results: dict) -> str:
    """Draw the budgeted batch curve, each single exit and the presets, from a model's results, as an SVG.

    The horizontal axis is millions of multiply-adds per image (lazy), the vertical one top-1 accuracy in percent.
    """
    curve, exits, presets = _curve(results), _exits(results), _presets(results)
    legend = "line: early exit; dots: single exits; triangles: presets"
    place, lines = _axes(f"{results['model']}: top-1 accuracy, %", legend, [*curve, *exits, *presets.values()])
    if curve:
        lines.append(_polyline("curve", map(place, curve)))
    for k, point in enumerate(exits):
        x, y = place(point)
        lines += [f'<circle class="exit" cx="{x:.1f}" cy="{y:.1f}" r="4"/>', _text("", x + 7, y + 4, str(k))]
    for name, point in presets.items():
        x, y = place(point)
        lines.append(f'<path class="preset" d="M{x:.1f} {y - 7:.1f}l6 12h-12z"/>')
        lines.append(_text("", x, y + 20, name, "middle"))
    return "\n".join([*lines, "</svg>", ""])


def draw_two(title: str, results: dict, other: dict, names: tuple[str, str]) -> str:
    """Draw two models' budgeted batch curves and exits as an SVG, the second model's dashed and hollow."""
    curves, exits = [_curve(results), _curve(other)], [_exits(results), _exits(other)]
    legend = f"{names[0]}: solid line, full dots; {names[1]}: dashed line, hollow dots"
    place, lines = _axes(title, legend, [point for points in (*curves, *exits) for point in points])
    for kind, dot, curve, points in zip(("curve", "curve other"), ("exit", "curve other"), curves, exits):
        lines.append(_polyline(kind, map(place, curve)))
        for x, y in map(place, points):
            lines.append(f'<circle class="{dot}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    return "\n".join([*lines, "</svg>", ""])


def _curve(results: dict) -> list[Point]:
    return [(point["average_flops"] / 1e6, point["top1"]) for point in results["test"].get("budgeted_batch", ())]


def _exits(results: dict) -> list[Point]:
    return [(cost / 1e6, top1) for cost, top1 in zip(results["flops_lazy"], results["test"]["top1"], strict=True)]


def _presets(results: dict) -> dict[str, Point]:
    presets = results["test"].get("presets", {})
    return {name: (point["average_flops"] / 1e6, point["top1"]) for name, point in presets.items()}


def _axes(title: str, legend: str, points: list[Point]) -> tuple[Callable[[Point], Point], list[str]]:
    """A function from a point to its place in a drawing of all points, and the drawing's title, grid and legend."""
    x_ticks = _ticks(0.0, max(x for x, _ in points))
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points))

    def place(point: Point) -> Point:
        x = (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        y = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<style>{_STYLE}</style>",
        _text("title", _LEFT, 20, title),
    ]
    for tick in x_ticks:
        x, _ = place((tick, y_ticks[0]))
        lines += [_line(x, _TOP, x, _HEIGHT - _BOTTOM), _text("", x, _HEIGHT - _BOTTOM + 18, f"{tick:g}", "middle")]
    for tick in y_ticks:
        _, y = place((x_ticks[0], tick))
        lines += [_line(_LEFT, y, _WIDTH - _RIGHT, y), _text("", _LEFT - 8, y + 4, f"{tick:g}", "end")]
    lines.append(_text("", _LEFT, _HEIGHT - 12, "multiply-adds per image, M"))
    lines.append(_text("", _WIDTH - _RIGHT, _HEIGHT - 12, legend, "end"))
    return place, lines


def _polyline(kind: str, points: Iterable[Point]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to nine of them, that cover ``low`` … ``high``."""
    span = max(high - low, 1e-6)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 7)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(step * i, 10) for i in range(first, last + 1)]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text{of_kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
