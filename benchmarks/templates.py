"""Jinja templates in this folder, as all generated pages and pictures read them."""

from pathlib import Path

import jinja2


def template(name: str, **filters) -> jinja2.Template:
    """A template by its file's name: undefined names are errors; only SVG, by its suffix, is escaped.

    Args:
        name: ``NAME.jinja`` in this folder.
        **filters: Filters beside Jinja's and ``millions``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=name.endswith(".svg.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(millions=lambda count: f"{count / 1e6:.1f}", **filters)
    return environment.get_template(name)
