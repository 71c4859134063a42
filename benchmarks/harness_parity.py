"""The scores that lm-eval gives the server and transformers with PEFT, for the base model and one adapter.

`python -m benchmarks.harness_parity --python VENV/bin/python`, where VENV is an environment of its own with
`lm-eval[hf,api]` and `peft`. The tasks are the starter pool's held-out prompts, so no hub is contacted. Each task is
answered by transformers, and by the server over `local-completions` with token ids; those with free answers also over
`local-chat-completions`. A score may differ by one question.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import write_results
from benchmarks.starter_pool import HELD_OUT, POOL
from deployments.cli.local_server import Server
from deployments.config.loading import load_config
from gpu_worker.front.request.prompts import alpaca_prompt
from gpu_worker.model.packaged_model import packaged_folder

CHOICE, TEXT, CHAT = "starter_choice", "starter_text", "starter_chat"
METRICS = {CHOICE: "acc,none", TEXT: "exact_match,none", CHAT: "exact_match,none"}
_MAX_CHOICES = 8
_MAX_TOKENS = 20
_READY_TIMEOUT_S = 600.0
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def questions(folder: Path, per_task: int) -> list[dict[str, Any]]:
    """Return the first held-out prompts of each task. `choices`: the answers to choose from, where a task has few."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        own = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        outputs = sorted({row["output"] for row in own})
        for row in own[:per_task]:
            choices = row.get("labels") or (outputs if len(outputs) <= _MAX_CHOICES else [])
            prompt = {"prompt": alpaca_prompt(row["input"]), "message": row["input"]}
            rows.append(prompt | {"answer": row["output"], "choices": choices, "task": path.stem})
    return rows


def write_tasks(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the tasks of lm-eval, with their data in the same folder."""
    for name in METRICS:
        own = [row for row in rows if row["choices"]] if name == CHOICE else rows
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task(name, data)), encoding="utf-8")


def task(name: str, data: Path) -> dict[str, Any]:
    """Return one task of lm-eval. The prompt ends with a line break, so nothing separates it from the answer."""
    shared = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{message}}" if name == CHAT else "{{prompt}}",
        "target_delimiter": "",
    }
    if name == CHOICE:
        choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
        target = {"doc_to_target": "{{choices.index(answer)}}", "metric_list": [{"metric": "acc"}]}
        return shared | choice | target
    metric = {"metric": "exact_match", "ignore_case": True, "aggregation": "mean", "higher_is_better": True}
    until = {"until": ["\n"], "max_gen_toks": _MAX_TOKENS, "do_sample": False, "temperature": 0.0}
    return shared | {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": until,
        "metric_list": [metric],
    }


def evaluate(python: Path, folder: Path, model: str, options: Mapping[str, str], tasks: Sequence[str]) -> Any:
    """Run lm-eval and return its results."""
    out = Path(tempfile.mkdtemp(dir=folder))
    arguments = ",".join(f"{name}={value}" for name, value in options.items())
    chat = ["--apply_chat_template"] if model == "local-chat-completions" else []
    command = [str(python), "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, *chat]
    command += ["--tasks", ",".join(tasks), "--include_path", str(folder), "--output_path", str(out)]
    subprocess.run(command, check=True, env=os.environ | _OFFLINE | {"OPENAI_API_KEY": "none"})
    [path] = out.rglob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def right_answers(results: Mapping[str, Any]) -> dict[str, int]:
    """Return how many questions of each task were answered right."""
    return {
        name: round(scores[METRICS[name]] * results["n-samples"][name]["effective"])
        for name, scores in results["results"].items()
    }


def of_server(python: Path, folder: Path, url: str, model: str, tokenizer: Path) -> dict[str, int]:
    """Return the right answers of one model of the server, over both routes."""
    shared = {"model": model, "num_concurrent": "8", "max_retries": "1"}
    by_ids = shared | {
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tokenizer),
        "tokenized_requests": "True",
        "add_bos_token": "True",  # as its model `hf` does for this tokenizer
    }
    by_chat = shared | {"base_url": f"{url}/v1/chat/completions", "tokenizer_backend": "None"}
    found = right_answers(evaluate(python, folder, "local-completions", by_ids, [CHOICE, TEXT]))
    by_chat |= {"tokenized_requests": "False"}
    return found | right_answers(evaluate(python, folder, "local-chat-completions", by_chat, [CHAT]))


def of_transformers(python: Path, folder: Path, base: Path, adapter: Path | None) -> dict[str, int]:
    """Return the right answers of transformers; with `adapter`, of transformers and PEFT."""
    options = {"pretrained": str(base), "dtype": "bfloat16"}
    options |= {} if adapter is None else {"peft": str(adapter)}
    found = right_answers(evaluate(python, folder, "hf", options, [CHOICE, TEXT]))
    return found | {CHAT: found[TEXT]}  # the server writes the same prompt around a chat's message


def main(
    python: Annotated[Path, typer.Option(help="Python of an environment with lm-eval[hf,api] and peft")],
    adapter: Annotated[str, typer.Option(help="the adapter of the starter pool")] = "senti_hotels",
    per_task: Annotated[int, typer.Option(help="held-out prompts of each of the 12 tasks, at most 12")] = 12,
) -> None:
    """Compare the scores, print a table, write the results. Fail where one differs by more than a question."""
    out = Console(width=120)
    rows = questions(HELD_OUT, per_task)
    asked = {CHOICE: sum(bool(row["choices"]) for row in rows), TEXT: len(rows), CHAT: len(rows)}
    found: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "tasks")
        folder.mkdir()
        write_tasks(folder, rows)
        settings = load_config(None, store_uri=f"{scratch}/pool", preload=[POOL])
        base = packaged_folder(settings.cache_dir)
        models = {settings.served_base_name: None, adapter: POOL / adapter}
        peers = {name: of_transformers(python, folder, base, path) for name, path in models.items()}
        with Server(settings, port=0) as server:
            server.prepare(out.print)
            url = server.start()
            server.wait_ready(timeout_s=_READY_TIMEOUT_S)
            for name in models:
                found[name] = {"server": of_server(python, folder, url, name, base), "transformers": peers[name]}
    report(out, found, asked)


def report(out: Console, found: Mapping[str, Mapping[str, Mapping[str, int]]], asked: Mapping[str, int]) -> None:
    table = Table("model", "task", "questions", "server", "transformers", title="right answers by lm-eval")
    runs, figures = [], {}
    for model, by_way in found.items():
        for name, total in asked.items():
            server, peer = by_way["server"][name], by_way["transformers"][name]
            table.add_row(model, name, str(total), str(server), str(peer))
            runs.append({"model": model, "task": name, "questions": total, "server": server, "transformers": peer})
            figures[f"{model}_{name}_difference"] = server - peer
    with out.capture() as captured:
        out.print(table)
    print(captured.get())
    write_results("harness_parity", figures=figures, table=captured.get(), runs=runs)
    if any(abs(difference) > 1 for difference in figures.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
