"""The tutorial about many teams, with a server of its own: `make soak` runs all of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.scaling_app import serving
from tests.docs.pages import ROOT, CodeBlock, blocks_of
from tests.soak import Scale

PAGE = ROOT / "docs" / "tutorials" / "three-hundred-adapters.md"


def test_the_tutorial_about_many_teams_runs(tmp_path: Path, scale: Scale) -> None:
    blocks = blocks_of(PAGE)
    [start] = [place for place, block in enumerate(blocks) if "loraretriever serve" in block.text]
    before, after = blocks[:start], [block for block in blocks[start:] if block.language == "sh"]
    assert (len(before), len(after)) == (2, 5)
    if not scale.pick("adapters of the tutorial", small=0, full=60):
        pytest.skip("it takes minutes: make soak")
    printed = run_all(before, tmp_path, {})
    assert "60 adapters in teams" in printed
    written = blocks[start].text.partition("<<'END'\n")[2].partition("END\n")[0]
    settings = yaml.safe_load(written)
    settings |= {"store_uri": str(tmp_path / "teams-pool"), "keys_file": str(tmp_path / "keys.yaml")}
    with serving(tmp_path, settings, os.environ) as (url, _):
        printed = run_all(after, tmp_path, {"LORARETRIEVER_URL": url})
    assert printed.count("20 live, 0 refused") == 3
    first = [re.findall(r"^│ (\S+)", table, re.MULTILINE)[0] for table in printed.split("strategy mixture")[1:3]]
    assert first == ["question_formation-oslo", "question_formation-lima"]
    for said in (
        "the boys do not like tea",
        "own adapter first 100.0%",
        "not approved",
        "!03!07!2024!",
        "data/date_format-oslo",
        "platform",
    ):
        assert said in printed


def run_all(blocks: list[CodeBlock], folder: Path, variables: dict[str, str]) -> str:
    """Run the blocks in the folder and return what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = {"PATH": path, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    printed = ""
    for block in blocks:
        done = subprocess.run(
            ["bash", "-ec", block.text],
            cwd=folder,
            env=os.environ | shown | variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        printed += done.stdout + done.stderr
    return printed
