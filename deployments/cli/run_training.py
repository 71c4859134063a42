"""What `loraretriever train-retriever` does, once the command line is read."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deployments.cli.client import err, out
from deployments.config.app import load_config
from lora_store import LoraStore, LoraStoreError
from retriever_svc import RetrieverError, TooFewSamples, choose_tasks
from retriever_svc.encoder_files import DEFAULT_MODEL
from retriever_svc.training import TrainingSettings, train_encoder


@dataclass(frozen=True, slots=True)
class Wanted:
    """The command line. One of `store` and `samples` is None."""

    target: Path
    store: str | None
    tenant: str
    samples: Path | None
    share: float
    seed: int
    encoder: str | None
    epochs: int


def run_training(wanted: Wanted) -> int:
    """The exit code."""
    try:
        texts = _wanted_texts(wanted)
        started = time.monotonic()
        _train(wanted, texts)
    except (RetrieverError, LoraStoreError, ValueError, OSError) as exc:
        err.print(str(exc), style="red", markup=False, soft_wrap=True)
        return 1
    took_s = time.monotonic() - started
    out.print(f"{wanted.target} was trained on {len(texts)} tasks in {took_s:.0f} s", markup=False, soft_wrap=True)
    return 0


def _wanted_texts(wanted: Wanted) -> dict[str, list[str]]:
    """Raises: TooFewSamples: nothing to draw from. ValueError, naming the file's line."""
    if wanted.samples is not None:
        texts, source = read_texts(wanted.samples), str(wanted.samples)
    else:
        source = load_config(None, store_uri=wanted.store).store_uri
        texts = stored_texts(source, wanted.tenant)
    if not texts:
        raise TooFewSamples(f"{source} has no samples to train on")
    return {task: texts[task] for task in choose_tasks(list(texts), wanted.share, wanted.seed)}


def stored_texts(store_uri: str, tenant: str) -> dict[str, list[str]]:
    """The sample texts of each adapter that `tenant` may name, by the name it has for that tenant."""
    store = LoraStore(store_uri, accepts_base=())
    records = [record for record in store.snapshot().records.values() if record.is_visible_to(tenant)]
    return {
        record.ref.name_for(tenant): [sample.input for sample in store.samples(record.samples_digest)]
        for record in records
        if record.samples_digest is not None
    }


def read_texts(file: Path) -> dict[str, list[str]]:
    """The file's texts by task. Raises: OSError; ValueError naming the first line that is none."""
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            task, text = _read_line(line, f"{file}:{number}")
            texts[task].append(text)
    return dict(texts)


def _read_line(line: str, place: str) -> tuple[str, str]:
    try:
        raw = json.loads(line)
    except ValueError as exc:
        raise ValueError(f"{place} is no JSON: {exc}") from exc
    task, text = (raw.get("task"), raw.get("text")) if isinstance(raw, dict) else (None, None)
    if not isinstance(task, str) or not isinstance(text, str) or not task or not text.strip():
        raise ValueError(f'{place} must be {{"task": name, "text": text}}')
    return task, text


def _train(wanted: Wanted, texts: Mapping[str, Sequence[str]]) -> None:
    settings = TrainingSettings(num_epochs=wanted.epochs, seed=wanted.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as shown:
        bar = shown.add_task(f"training on {len(texts)} tasks", total=None)
        train_encoder(
            texts,
            wanted.target,
            model=wanted.encoder or DEFAULT_MODEL,
            settings=settings,
            about={"share": wanted.share},
            progress=lambda done, total: shown.update(bar, completed=done, total=total),
        )
