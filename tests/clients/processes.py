"""Run the cases of a client that cannot run in this process, and return what each of them found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

_FOLDER = Path(__file__).parent
_INSTALLED = _FOLDER.parents[1] / ".venv"  # where `make test-clients` installs clients
_TIMEOUT_S = 300.0  # the frameworks take long to import on a busy machine
_RUN_CASES = """
const found = {};
for (const [name, run] of Object.entries(cases)) {
  try {
    found[name] = await run();
  } catch (error) {
    found[name] = { error: `${error}`, status: error.status ?? error.statusCode };
  }
}
console.log(JSON.stringify(found));
"""


def run_node(script: str, url: str) -> dict[str, Any]:
    """Return the results of the `cases` of a script for Node, by name. It gets the server's address as its argument.

    Node reads the script from standard input, and so looks for packages in the folder where it runs.
    """
    node, packages = shutil.which("node"), _packages()
    if node is None:
        _absent("Node is not installed")
    source = (_FOLDER / script).read_text(encoding="utf-8") + _RUN_CASES
    return _run([node, "--input-type=module", "-", url], packages.parent, source)


def node_file(name: str) -> Path:
    """Return a file of the packages for Node."""
    return _packages() / name


def _packages() -> Path:
    """Return the folder of the packages for Node."""
    packages = _INSTALLED / "node" / "node_modules"
    if not packages.exists():
        _absent("the packages for Node are not installed")
    return packages


def run_in_environment(name: str, script: str, *arguments: str) -> dict[str, Any]:
    """Return what a script prints in the environment of this name. Its first argument is the server's address."""
    python = _INSTALLED / name / "bin" / "python"
    if not python.exists():
        _absent(f"the environment {name!r} is not installed")
    return _run([str(python), str(_FOLDER / script), *arguments], _FOLDER, "")


def _run(command: list[str], folder: Path, source: str) -> dict[str, Any]:
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        command, input=source, cwd=folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def _absent(reason: str) -> NoReturn:
    """Skip the test, or fail where CI requires all clients."""
    (pytest.fail if os.environ.get("CI_REQUIRES_CLIENTS") else pytest.skip)(f"{reason}: make test-clients")
    raise AssertionError
