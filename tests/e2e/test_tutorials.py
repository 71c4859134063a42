"""The `sh` and `python` blocks of the first pages run, in order, against the session's server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, CodeBlock, blocks_of

DOCS = ROOT / "docs"
IN_TUTORIALS = "http://127.0.0.1:8000"


@pytest.fixture
def folder(tmp_path: Path, url: str) -> Iterator[Path]:
    """Return a working folder as the tutorials expect it, with `examples`. Withdraw what they publish."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    yield tmp_path
    run_shell("loraretriever withdraw my-adapter ticket-queue", tmp_path, url, check=False)


@pytest.mark.parametrize(
    ("page", "outputs"),
    [
        (
            "tutorials/first-answer.md",
            ["the chemist has not used my car", "question_formation", "senti_hotels", "sentence_negation"],
        ),
        (
            "tutorials/publish-your-first-adapter.md",
            [
                "20 samples",
                "my-adapter is live",
                "collision: my-adapter and sentence_negation",
                "my-adapter was withdrawn",
            ],
        ),
        (
            "how-to/train-an-adapter.md",
            ["ticket-queue is fit to publish", "\nbilling\n", "ticket-queue is live", "ticket-queue was withdrawn"],
        ),
        (
            "how-to/back-up-and-move.md",
            ["are in backup.tar", "0 new, ", "unchanged", ", exact", "relative error"],
        ),
        ("how-to/upgrade-and-roll-back.md", [", 0 bad", "are in before-upgrade.tar", "are now in ./pool-of-before"]),
    ],
)
def test_every_block_of_the_page_runs(page: str, outputs: list[str], folder: Path, url: str) -> None:
    blocks = [block for block in blocks_of(DOCS / page) if block.language in ("sh", "python")]
    assert len(blocks) >= 3
    printed = "".join(run(block, folder, url) for block in blocks)
    assert [output for output in outputs if output not in printed] == []


def run(block: CodeBlock, folder: Path, url: str) -> str:
    """Run one block and return what it prints. The server's address takes the place of the one in the text."""
    if block.language == "python":
        text = block.text.replace(IN_TUTORIALS, url)
        return finished([sys.executable, "-c", text], folder, url).stdout
    return run_shell(block.text, folder, url)


def run_shell(script: str, folder: Path, url: str, *, check: bool = True) -> str:
    """Run a script and return what it prints."""
    return finished(["bash", "-ec", script], folder, url, check=check).stdout


def finished(command: list[str], folder: Path, url: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "200", "NO_COLOR": "1", "LORARETRIEVER_URL": url}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    if check:
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done
