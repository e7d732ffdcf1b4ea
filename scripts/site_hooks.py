"""What mkdocs.yml adds to MkDocs."""

from __future__ import annotations

import re

# A role of Sphinx in a docstring, such as :class:`Stage`, once its backticks have become code.
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")


def on_page_content(html: str, **_: object) -> str:
    """A page without the names of roles, which mean nothing in Markdown."""
    return _ROLE.sub("", html)
