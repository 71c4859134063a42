"""Check the limits of a request, estimate its work, and plan which adapters answer each of its prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.api.base import LoraOptions, PlanGiven
from deployments.api.completions import MAX_ANSWER_LOGPROBS, GenerationRequest, PolicyFields, Question
from deployments.api.names import AppliedPolicy, NamePolicy
from deployments.api.responses import Planned
from deployments.auth.authenticator import TokenUsage, Work
from deployments.calls.catalogue_clients import RoutingClient
from deployments.calls.worker_client import answer_in_groups
from deployments.config.parts import RetrievalSettings
from deployments.config.served_model import ServedModel, ServedModels
from deployments.errors import EncoderBusy, ModelNotFound, RequestInvalid
from deployments.generation.conversation import RoutingTexts, choose_texts
from deployments.observability.request_context import RequestContext
from deployments.observability.tracing import open_span
from gpu_worker.errors import PromptTooLong
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import EXPECTED_NEW_TOKENS, MAX_CHARS_PER_TOKEN, Prompt, SamplingParams, TokenIds
from gpu_worker.front.request.tools import Tools
from lora_store import BASE_PLAN, STRATEGIES, AdapterNotFound, AdapterRef, NamedPolicy, Plan, Strategy
from retriever_svc import Route, RouteRequest, StaleIndex
from retriever_svc.encoder import MAX_TOKENS
from retriever_svc.planning import led_by, may_be_led
from retriever_svc.route import STICKY_PLACES, Fallback
from retriever_svc.views import read_ends, tokens_routed

AUTO = "auto"
P = TypeVar("P", bound=PolicyFields)
R = TypeVar("R", bound=GenerationRequest)
_CHARS_PER_TOKEN = 4  # estimate for English; the charge is settled by real usage
_TOKENIZED_CHARS_PER_TOKEN = 8  # of the context: more than any text of a natural language has


def _check_limits(
    sampling: SamplingParams, questions: Sequence[Question], model: ServedModel, limit_field: str
) -> None:
    """Check the sizes of a request before it is tokenized. The Worker counts tokens exactly.

    `limit_field`: the request's field that limits the new tokens.
    Raises: PromptTooLong, RequestInvalid.
    """
    for question in questions:
        if not isinstance(question.prompt, TokenIds):
            check_chars(_num_tool_chars(question) + _num_chars(question.prompt), model)
        elif (num_tokens := len(question.prompt.ids)) >= model.max_model_len:
            raise PromptTooLong.of(f"{num_tokens} tokens", model.max_model_len)
    asked = None if sampling.max_tokens_is_default else sampling.max_tokens
    _check_new_tokens(asked, sampling.min_tokens, model, limit_field)


def _check_new_tokens(
    max_tokens: int | None, min_tokens: int, model: ServedModel, limit_field: str = "max_tokens"
) -> None:
    for field, wanted in ((limit_field, max_tokens), ("min_tokens", min_tokens)):
        if wanted is not None and wanted > model.max_new_tokens:
            raise RequestInvalid(f"{field}: at most {model.max_new_tokens}, got {wanted}", field)


def asked_logprobs(request: GenerationRequest, sampling: SamplingParams, questions: Sequence[Question]) -> int:
    """Return how many log probabilities a request asks for, as far as it shows that itself."""
    num_new = (sampling.max_tokens or 0) if sampling.ignore_eos else sampling.min_tokens
    num_prompt = sum(len(item.prompt.ids) - 1 for item in questions if isinstance(item.prompt, TokenIds))
    of_answers = 0 if sampling.logprobs is None else len(questions) * num_new * (1 + sampling.logprobs)
    of_prompts = 0 if sampling.prompt_logprobs is None else num_prompt * (1 + sampling.prompt_logprobs)
    return request.n * (of_answers + of_prompts)


def check_logprobs(request: GenerationRequest, num_logprobs: int) -> None:
    """Refuse a whole answer with this many log probabilities. Raises: RequestInvalid."""
    if num_logprobs > MAX_ANSWER_LOGPROBS:
        fields = ("prompt_logprobs", "top_logprobs")
        field = next((name for name in fields if getattr(request, name, None)), "logprobs")
        raise RequestInvalid(
            f"{field}: a whole answer has at most {MAX_ANSWER_LOGPROBS} log probabilities: one for each token of all"
            " rows, and one for each alternative; ask for fewer alternatives, tokens, prompts or choices",
            field,
        )


def refuse_stream_options(request: GenerationRequest) -> None:
    """Reject `stream_options` on a request that is not streamed. Raises: RequestInvalid."""
    if request.stream_options is not None:
        raise RequestInvalid("stream_options applies to streams only; set stream: true or remove it", "stream_options")


def _num_tool_chars(question: Question) -> int:
    return 0 if question.tools is None else question.tools.num_chars


def prompt_tokens(prompt: Prompt, tools: Tools | None) -> int:
    """Return how many tokens a prompt has with its tools: of text about a quarter of its characters, rounded up."""
    num_tools = 0 if tools is None else math.ceil(tools.num_chars / _CHARS_PER_TOKEN)
    if isinstance(prompt, TokenIds):
        return num_tools + len(prompt.ids)
    return num_tools + math.ceil(_num_chars(prompt) / _CHARS_PER_TOKEN)


def check_chars(num_chars: int, model: ServedModel) -> None:
    """Refuse a text of this length as a prompt. Raises: PromptTooLong."""
    if num_chars > model.max_model_len * MAX_CHARS_PER_TOKEN:
        raise PromptTooLong.of(f"{num_chars} characters", model.max_model_len)


@contextmanager
def reading(usage: TokenUsage) -> Iterator[None]:
    """Charge the text that the encoder reads in the block, whatever its outcome, unless it is refused unread."""
    usage.num_readings += 1
    try:
        yield
    except (EncoderBusy, StaleIndex, ModelNotFound, BackPressureError, DeploymentUnavailableError) as exc:
        if not (isinstance(exc, EncoderBusy) and exc.has_read):
            usage.num_readings -= 1
        raise


def check_tokenized(question: Question, field: str, model: ServedModel) -> None:
    """Refuse a text that is too long to be tokenized for a client that only counts, its tools included.

    Raises: PromptTooLong.
    """
    assert not isinstance(question.prompt, TokenIds)
    limit = model.max_model_len * _TOKENIZED_CHARS_PER_TOKEN
    num_chars = _num_chars(question.prompt) + _num_tool_chars(question)
    if num_chars > limit:
        raise PromptTooLong(
            f"{field}: at most {limit} characters, {_TOKENIZED_CHARS_PER_TOKEN} for each token of the context, got"
            f" {num_chars}; send the text in parts",
            field,
        )


def _num_chars(prompt: str | tuple[Message, ...]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(message.num_chars for message in prompt)


class Planner:
    """Plans questions. `model` is read in this order: auto, the base's name, `base:adapter`, an adapter's name.

    Model names have been replaced by their policies at this point, and no adapter has the name of one. The plan names
    the base model that answers. If `model` names a base model, as `base:auto` does, no other base model may answer.
    """

    def __init__(self, models: ServedModels, defaults: RetrievalSettings, retriever: RoutingClient) -> None:
        self._models, self._retriever = models, retriever
        self.defaults = defaults  # for what a request leaves unset; may be replaced at any time

    async def apply_policy(
        self, request: R, tenant: str
    ) -> tuple[R, SamplingParams, Sequence[Question], AppliedPolicy | None]:
        """Return a request, its sampling and its questions by the policy of its model name, and that policy.

        Raises: PromptTooLong, ModelNotFound, RequestInvalid, SamplingInvalid, GrammarInvalid, StaleIndex.
        """
        sampling, questions = request.sampling(), request.questions()
        limits, field = self._models.limiting(request.model), request.limit_field
        _check_limits(sampling, questions, limits, field)  # before any call
        if not self._may_be_name(request.model):
            return request, sampling, questions, None
        strategy, min_generation = _strategy_of_one(request.lora), request.lora.min_generation
        began = time.monotonic()
        with open_span("plan"):
            named = await self._retriever.find_model(tenant, request.model, strategy, min_generation)
        if not isinstance(named, NamedPolicy):
            seconds = time.monotonic() - began
            return request, sampling, [replace(each, plan=named, plan_s=seconds) for each in questions], None
        bound = AppliedPolicy.of(named, questions[0], tenant)
        filled = bound.apply_to_request(request)
        sampling = replace(filled.sampling(), max_tokens_is_default=request.token_limit is None)
        questions = bound.make_questions(filled)
        _check_limits(sampling, questions, self._models.limiting(bound.policy.model), field)
        return filled, sampling, questions, bound

    def require_base(self, model: str) -> None:
        """Refuse token ids where `auto` may find any base model: each has its own ids. Raises: RequestInvalid."""
        if self._models.are_several and self._models.split(model) == ("", AUTO):
            named = f"{self._models.first.name}:{AUTO}"
            raise RequestInvalid(
                f"token ids need a model that names their base model, as {named!r}; or send text", "model"
            )

    async def find_policy(self, model: str, tenant: str, min_generation: int = 0) -> NamedPolicy | None:
        """Return the newest policy of a model name, None for any other model. Raises: ModelNotFound, StaleIndex."""
        if not self._may_be_name(model):
            return None
        return next(iter(await self._retriever.policies(tenant, model, min_generation)), None)

    def _may_be_name(self, model: str) -> bool:
        """Return whether `model` may name a policy or an adapter. Raises: ModelNotFound."""
        return model != AUTO and self._models.split(model) == ("", model) and ":" not in model

    async def add_owners(self, policy: NamePolicy, tenant: str) -> NamePolicy:
        """Return a policy with the owners of its adapters, so that it means the same for every tenant.

        Raises: ModelNotFound, AdapterNotFound, AdapterIncompatible, PlanInvalid, RequestInvalid if no request could be
        planned by it.
        """
        settled = await self._with_owners(policy, tenant)
        if policy.variant is not None:
            settled = settled.model_copy(update={"variant": await self._with_owners(policy.variant, tenant)})
        return settled

    async def _with_owners(self, policy: P, tenant: str) -> P:
        _check_new_tokens(policy.max_tokens, policy.min_tokens, self._models.widest)
        given, name = policy.lora.adapters or [], self._model_name(policy.model)
        if name == AUTO and not given:
            self._request_of("", policy.model, policy.lora, tenant)  # checks the options of the strategy
            return policy
        [planned] = await self._plan_alike([Question("", "", policy.model, policy.lora)], tenant, TokenUsage())
        names = [
            f"{row.ref.tenant}/{row.ref.name}" + (f"@{row.ref.digest}" if "@" in wanted else "")
            for row, wanted in zip(
                planned.plan.adapters, [choice.name for choice in given] or [name or ""], strict=False
            )
        ]
        if not given:
            return policy.model_copy(update={"model": names[0]}) if names else policy
        adapters = [choice.model_copy(update={"name": name}) for choice, name in zip(given, names, strict=True)]
        return policy.model_copy(update={"lora": policy.lora.model_copy(update={"adapters": adapters})})

    def measure_work(self, request: GenerationRequest, sampling: SamplingParams, questions: Sequence[Question]) -> Work:
        """Return how much a request asks for. Raises: ModelNotFound.

        An answer without `max_tokens` counts as `EXPECTED_NEW_TOKENS`, because few use their whole context.
        """
        num_new = EXPECTED_NEW_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        num_tokens = sum(prompt_tokens(item.prompt, item.tools) + request.n * num_new for item in questions)
        return Work(
            num_rows=len(questions) * request.n,
            num_tokens=num_tokens,
            num_read=sum(map(self.tokens_to_route, questions)),
            rows_field="n" if request.n > 1 else "prompt",
            tokens_field=request.limit_field,
        )

    async def plan_all(
        self,
        questions: Sequence[Question],
        tenant: str,
        context: RequestContext | None = None,
        usage: TokenUsage | None = None,
    ) -> list[Planned]:
        """Return one plan per question, in order. Questions with the same model and options share one call.

        The plans and the time are recorded in `context`; its id also draws the versions of names under trial. The calls
        in which the encoder may have read text are counted in `usage`.
        Raises: ModelNotFound, RequestInvalid, AdapterNotFound, NoAdapterMatched, PlanInvalid, PlanGone, StaleIndex,
        EncoderBusy.
        """
        began, used = time.monotonic(), TokenUsage() if usage is None else usage
        options = {id(question.lora): question.lora.model_dump_json() for question in questions}
        with open_span("plan"):
            plans = await answer_in_groups(
                questions,
                lambda question: (question.model, question.alias, options[id(question.lora)]),
                lambda _, alike: self._plan_alike(alike, tenant, used),
            )
        keys = [None if context is None else f"{context.request_id}/{place}" for place in range(len(questions))]
        planned = [plan.drawn(key) for plan, key in zip(plans, keys, strict=True)]
        if context is not None:
            looked_up_s = max((question.plan_s for question in questions), default=0.0)
            context.record_plans(planned, looked_up_s + time.monotonic() - began)
        return planned

    async def _plan_alike(self, questions: Sequence[Question], tenant: str, usage: TokenUsage) -> Sequence[Planned]:
        """Plan questions of one model and the same options."""
        question = questions[0]
        name = self._model_name(question.model)
        options = question.lora
        if question.alias is not None and name is None:
            name = AUTO  # other servers expect the base's name together with adapters
        if name != AUTO and options.names_adapters is not None:
            field = question.alias or f"lora.{options.names_adapters}"
            raise RequestInvalid(f"{field} requires model 'auto'", field)
        if name == AUTO:
            if isinstance(question.prompt, tuple) and _is_routed(options):
                routed = choose_texts(question.prompt)
                planned = await self._plan_conversation(routed, question.model, options, tenant, usage)
                return [planned] * len(questions)
            texts = [item.text or "" for item in questions]
            return await self._plan_texts(texts, options, tenant, question.model, usage)
        _refuse_retrieval(options)
        if name is None:
            if options.strategy is not None:
                raise RequestInvalid(
                    "lora.strategy requires at least one adapter, but `model` is the base model", "lora.strategy"
                )
            return [Planned(self._base_plan(question.model))] * len(questions)
        try:
            plan = question.plan or await self._retriever.plan_named(
                tenant, [(name, 1.0)], _strategy_of_one(options), options.min_generation
            )
        except AdapterNotFound as exc:  # through Serve it is also a RayTaskError
            raise ModelNotFound(question.model, exc.hint) from exc
        self._check_base(plan, question.model)
        return [Planned(plan)] * len(questions)

    def _base_plan(self, model: str) -> Plan:
        """Return the plan without adapters: of the base model that `model` names, or of the first one."""
        if not self._models.are_several:
            return BASE_PLAN
        return replace(BASE_PLAN, base_model=self._models.split(model)[0] or self._models.first.name)

    def _check_base(self, plan: Plan, model: str) -> None:
        """Raises: RequestInvalid if the plan's adapters are not of the base model that `model` names."""
        base_model, _ = self._models.split(model)
        if base_model and plan.base_model not in ("", base_model):
            of = f"{plan.adapters[0].ref.name!r} is an adapter" if plan.adapters else "lora.plan is"
            raise RequestInvalid(
                f"model: {of} of base model {plan.base_model!r}, but `model` (or its policy) names base model"
                f" {base_model!r}; name {plan.base_model!r}, or leave the base model out",
                "model",
            )

    def tokens_to_route(self, question: Question) -> int:
        """Return how many tokens the encoder may read to find the question's adapters. Raises: ModelNotFound.

        Token ids whose text is not known yet count as one token each.
        """
        if isinstance(question.prompt, TokenIds) and question.text is None and self.needs_routing(question):
            return min(len(question.prompt.ids), MAX_TOKENS)
        return sum(map(tokens_routed, self.texts_to_route(question)))

    def texts_to_route(self, question: Question) -> Sequence[str]:
        """Return the texts that the encoder may read to find the question's adapters. Raises: ModelNotFound."""
        if self._model_name(question.model) != AUTO:
            return ()
        if isinstance(question.prompt, tuple) and _is_routed(question.lora):
            routed = choose_texts(question.prompt)
            return () if routed.is_housekeeping else (*chain.from_iterable(routed.previous), *routed.texts)
        options = question.lora
        return () if options.names_adapters is not None else (options.query or question.text or "",)

    def needs_routing(self, question: Question) -> bool:
        """Return whether the encoder reads the question's own text. Raises: ModelNotFound."""
        return self._model_name(question.model) == AUTO and _is_routed(question.lora)

    async def _plan_conversation(
        self, routed: RoutingTexts, model: str, options: LoraOptions, tenant: str, usage: TokenUsage
    ) -> Planned:
        """Return the plan of the first text that finds an adapter. The previous turn's adapter is preferred.

        Without one, a turn that refers back gets the plan of the turn that it means. Raises: as `plan_all`.
        """
        if routed.is_housekeeping:
            _, fallback_base = self._fallback(model, options)
            return Planned(self._base_plan(fallback_base or model), abstained=True, reason="housekeeping")
        earlier = await self._earlier_turn(routed.previous, model, options, tenant, usage)
        preferred = None if earlier is None else earlier[1]
        refers_back = False
        for text in routed.texts if earlier is not None else routed.texts[:-1]:
            tried = replace(
                self._request_of(text, model, options, tenant, preferred), fallback="base", counted="if_chosen"
            )
            [route] = await self._find_routes([tried], usage)
            if not route.abstained:
                return Planned.from_route(tried, route)
            refers_back = refers_back or route.refers_back
        text = earlier[0] if earlier is not None and refers_back else routed.texts[-1]
        [planned] = await self._route([self._request_of(text, model, options, tenant, preferred)], usage)
        return planned

    async def _earlier_turn(
        self, turns: Sequence[Sequence[str]], model: str, options: LoraOptions, tenant: str, usage: TokenUsage
    ) -> tuple[str, AdapterRef] | None:
        """Return the text and the best adapter of the previous turn, or of the turn that it refers to, or None.

        `turns`: the texts to try for each earlier turn, the newest turn first. The turns before the previous one are
        read only where they decide which of several adapters answered it, because reading a text is dear.
        """
        for place, texts in enumerate(turns):
            refers_back = False
            for text in texts:
                request = self._request_of(text, model, options, tenant)
                top_k = max(request.top_k, STICKY_PLACES)
                tried = replace(request, top_k=top_k, fallback="base", shows_samples=False, counted="never")
                [route] = await self._find_routes([tried], usage)
                if not route.abstained:
                    fitting = [candidate for candidate in route.candidates if candidate.fits]
                    if may_be_led(fitting):
                        before = await self._earlier_turn(turns[place + 1 :], model, options, tenant, usage)
                        fitting = led_by(None if before is None else before[1], fitting)
                    return text, fitting[0].ref
                refers_back = refers_back or route.refers_back
            if not refers_back:
                return None
        return None

    async def _plan_texts(
        self, texts: Sequence[str], options: LoraOptions, tenant: str, model: str, usage: TokenUsage
    ) -> Sequence[Planned]:
        """Return a plan for each text: the plan sent back, a plan of the named adapters, or the Retriever's choice.

        Raises: RequestInvalid, AdapterNotFound, PlanInvalid, PlanGone, StaleIndex, EncoderBusy; NoAdapterMatched,
        where the fallback is `error`.
        """
        if options.plan is not None:
            replayed = await self._replayed(options, options.plan, model, tenant)
            self._check_base(replayed.plan, model)
            return [replayed] * len(texts)
        if options.adapters is not None:
            _refuse_retrieval(options)
            plan = await self._named(options, tenant)
            self._check_base(plan, model)
            return [Planned(plan)] * len(texts)
        requests = [self._request_of(text, model, options, tenant) for text in texts]
        return await self._route(requests, usage)

    async def _route(self, requests: Sequence[RouteRequest], usage: TokenUsage) -> list[Planned]:
        """Return the Retriever's choices as plans with their reasons."""
        routes = await self._find_routes(requests, usage)
        return [Planned.from_route(request, route) for request, route in zip(requests, routes, strict=True)]

    async def _find_routes(self, requests: Sequence[RouteRequest], usage: TokenUsage) -> list[Route]:
        with reading(usage):
            return await self._retriever.route(requests)

    def _request_of(
        self, text: str, model: str, options: LoraOptions, tenant: str, preferred: AdapterRef | None = None
    ) -> RouteRequest:
        defaults = self.defaults
        strategy = options.strategy or defaults.strategy
        try:
            chosen = STRATEGIES[strategy].read_options(options.strategy_options or {}, defaults.strategy_options)
        except ValueError as exc:
            raise RequestInvalid(f"lora.strategy_options: {exc}", "lora.strategy_options") from exc
        fallback, fallback_base = self._fallback(model, options)
        abstain, min_score = options.abstain, options.min_score
        if abstain is None and min_score is None:
            abstain, min_score = defaults.abstain, defaults.min_score
        return RouteRequest(
            text=read_ends(options.query or text),
            tenant=tenant,
            strategy=strategy,
            top_k=options.k or defaults.k,
            weighting=options.weights or defaults.weights,
            min_score=min_score,
            fallback=fallback,
            fallback_base=fallback_base,
            tags=() if options.filter is None else tuple(options.filter.tags),
            min_generation=options.min_generation,
            preferred=preferred,
            abstain=abstain,
            shows_samples=options.explain,
            options=chosen,
            base_model=self._models.split(model)[0] if self._models.are_several else "",
        )

    def _fallback(self, model: str, options: LoraOptions) -> tuple[Fallback, str]:
        """Return what happens where no adapter fits, and which of several base models answers, "" for the first one.

        Raises: RequestInvalid for the name of a base model that may not answer.
        """
        wanted = options.fallback or self.defaults.fallback
        if wanted == "error":
            return "error", ""
        if wanted == "base":
            return "base", ""
        only, _ = self._models.split(model)
        names = [only] if only else [served.name for served in self._models]
        if wanted not in names:
            allowed = ", ".join(map(repr, ("base", "error", *names)))
            raise RequestInvalid(f"lora.fallback: must be one of {allowed}, got {wanted!r}", "lora.fallback")
        return "base", wanted if self._models.are_several else ""

    async def _replayed(self, options: LoraOptions, given: PlanGiven, model: str, tenant: str) -> Planned:
        """Return the plan that the client sends back. Nothing is retrieved, and no default applies."""
        _refuse_retrieval(options)
        for field in ("strategy", "adapters"):
            if getattr(options, field) is not None:
                raise RequestInvalid(
                    f"lora.{field} cannot be combined with lora.plan, which sets it already", f"lora.{field}"
                )
        pinned = [row.pinned() for row in given.adapters]
        plan = await self._retriever.replay(tenant, given.strategy, pinned, given.generation, options.min_generation)
        base_model = plan.base_model if plan.adapters else self._base_plan(given.base_model or model).base_model
        answering = base_model or self._models.first.name  # the name that a plan of several base models has
        if given.base_model not in (None, answering):
            raise RequestInvalid(
                f"lora.plan.base_model: this plan has {answering!r}, got {given.base_model!r}", "lora.plan.base_model"
            )
        settled = replace(plan, generation=given.generation, base_model=base_model)
        return Planned(settled, abstained=given.abstained)

    async def _named(self, options: LoraOptions, tenant: str) -> Plan:
        assert options.adapters is not None
        choices = [(choice.name, choice.weight) for choice in options.adapters]
        strategy: Strategy = options.strategy or ("selection" if len(choices) == 1 else self.defaults.strategy)
        return await self._retriever.plan_named(tenant, choices, strategy, options.min_generation)

    def _model_name(self, model: str) -> str | None:
        """Return `auto`, an adapter's name, or None for the base model alone. Raises: ModelNotFound."""
        base_model, name = self._models.split(model)
        if base_model:
            return name or None
        if ":" in model:
            raise ModelNotFound(model)
        return model


def _strategy_of_one(options: LoraOptions) -> Strategy:
    """Return the strategy for the adapter that `model` names."""
    return options.strategy or "selection"


def _is_routed(options: LoraOptions) -> bool:
    """Return whether a conversation's own text finds its adapters: the options neither name them nor give a text."""
    return options.query is None and options.plan is None and options.adapters is None


def _refuse_retrieval(options: LoraOptions) -> None:
    """Reject options that only retrieval reads. Raises: RequestInvalid."""
    for field in options.of_retrieval:
        message = f"lora.{field} applies to retrieval only; this request names its adapters"
        raise RequestInvalid(message, f"lora.{field}")
