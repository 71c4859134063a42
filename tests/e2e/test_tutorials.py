"""The `sh` and `python` blocks of the first pages run, in order, against the session's server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, CodeBlock, blocks_of
from tests.e2e.live import Live
from tests.soak import Scale

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
        ("how-to/upgrade-and-roll-back.md", [", 0 bad", "are in before-upgrade.tar", "pool-of-before, generation"]),
    ],
)
def test_every_block_of_the_page_runs(page: str, outputs: list[str], folder: Path, url: str) -> None:
    blocks = [block for block in blocks_of(DOCS / page) if block.language in ("sh", "python")]
    assert len(blocks) >= 3
    printed = "".join(run(block, folder, url) for block in blocks)
    assert [output for output in outputs if output not in printed] == []


def test_readmes_three_adapters_are_published_into_a_pool_and_found(live: Live, tmp_path: Path) -> None:
    names = ("sql", "letters", "tickets")
    for number, name in enumerate(names):
        folder = shutil.copytree(live.folder(name, 7000 + number, name), tmp_path / "adapters" / name)
        (folder / "lora_samples.jsonl").unlink()
    [block] = [block for block in blocks_of(ROOT / "README.md") if "publish adapters" in block.text]
    printed = run_shell(block.text, tmp_path, live.url)
    assert all(f"{name} is live" in printed for name in names)
    assert "sql" in printed.rpartition("candidate")[2].splitlines()[2]
    live.withdraw_all(names)


def test_the_page_about_training_outputs_runs(folder: Path, url: str, scale: Scale) -> None:
    """At full scale TRL trains the three adapters; otherwise its folders are written from the starter pool."""
    names = ["ticket-queue", "ticket-topic", "ticket-urgency"]
    blocks = blocks_of(DOCS / "how-to" / "publish-training-outputs.md")
    make_data, train = [block for block in blocks if block.language == "python"]
    run(make_data, folder, url)
    assert sorted(path.stem for path in (folder / "data").iterdir()) == names
    if scale.pick("adapters trained by TRL", small=0, full=3):
        pytest.importorskip("trl", reason="trl is not installed: the extra `clients` has it")
        run(train, folder, url)
    else:
        for name, task in zip(names, ("past_tense", "date_format", "reverse_letters"), strict=True):
            write_training_output(ROOT / "examples" / "starter_pool" / task, folder / "outputs" / name)
    try:
        printed = "".join(run(block, folder, url) for block in blocks if block.language == "sh")
    finally:
        run_shell(f"loraretriever withdraw {' '.join(names)}", folder, url, check=False)
    assert "3 fit to publish, 0 refused" in printed and "3 new, 0 changed" in printed
    assert all(f"36 samples from data/{name}.jsonl" in printed for name in names)
    [first] = re.findall(r"^│ (\S+) .*1.000", printed.rpartition("strategy ")[2], re.MULTILINE)
    assert first == "ticket-queue"


def write_training_output(adapter: Path, output: Path) -> None:
    """Write an adapter as a trainer leaves it: a checkpoint, the last state, and the path of the base model."""
    for folder in (output / "checkpoint-27", output):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(adapter / "adapter_model.safetensors", folder)
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(Path("~/.cache/loraretriever/gemma-3-270m").expanduser())
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "training_args.bin").write_bytes(b"not read")


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
