"""From what a request says to the plan that answers it."""

from __future__ import annotations

from dataclasses import dataclass

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from deployments.errors import ModelNotFound, RequestInvalid
from deployments.schemas import GenerationRequest, LoraOptions
from lora_store import BASE_PLAN, AdapterNotFound, Plan, Strategy
from retriever_svc import Candidate, Route, RouteRequest

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what it was chosen from where the server chose."""

    plan: Plan
    candidates: tuple[Candidate, ...] = ()
    abstained: bool = False


class Planner:
    """`model` is read in this order: auto, the base's name, `base:adapter`, then an adapter's name."""

    def __init__(self, config: AppConfig, retriever: DeploymentHandle) -> None:
        self._config, self._retriever = config, retriever

    async def plan(self, request: GenerationRequest, text: str, tenant: str) -> Planned:
        """Raises: ModelNotFound, RequestInvalid, AdapterNotFound, NoAdapterMatched, PlanInvalid."""
        name = self._model_name(request.model)
        options = request.lora
        if options.adapters is not None and name != AUTO:
            raise RequestInvalid("lora.adapters goes with model 'auto' only", "lora.adapters")
        if name == AUTO:
            return await self.route(text, options, tenant)
        _refuse_retrieval(options)
        if name is None:
            return Planned(BASE_PLAN)
        try:
            choices = [(name, 1.0)]
            plan = await self._retriever.plan_named.remote(tenant, choices, "selection", options.min_generation)
            return Planned(plan)
        except RayTaskError as exc:
            if isinstance(exc.cause, AdapterNotFound):
                raise ModelNotFound(request.model) from exc
            raise

    async def route(self, text: str, options: LoraOptions, tenant: str) -> Planned:
        """The plan of the adapters the client names, else the Retriever's choice for `text`.

        Raises: RequestInvalid, AdapterNotFound, PlanInvalid, StaleIndex; NoAdapterMatched, where the fallback is
        `error`.
        """
        if options.adapters is not None:
            _refuse_retrieval(options)
            return Planned(await self._named(options, tenant))
        defaults = self._config.retrieval
        request = RouteRequest(
            text=text,
            tenant=tenant,
            strategy=options.strategy or defaults.strategy,
            top_k=options.k or defaults.k,
            weighting=options.weights or defaults.weights,
            min_score=options.min_score,
            fallback=options.fallback or defaults.fallback,
            tags=() if options.filter is None else tuple(options.filter.tags),
            min_generation=options.min_generation,
        )
        route: Route = await self._retriever.route.remote(request)
        return Planned(route.plan, route.candidates, route.abstained)

    async def _named(self, options: LoraOptions, tenant: str) -> Plan:
        assert options.adapters is not None
        choices = [(choice.name, choice.weight) for choice in options.adapters]
        strategy: Strategy = options.strategy or ("selection" if len(choices) == 1 else self._config.retrieval.strategy)
        plan: Plan = await self._retriever.plan_named.remote(tenant, choices, strategy, options.min_generation)
        return plan

    def _model_name(self, model: str) -> str | None:
        """`auto`, an adapter's name, or None for the base model alone. Raises: ModelNotFound."""
        base = self._config.served_base_name
        if model == base:
            return None
        head, colon, tail = model.partition(":")
        if not colon:
            return model
        if head != base or not tail:
            raise ModelNotFound(model)
        return tail


def _refuse_retrieval(options: LoraOptions) -> None:
    """Raises: RequestInvalid for the first option that only retrieval reads."""
    for field in options.of_retrieval:
        raise RequestInvalid(f"lora.{field} says how adapters are retrieved, and here they are named", f"lora.{field}")
