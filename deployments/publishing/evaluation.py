"""Measure on the Workers which adapters answer each other's samples best, and store the rankings."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from deployments.api.base import LoraOptions
from deployments.api.completions import Question
from deployments.api.contract import applied_contract
from deployments.api.pool_responses import ranking_object
from deployments.api.responses import Planned, replicas_object
from deployments.calls.catalogue_clients import RetrieverClient, StoreClient
from deployments.calls.worker_client import StreamEnd, Workers
from deployments.config.served_model import ServedModels
from deployments.generation.completions import make_jobs
from deployments.json_types import JsonObject
from deployments.publishing.publisher import Publisher
from gpu_worker.errors import AdapterLost, PromptTooLong
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Delta, SamplingParams
from lora_store import AdapterRecord, AdapterRef, Plan, PlannedAdapter, Ranking, Sample
from retriever_svc import Region, Scorer
from retriever_svc.competence import evaluate
from retriever_svc.output_profile import normalized

logger = logging.getLogger(__name__)

_TENANT = "evaluate:"  # not a valid tenant name; evaluations take turns with tenants in the engine's queue
_AT_ONCE = 4  # rows, so that an evaluation takes a small part of a batch
_ANSWER_S = 120.0
_MAX_TOKENS = 64  # of an answer; a longer output is compared that far


class AnswerScorer(Scorer):
    """Scores an adapter by greedy answers: 1 for an answer equal to the sample's output, else 0.

    Case, surrounding space and a final full stop do not count. Of a long output the beginning is compared. An adapter
    that is lost scores 0.
    """

    def __init__(self, workers: Workers, models: ServedModels) -> None:
        self._workers, self._models = workers, models
        self._room, self._numbers = asyncio.Semaphore(_AT_ONCE), itertools.count()

    async def scores(self, adapter: AdapterRecord, examples: Sequence[Sample]) -> Sequence[float]:
        """Return one score for each example. Raises: WorkerStarting, DeadlineExceeded, and what a Worker raises."""
        await self._workers.made_for(adapter.base_model).ready()
        try:
            async with asyncio.TaskGroup() as group:  # the first error cancels the other rows
                scoring = [group.create_task(self._score(adapter, example)) for example in examples]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in scoring]

    async def _score(self, adapter: AdapterRecord, example: Sample) -> float:
        assert example.output is not None, "examples have outputs"
        async with self._room:
            answer, is_cut = await self._answer(adapter, example.input, example.output)
        return score_answer(answer, example.output, is_cut=is_cut)

    async def _answer(self, adapter: AdapterRecord, text: str, output: str) -> tuple[str, bool]:
        """Return the answer, and whether it was cut."""
        model = self._models.made_for(adapter.base_model)
        rows = (PlannedAdapter(adapter.ref, adapter.weights_digest, 1.0),)
        plan = Plan("selection", rows, template=adapter.template, contract=adapter.contract, base_model=model.name)
        question = Question((Message("user", text),), text, adapter.ref.name, LoraOptions())
        max_tokens = min(_MAX_TOKENS, len(output.encode()) + 2)  # no token is shorter than a byte
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
        planned = Planned(plan, contract=applied_contract(plan, question, sampling))
        name = f"evaluate-{next(self._numbers)}"
        [job] = make_jobs(name, _TENANT, sampling, [question], [planned], [model.template])
        stream, parts, is_cut = self._workers.stream(replace(job, time_left_s=_ANSWER_S)), list[str](), False
        deadline = time.monotonic() + _ANSWER_S
        try:
            while not isinstance(delta := await stream.next(deadline), StreamEnd):
                if isinstance(delta, Delta):
                    parts.append(delta.text)
                    is_cut = delta.finish_reason == "length"
        except (AdapterLost, PromptTooLong) as exc:
            logger.warning("an example cannot be answered by %s: %s", adapter.ref, exc)
        finally:
            stream.cancel()
        return "".join(parts), is_cut


def score_answer(answer: str, output: str, *, is_cut: bool = False) -> float:
    """Return 1 if the answer equals the sample's output, or its beginning if the answer was cut, else 0."""
    if is_cut:
        answer = answer.rstrip("\ufffd")  # an unfinished last character
    given, expected = normalized(answer), normalized(output)
    return float(given == expected or (is_cut and given != "" and expected.startswith(given)))


class Evaluator:
    """Evaluates the adapters of one tenant and stores the result for that tenant alone."""

    def __init__(self, store: StoreClient, retriever: RetrieverClient, publisher: Publisher, scorer: Scorer) -> None:
        self._store, self._retriever, self._publisher, self._scorer = store, retriever, publisher, scorer

    async def evaluate(self, tenant: str, actor: str, most: int | None = None) -> AsyncGenerator[JsonObject]:
        """Yield progress by region, then the rankings, once they are stored and served.

        `most`: the number of regions after which no more are looked for. The first line counts one more then.
        """
        await self._store.ping()
        regions: list[Region] = []
        async with aclosing(self._retriever.regions(tenant)) as found:
            async for region in found:
                regions.append(region)
                if most is not None and len(regions) > most:
                    break
        yield {"done": 0, "total": len(regions)}
        rankings: list[Ranking] = []
        left_out: list[AdapterRef] = []
        async with aclosing(evaluate(regions, self._scorer)) as results:
            done = 0
            async for ranking in results:
                rankings += [ranking] if isinstance(ranking, Ranking) else []
                left_out += [ranking] if isinstance(ranking, AdapterRef) else []
                done += 1
                yield {"done": done, "total": len(regions)}
        generation = await self._store.rank(tenant, rankings, actor, keeps=left_out)
        settled = await self._publisher.catch_up(generation)
        yield {
            "result": {
                "num_regions": len(regions),
                "rankings": [ranking_object(ranking, tenant) for ranking in rankings],
                "generation": generation,
                "replicas": replicas_object(settled),
            }
        }
