"""mkdocs hook: docstrings' Sphinx roles become code, linked where the page documents the name."""

import re

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|obj):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_) -> str:
    def replace(match: re.Match) -> str:
        name = match[1]
        code = f"<code>{name.rpartition('.')[2]}</code>"
        return f'<a href="#{name}">{code}</a>' if f'id="{name}"' in html else code

    return ROLE.sub(replace, html)
