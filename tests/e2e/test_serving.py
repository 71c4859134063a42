"""The whole path over HTTP, driven by the real `openai` client."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from deployments.cli.local_server import CHEAPER_SERVE, ENDS_AT_ONCE
from deployments.config.app import AppConfig
from tests.e2e.live import command_of, processes_with
from tests.e2e.starter_pool import POOL, Heldout
from tests.served_engine import ENGINE
from tests.soak import Scale

BASE = "gemma-3-270m"
HELDOUT = POOL.parent / "starter_heldout"


def names_of(lora: dict[str, Any]) -> list[str]:
    return [adapter["name"] for adapter in lora["adapters"]]


def ask_together(url: str, prompts: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Send all requests at once, each with its own fields."""

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return await asyncio.gather(
                *[
                    client.chat.completions.create(
                        **{
                            "model": "auto",
                            "messages": [{"role": "user", "content": prompt}],
                            "temperature": 0,
                            "max_tokens": 16,
                            **fields,
                        }
                    )
                    for prompt, fields in prompts
                ]
            )

    return asyncio.run(run())


def test_held_out_prompts_are_routed_to_their_adapters(url: str) -> None:
    """With the default settings, few of a task's prompts go to the base model or to other adapters."""
    prompts = [
        (path.stem, json.loads(line)["input"])
        for path in sorted(HELDOUT.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(prompts) == 144
    body = {"prompt": [prompt for _, prompt in prompts]}
    plans = httpx.post(f"{url}/v1/route", json=body, timeout=300).raise_for_status().json()["data"]
    found = [task in names_of(plan) for (task, _), plan in zip(prompts, plans, strict=True)]
    assert sum(found) / len(found) >= 0.95


def test_adapters_answer_what_the_base_model_cannot(url: str, heldout: list[Heldout], scale: Scale) -> None:
    heldout = heldout[: scale.pick("held-out prompts", small=12, full=len(heldout))]

    def right(answers: list[Any]) -> int:
        texts = [(answer.choices[0].message.content or "").strip().partition("\n")[0].strip() for answer in answers]
        return sum(text.lower() == item.output.strip().lower() for text, item in zip(texts, heldout, strict=True))

    models = [item.task for item in heldout] + [BASE] * len(heldout)
    asked = zip(heldout * 2, models, strict=True)
    answers = ask_together(url, [(item.input, {"model": model}) for item, model in asked])
    own, base = answers[: len(heldout)], answers[len(heldout) :]
    assert right(own) >= right(base) + len(heldout) // 4


def test_the_readmes_ten_lines_run(url: str) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [block] = [part.partition("```")[0] for part in readme.split("```python\n")[1:]]
    assert "http://127.0.0.1:8000" in block
    script = block.replace("http://127.0.0.1:8000", url)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.strip().splitlines()
    assert first.startswith("the chemist has not used my car <- ['sentence_negation'")
    assert second.startswith("do the boys like tea <- ['question_formation'")


def test_serves_processes_have_the_settings_that_spare_the_engines_cores(url: str) -> None:
    ours = processes_with("ray::ServeReplica:loraretriever:", "ray::ProxyActor", "ray::ServeController")
    assert len(ours) == 4 + 2
    for name, value in (CHEAPER_SERVE | ENDS_AT_ONCE).items():
        assert {process.environ().get(name) for process in ours} == {value}
        assert name not in os.environ


def test_rays_processes_are_as_nice_as_the_command(url: str, config: AppConfig) -> None:
    """Ray's own default, 15, would give nearly all of a shared core to any other busy process."""
    replicas = processes_with("ray::ServeReplica:loraretriever:")
    assert len(replicas) == 4
    assert {process.nice() for process in replicas} == {psutil.Process().nice()}
    [worker] = [process for process in replicas if ":Worker" in command_of(process)]
    threads = {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in worker.threads()}
    expected = config.worker.niceness if ENGINE == "native" else 0  # vLLM runs in other processes
    assert worker.nice() + expected in threads
