"""`loraretriever batch` on the running cluster, compared with the answers of a server over the same store."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import yaml

from tests.deployments.batching import TOPICS, prompts, write_rows
from tests.e2e.live import CONTEXT, Live, eventually
from tests.served_engine import ENGINE
from tests.soak import Scale

DEFAULTS = {"max_tokens": 60, "temperature": 0}
RUN_S = 900.0
BAD: dict[int, dict[str, Any]] = {
    7: {"lora": '{"strategey": "fusion"}'},
    8: {"model": "nobody"},
    9: {"prompt": "x" * CONTEXT},
}


@pytest.fixture
def adapters(live: Live) -> Iterator[None]:
    """Publish an adapter for each topic except the last, which no prompt is about."""
    names = [topic.replace(" ", "-") for topic in TOPICS[:5]]
    live.publish_all([live.folder(name, 900 + seed, TOPICS[seed]) for seed, name in enumerate(names)])
    yield
    live.withdraw_all(names)


_SAMPLED = ("text", "finish_reason", "num_new_tokens")


def batch(live: Live, folder: Path, part_rows: int) -> subprocess.Popen[str]:
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(live.config.model_dump(mode="json")))
    command = [str(Path(sys.executable).with_name("loraretriever")), "batch"]
    command += [str(folder / "in.parquet"), str(folder / "out.parquet"), "--config", str(settings)]
    command += ["--max-tokens", str(DEFAULTS["max_tokens"]), "--temperature", "0", "--part-rows", str(part_rows)]
    command += ["--address", ray.get_runtime_context().gcs_address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def written(folder: Path) -> dict[str, int]:
    """Return when each part was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out.parquet").glob("part-*")}


def of_server(live: Live, row: dict[str, Any]) -> dict[str, Any]:
    """Send a row as a request to the server, and return the answer as a row."""
    said = {name: value for name, value in row.items() if value is not None}
    body = {**DEFAULTS, **said, **({"lora": json.loads(said["lora"])} if "lora" in said else {})}
    answer = live.call("POST", "/v1/completions", json=body).json()
    if "error" in answer:
        return {"error": {name: answer["error"][name] for name in ("code", "message", "param")}}
    [choice] = answer["choices"]
    return {
        "text": choice["text"],
        "finish_reason": choice["finish_reason"],
        "num_prompt_tokens": answer["usage"]["prompt_tokens"],
        "num_new_tokens": answer["usage"]["completion_tokens"],
        "strategy": answer["lora"]["strategy"],
        "adapters": [pytest.approx(adapter, abs=1e-5) for adapter in answer["lora"]["adapters"]],
        "error": None,
    }


def ask_all(live: Live, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda row: of_server(live, row), rows))


def test_a_killed_run_resumes_and_its_rows_equal_the_servers_answers(
    live: Live, adapters: None, tmp_path: Path, scale: Scale
) -> None:
    num_rows = scale.pick("rows", small=200, full=10_000)
    num_asked = scale.pick("rows asked of the server, too", small=24, full=200)
    num_parts = 10
    rows = prompts(num_rows)
    for number, change in BAD.items():
        rows[number] = rows[number] | {"model": None, "lora": None} | change
    write_rows(tmp_path / "in.parquet", rows)
    killed = batch(live, tmp_path, num_rows // num_parts)
    try:
        eventually(lambda: len(written(tmp_path)) >= 2 or killed.poll() is not None, within_s=RUN_S)
    finally:
        killed.kill()
    said, problems = killed.communicate()
    before = written(tmp_path)
    assert 2 <= len(before) < num_parts, said + problems

    resumed = batch(live, tmp_path, num_rows // num_parts)
    said, problems = resumed.communicate(timeout=RUN_S)
    assert resumed.returncode == 0, said + problems
    after = written(tmp_path)
    assert len(after) == num_parts
    assert {name: after[name] for name in before} == before
    assert f"all {num_rows} rows" in said

    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert [number for number, row in enumerate(found) if row["error"]] == sorted(BAD)
    sampled = sorted({*random.Random(7).sample(range(num_rows), num_asked - len(BAD)), *BAD})
    for number, expected in zip(sampled, ask_all(live, [rows[n] for n in sampled]), strict=True):
        if ENGINE != "native" and rows[number].get("temperature"):
            for name in _SAMPLED:  # a batch uses the native engine, and a seed is of one engine
                expected.pop(name, None)
        row_found = {name: found[number][name] for name in expected}
        assert row_found == expected, f"row {number}: {rows[number]}"
