"""The clients that are tested against a running server, from the tests themselves."""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

from docs.generate.markdown import table

ROOT = Path(__file__).parents[2]


def clients() -> str:
    """Return one row for each file in `tests/clients`: its docstring names the client, those of its tests what works.

    Raises: ValueError for a test without a docstring.
    """
    rows = [_row(path) for path in sorted((ROOT / "tests" / "clients").glob("test_*.py"))]
    return table(("client", "tested"), rows) + f"\nVersions: {_versions()}.\n"


def _row(path: Path) -> tuple[str, str]:
    module = ast.parse(path.read_text(encoding="utf-8"))
    return _docstring(module, path), "; ".join(dict.fromkeys(_claims(module, path)))


def _claims(module: ast.Module, path: Path) -> Iterator[str]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test"):
            yield _docstring(node, path)


def _docstring(node: ast.Module | ast.FunctionDef | ast.ClassDef, path: Path) -> str:
    text = ast.get_docstring(node)
    if text is None:
        raise ValueError(f"{path.name}: {getattr(node, 'name', 'the module')} needs a docstring: the table shows it")
    return text.splitlines()[0]


def _versions() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["optional-dependencies"]
    chosen = [name for name in groups["test"] if name.startswith("openai")] + groups["clients"]
    folder = ROOT / "tests" / "clients"
    for name in ("frameworks.txt", "llama_index.txt"):
        chosen += (folder / name).read_text(encoding="utf-8").split()
    packages = json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]
    for_node = ", ".join(f"`{name}@{version}`" for name, version in packages.items())
    return f"{', '.join(f'`{name}`' for name in chosen)}; for Node {for_node}"
