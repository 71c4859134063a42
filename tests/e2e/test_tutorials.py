"""The blocks of the first pages and the cells of the notebook run, in order, against the session's server."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.cli.local_server import Server
from tests.docs.pages import ROOT, CodeBlock, blocks_of
from tests.e2e.live import Live
from tests.soak import Scale

DOCS = ROOT / "docs"
LONG_PAGES = (
    "how-to/evaluate-a-pool.md",
    "how-to/train-an-adapter.md",
    "how-to/back-up-and-move.md",
    "how-to/upgrade-and-roll-back.md",
)
IN_TUTORIALS = "http://127.0.0.1:8000"
NOTEBOOK = ROOT / "examples" / "demo.ipynb"
COUNT_DRAWN = """
for number in plt.get_fignums():
    print("drawn", sum(len(axis.patches) + len(axis.collections) for axis in plt.figure(number).axes))
"""


@pytest.fixture
def folder(tmp_path: Path, url: str) -> Iterator[Path]:
    """Return a working folder as the tutorials expect it, with `examples`. Withdraw what they publish."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    yield tmp_path
    for name in ("my-adapter", "ticket-queue", "ticket-topic", "ticket-urgency", "ask-it"):
        httpx.delete(f"{url}/v1/loras/{name}", timeout=120)


@pytest.mark.parametrize(
    ("page", "num_blocks", "outputs"),
    [
        (
            "tutorials/first-answer.md",
            7,
            [
                "the chemist has not used my car",
                "question_formation",
                "senti_hotels",
                "sentence_negation",
                "sample: Today I",
                "does you swim",
                "\nran\n",
            ],
        ),
        (
            "tutorials/publish-your-first-adapter.md",
            10,
            [
                "20 samples",
                "my-adapter is live",
                "collision: my-adapter and sentence_negation",
                "my-adapter was withdrawn",
            ],
        ),
        (
            "how-to/train-an-adapter.md",
            3,
            ["ticket-queue is fit to publish", "\nbilling\n", "ticket-queue is live", "ticket-queue was withdrawn"],
        ),
        ("how-to/back-up-and-move.md", 6, ["are in backup.tar", "0 new, ", "unchanged", ", exact", "relative error"]),
        (
            "how-to/evaluate-a-pool.md",
            5,
            ["36 prompts of adapters", "AUROC", "are ranked among similar ones", "fusion: ", "of 12 right"],
        ),
        ("how-to/choose-k-and-strategy.md", 1, ["do the boys like tea"]),
        ("how-to/upgrade-and-roll-back.md", 3, [", 0 bad", "are in before-upgrade.tar", "pool-of-before, generation"]),
    ],
)
def test_every_block_of_the_page_runs(
    page: str, num_blocks: int, outputs: list[str], folder: Path, url: str, scale: Scale
) -> None:
    if page in LONG_PAGES and not scale.pick("pages of many commands", small=0, full=len(LONG_PAGES)):
        pytest.skip("it trains an adapter, evaluates the starter pool, or copies it again and again: in make soak")
    blocks = [block for block in blocks_of(DOCS / page) if block.language in ("sh", "python")]
    assert len(blocks) == num_blocks
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
    assert first_candidate(printed) == "sql"
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
    printed = "".join(run(block, folder, url) for block in blocks if block.language == "sh")
    for name in names:
        assert f"\n{name} is fit to publish" in printed and f"new: {name} is live" in printed
    assert first_candidate(printed) == "ticket-queue"


def first_candidate(printed: str) -> str:
    """Return the first adapter in the last table that `loraretriever route` printed."""
    return re.findall(r"^│ (\S+)", printed.rpartition("strategy mixture")[2], re.MULTILINE)[0]


def test_the_ray_example_runs_in_another_driver_of_the_cluster(server: Server, tmp_path: Path) -> None:
    [block] = [block for block in blocks_of(DOCS / "how-to" / "connect-clients.md") if "import ray" in block.text]
    code = block.text.replace("127.0.0.1:6379", server.ray_address)
    printed = finished([sys.executable, "-c", code], tmp_path, server.url)
    whole, *chunks = printed.strip().splitlines()
    assert whole.startswith("do the boys like tea [") and "question_formation" in whole
    choices = [ast.literal_eval(chunk)["choices"][0] for chunk in chunks]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "do the boys like tea"
    assert choices[-1]["finish_reason"] == "stop"


def test_the_notebook_publishes_routes_asks_mixes_and_evaluates(folder: Path, url: str, scale: Scale) -> None:
    num_tasks = scale.pick("tasks of the notebook's evaluation", small=2, full=12)
    copy_examples(folder / "examples", num_tasks)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells) + COUNT_DRAWN
    printed = finished([sys.executable, "-c", code], folder, url)
    assert "ask-it is live" in printed
    assert "What is the capital of France? -> the base model" in printed
    assert "'do the boys like tea'" in printed
    [right] = [ast.literal_eval(line) for line in printed.splitlines() if line.startswith("{'selection'")]
    assert right["mixture"] > right["base model"] + num_tasks // 3
    drawn = [int(line.split()[1]) for line in printed.splitlines() if line.startswith("drawn")]
    assert len(drawn) == 3 and min(drawn) > 0


def copy_examples(examples: Path, num_tasks: int) -> None:
    """Replace the link to the examples by a folder with the starter pool and the prompts of the last tasks."""
    examples.unlink()
    (examples / "starter_heldout").mkdir(parents=True)
    (examples / "starter_pool").symlink_to(ROOT / "examples" / "starter_pool")
    for file in sorted((ROOT / "examples" / "starter_heldout").glob("*.jsonl"))[-num_tasks:]:
        (examples / "starter_heldout" / file.name).symlink_to(file)


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
        return finished([sys.executable, "-c", text], folder, url)
    return run_shell(block.text, folder, url)


def run_shell(script: str, folder: Path, url: str) -> str:
    """Run a script and return what it prints."""
    return finished(["bash", "-ec", script], folder, url)


def finished(command: list[str], folder: Path, url: str) -> str:
    """Run a command and return what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path,
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "LORARETRIEVER_URL": url,
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout
