"""The notebook's cells run in order against the session's server, and print and draw what its text says."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT

NOTEBOOK = ROOT / "examples" / "demo.ipynb"
DRAWINGS = """
for number in plt.get_fignums():
    print("drawing", number, sum(len(axis.patches) + len(axis.collections) for axis in plt.figure(number).axes))
"""


def test_the_notebook_runs_on_the_demo_model(url: str, tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells) + DRAWINGS
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"LORARETRIEVER_URL": url, "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "ask-it is live" in printed
    assert "What is the capital of France? -> the base model" in printed
    assert "'Do the boys like tea?'" in printed and "'the boys do not like tea'" in printed.lower()
    [right] = [ast.literal_eval(line) for line in printed.splitlines() if line.startswith("{'selection'")]
    assert right["mixture"] > right["base model"] + 4
    drawn = [int(line.split()[2]) for line in printed.splitlines() if line.startswith("drawing")]
    assert len(drawn) == 3 and min(drawn) > 0
