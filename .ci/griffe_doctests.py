"""griffe extension: an ``Example:`` section of a docstring is read as code, like griffe's own ``Examples:``."""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Rename the sections before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
