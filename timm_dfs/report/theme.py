"""Colours: fixed ones for a light page in files, variables of the style sheet in the page."""

import re

NEUTRAL = {  # name: on a light page, on a dark one
    "ink": ("#1d2126", "#e6e9ed"),
    "muted": ("#68707b", "#98a1ad"),
    "grid": ("#dde2e8", "#343b45"),
    "surface": ("#fdfdfe", "#1a1e24"),
    "page": ("#f2f4f7", "#111418"),
}
"""Colours that differ between light and dark pages. All others are of medium lightness, visible on both."""

EARLY = "#e0701a"
"""Colour of early exit."""

_RAMP = ("#2a9d8f", "#3a82c4", "#7b5bd6", "#c2479a")


def light(name: str) -> str:
    return NEUTRAL[name][0]


def exit_colours(num_exits: int) -> list[str]:
    """One colour per exit, shallow to deep, distinguishable from its neighbours."""
    steps = [k * (len(_RAMP) - 1) / max(1, num_exits - 1) for k in range(num_exits)]
    return [_between(step) for step in steps]


def _between(step: float) -> str:
    below = min(int(step), len(_RAMP) - 2)
    first, second = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in _RAMP[below : below + 2])
    return "#" + "".join(f"{round(a + (step - below) * (b - a)):02x}" for a, b in zip(first, second))


def themed(svg: str) -> str:
    """SVG with its neutral colours replaced by variables of the page's style sheet."""
    for name, (colour, _) in NEUTRAL.items():
        svg = re.sub(colour, f"var(--{name})", svg, flags=re.IGNORECASE)
    return svg
