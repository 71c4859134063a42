"""The first stage of a batch run: plan every row of a part."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa

from deployments.api import error_table
from deployments.api.base import refuse_ignored
from deployments.api.contract import applied_contract
from deployments.batch.input import PartReader
from deployments.batch.rows import Asked, make_bodies, make_request
from deployments.batch.run import BatchRun, Part, pool_of_run
from deployments.calls.catalogue_clients import RoutingClient
from deployments.config.app import AppConfig
from deployments.generation.completions import make_jobs
from deployments.generation.planner import Planner
from deployments.json_types import JsonObject
from deployments.observability.request_context import RequestContext
from deployments.retriever_factory import live_pool, retriever_over
from lora_store import LoraStore, NamedPolicy, Plan, Strategy
from retriever_svc import PinnedAdapter, Retriever, Route, RouteRequest


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """A part with its rows. `asked` has one entry per row."""

    part: Part
    rows: pa.Table
    asked: tuple[Asked, ...]


class PartPlanner:
    """The server's Planner over a Retriever that serves the generation of the run."""

    def __init__(self, run: BatchRun) -> None:
        config = run.settings.config
        store = LoraStore(config.store_uri, accepts_base=config.served_models.accepted_names)
        retriever = retriever_over(live_pool(config, partial(pool_of_run, store, run.settings, run.generation)), config)
        self._planner = Planner(config.served_models, config.retrieval, BatchRouting(retriever))
        self._reader = PartReader(run.source)
        self._settings, self._run = run.settings, run.id

    def __call__(self, row: JsonObject) -> dict[str, PlannedPart]:
        """Plan the part in `row`. Ray Data calls this."""
        return {"planned": asyncio.run(self.plan(Part(**row)))}

    async def plan(self, part: Part) -> PlannedPart:
        """Read and plan the rows of one part. An error of a row affects that row only."""
        rows = self._reader.read(part.start, part.stop)
        bodies = make_bodies(rows, self._settings.defaults)
        asked = await asyncio.gather(*[self._ask(part.start + place, body) for place, body in enumerate(bodies)])
        return PlannedPart(part, rows, tuple(asked))

    async def _ask(self, number: int, body: JsonObject) -> Asked:
        return await ask_planner(
            self._planner,
            self._settings.config,
            self._settings.tenant,
            f"{self._run}-row-{number}",
            body,
        )


async def ask_planner(planner: Planner, config: AppConfig, tenant: str, name: str, body: JsonObject) -> Asked:
    """Plan one row as the Ingress plans the same body. An error becomes the row's error.

    `name`: the id of the row's request, which also draws the versions of names under trial.
    """
    try:
        request = make_request(body)
        if config.strict_fields:
            refuse_ignored(request)
        request, sampling, questions, bound = await planner.apply_policy(request, tenant)
        plans = await planner.plan_all(questions, tenant, RequestContext(name, "batch"))
        [planned] = plans if bound is None else bound.explain(plans)
        contract = applied_contract(planned.plan, questions[0], sampling, request.set_fields)
        planned = replace(planned, contract=contract)
        template = config.served_models.by_name[planned.plan.base_model].template
        [job] = make_jobs(name, tenant, sampling, questions, [planned], [template])
    except Exception as exc:
        return Asked(error=error_table.describe(exc)[1]["error"])
    return Asked(planned, job)


class BatchRouting(RoutingClient):
    """Routes by a Retriever of this process. Prompts of one turn of the event loop share a call of the encoder."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._asked: list[tuple[Sequence[RouteRequest], asyncio.Future[list[Route]]]] = []

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        """Return the routes. Raises: NoAdapterMatched, StaleIndex."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._answer)
        answer: asyncio.Future[list[Route]] = loop.create_future()
        self._asked.append((requests, answer))
        return await answer

    def _answer(self) -> None:
        asked = [(requests, answer) for requests, answer in self._asked if not answer.cancelled()]
        self._asked = []
        if not asked:
            return
        together = [request for requests, _ in asked for request in requests]
        try:
            routes: Iterator[Route | Exception] = iter(self._retriever.route(together))
        except Exception as exc:  # all waiting calls get it, or they would wait forever
            routes = itertools.repeat(exc)
        for requests, answer in asked:
            own = list(itertools.islice(routes, len(requests)))
            error = next((route for route in own if isinstance(route, Exception)), None)
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result([route for route in own if isinstance(route, Route)])

    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan:
        """Return the plan of named adapters. Raises: AdapterNotFound, PlanInvalid, StaleIndex."""
        return self._retriever.plan_named(tenant, choices, strategy, min_generation)

    async def policies(self, tenant: str, model: str, min_generation: int = 0, limit: int = 1) -> list[NamedPolicy]:
        """Return the newest kept policies of a model name. Raises: StaleIndex."""
        return self._retriever.policies(tenant, model, min_generation, limit)

    async def find_model(
        self, tenant: str, model: str, strategy: Strategy, min_generation: int = 0
    ) -> NamedPolicy | Plan | None:
        """Return the policy or the plan that a model name means. Raises: StaleIndex."""
        return self._retriever.find_model(tenant, model, strategy, min_generation)

    async def replay(
        self,
        tenant: str,
        strategy: Strategy,
        pinned: Sequence[PinnedAdapter],
        generation: int,
        min_generation: int = 0,
    ) -> Plan:
        """Return the plan made at `generation`. Raises: PlanGone, PlanInvalid, StaleIndex."""
        return self._retriever.replay(tenant, strategy, pinned, generation, min_generation)
