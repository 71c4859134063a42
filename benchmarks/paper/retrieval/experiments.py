"""The steps of the study: train an encoder and rank all queries with it, then the steps with the best encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.paper.common.resumable import Step
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.retrieval.ranking import COSINE, hit_share, rank_rows
from benchmarks.paper.retrieval.study import UNTRAINED, Draw, Study
from retriever_svc import Encoder
from retriever_svc.encoder import Vectors
from retriever_svc.encoder_files import ENGLISH_MODEL
from retriever_svc.training import TrainingSettings, train_encoder

BEST = "best-40"  # the encoder that a server uses
_NOTE = "CHOSEN"  # without suffix: files with one are part of an encoder's identity
_TRAINING_COST = 4.0  # of a text in training, in encoded texts
_MAX_CACHED_TEXTS = 40_000  # every text of the study is encoded once by an encoder


class _StudyEncoder(Encoder):
    """An encoder that caches every text of the study under one owner."""

    def encode_plain(self, texts: Sequence[str], owners: Sequence[str] | None = None) -> Vectors:
        return super().encode_plain(texts, [""] * len(texts) if owners is None else owners)


class Experiments:
    """The study's encoders and rankings in a workspace. Every training starts from `model`."""

    def __init__(
        self,
        study: Study,
        workspace: Workspace,
        model: str | Path = ENGLISH_MODEL,
        settings: TrainingSettings | None = None,
    ) -> None:
        self.study, self._model, self._settings = study, model, settings or TrainingSettings(bf16=True)
        self._encoders, self.best = workspace.encoders / study.digest, workspace.encoders / BEST
        self.rows = workspace.rows / "retrieval" / study.digest

    def encoder(self, name: str) -> Encoder:
        """Return an encoder: `untrained`, the name of a draw, or `BEST`."""
        places = {UNTRAINED: self._model, BEST: self.best}
        return _StudyEncoder(places.get(name, self._encoders / name), max_cached_texts=_MAX_CACHED_TEXTS)

    def ranking_steps(self) -> list[Step]:
        untrained = self._step(UNTRAINED, self._num_ranked_texts, lambda: self._rank(UNTRAINED, ("test",)))
        return [untrained, *[self._trained_step(draw) for draw in self.study.draws()]]

    def _trained_step(self, draw: Draw) -> Step:
        samples = sum(len(task.samples) for task in self.study.tasks if task.name in draw.tasks)
        cost = _TRAINING_COST * 2 * self._settings.num_epochs * samples + self._num_ranked_texts
        return self._step(draw.name, cost, lambda: self._train_and_rank(draw))

    def _step(self, name: str, cost: float, run: Callable[[], pa.Table]) -> Step:
        return Step(name, self.rows / f"ranks-{name}.parquet", cost, run)

    @property
    def _num_ranked_texts(self) -> int:
        return sum(len(task.samples) + len(task.test) for task in self.study.tasks)

    def train(self, draw: Draw) -> None:
        """Train the encoder of the draw if it has not been trained."""
        target = self._encoders / draw.name
        if not target.exists():
            texts = {task.name: task.samples for task in self.study.tasks if task.name in draw.tasks}
            settings = replace(self._settings, seed=draw.seed)
            train_encoder(texts, target, model=self._model, settings=settings, about={"share": draw.share})

    def _train_and_rank(self, draw: Draw) -> pa.Table:
        self.train(draw)
        return self._rank(draw.name, ("test", "choice") if draw.is_main else ("test",))

    def _rank(self, name: str, parts: Sequence[str]) -> pa.Table:
        return rank_rows(self.encoder(name), name, self.study.tasks, parts)

    def choose_best(self) -> str:
        """Choose the draw of the paper's share that ranks the `choice` queries best, and make its encoder `BEST`."""
        scores = {draw.name: self._choice_score(draw.name) for draw in self.study.draws() if draw.is_main}
        best = max(scores, key=lambda name: scores[name])
        made_of = {"study": self.study.digest, "draw": best, "choice_top1": scores}
        _replace(self._encoders / best, self.best, made_of)
        return best

    def _choice_score(self, name: str) -> float:
        filters = [("score", "=", COSINE), ("part", "=", "choice")]
        rows = pq.read_table(self.rows / f"ranks-{name}.parquet", filters=filters)
        return hit_share(np.asarray(rows["own"]), 1)


def _replace(source: Path, target: Path, made_of: dict[str, Any]) -> None:
    """Make `target` a copy of `source`, with a note of the reason. Leave an equal copy unchanged."""
    said = json.dumps(made_of, indent=1) + "\n"
    if (target / _NOTE).is_file() and (target / _NOTE).read_text() == said:
        return
    scratch = target.with_name(f".{target.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    (scratch / _NOTE).write_text(said)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
