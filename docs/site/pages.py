"""Code on the pages as people read it, and nothing loaded from the network."""

from __future__ import annotations

import re
from typing import Any

_SHIM = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
_SESSION = re.compile(r"^```python\n(?=>>> )(.*?)\n*^```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Give blocks of doctests their own language, and take off directives and the last empty line."""

    def session(match: re.Match[str]) -> str:
        code = re.sub(r" *# doctest: .*", "", match.group(1))
        return f"```pycon\n{code}\n```"

    return _SESSION.sub(session, markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Load the script that lets the search run from a folder from the site, not from the network."""
    here = "../" * page.url.count("/")
    return output.replace(_SHIM, f'<script src="{here}site/worker.js"></script>')


def on_post_template(output_content: str, **_: Any) -> str:
    """Do without that script where a page has no place of its own: 404.html."""
    return output_content.replace(_SHIM, "")
