"""The recipes of a page, each run as it stands. They run in an environment of their own: see `frameworks.txt`."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path

_BLOCK = re.compile(
    r"^## (?P<client>[^\n]+)\n(?:(?!^## |^```).*\n)*^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_URL_IN_PAGE = "http://127.0.0.1:8000/v1"


def run_recipe(code: str, url: str) -> str:
    """Return what the recipe prints. The server's address takes the place of the one in the page."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace(_URL_IN_PAGE, url), "recipe", "exec"), {"__name__": "recipe"})
    return printed.getvalue()


if __name__ == "__main__":
    url, page, *clients = sys.argv[1:]
    recipes = {match["client"]: match["code"] for match in _BLOCK.finditer(Path(page).read_text(encoding="utf-8"))}
    json.dump({client: run_recipe(recipes[client], url) for client in clients}, sys.stdout)
