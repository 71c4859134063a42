"""The recipes of a page, each run as it stands. They run in an environment of their own: see `frameworks.txt`."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

_URL_IN_PAGE = "http://127.0.0.1:8000/v1"


def run_recipe(code: str, url: str) -> str:
    """Return what the recipe prints. The server's address takes the place of the one in the page."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        recipe = compile(code.replace(_URL_IN_PAGE, url), "recipe", "exec", dont_inherit=True)
        exec(recipe, {"__name__": "recipe"})
    return printed.getvalue()


def recipes_of(page: str) -> dict[str, str]:
    """Return the first Python block of each section of a page, by the section's heading."""
    found = {}
    for section in page.split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        found[heading] = text.partition("```python\n")[2].partition("```")[0]
    return found


if __name__ == "__main__":
    url, page, *clients = sys.argv[1:]
    recipes = recipes_of(Path(page).read_text(encoding="utf-8"))
    json.dump({client: run_recipe(recipes[client], url) for client in clients}, sys.stdout)
