"""Answer requests: plan, start one row for each choice, and stream or collect the deltas of all rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from deployments.api.anthropic_request import CountTokensRequest
from deployments.api.base import LoraOptions, TolerantRequest, ignored_fields, refuse_ignored
from deployments.api.completion_responses import Answer, ChatAnswer, TextAnswer
from deployments.api.completions import CompletionRequest, GenerationRequest, Question
from deployments.api.contract import applied_contract
from deployments.api.names import AppliedPolicy
from deployments.api.responses import Planned
from deployments.api.tokens import DetokenizeRequest, TokenizeRequest
from deployments.auth.authenticator import Authenticator, Caller, TokenUsage, Work
from deployments.calls.worker_client import Workers
from deployments.config.served_model import ServedModels
from deployments.generation.notes import PromptNotes
from deployments.generation.planner import (
    AUTO,
    Planner,
    asked_logprobs,
    check_logprobs,
    check_tokenized,
    prompt_tokens,
)
from deployments.generation.row_stream import NO_ROOM, RowStream, compute_deadline, merge, within
from deployments.generation.shadows import Shadows
from deployments.json_types import JsonObject
from deployments.observability.request_context import RequestContext
from deployments.observability.usage import UsageLog
from gpu_worker.front.request.request import Completion, Delta, Job, SamplingParams, TokenIds, Tokenized
from lora_store import BASE_PLAN

_ONLY = "0"  # the answer of a request that generates none
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that no two choices share a seed
_SEEDS = 2**63


@contextmanager
def charged(usage: TokenUsage, num_tokens: int) -> Iterator[None]:
    """Charge this many tokens for the block, whatever its outcome, unless the server refuses it before any work."""
    usage.sent(_ONLY, 0, num_tokens)
    try:
        yield
    except NO_ROOM:
        usage.not_started(_ONLY)
        raise


def make_jobs(
    request_id: str,
    tenant: str,
    sampling: SamplingParams,
    questions: Sequence[Question],
    plans: Sequence[Planned],
    templates: Sequence[str],
    num_choices: int = 1,
) -> list[Job]:
    """Return one job per choice of each question, in order. `templates`: of each one's base model, by default."""
    jobs: list[Job] = []
    for question, planned, template in zip(questions, plans, templates, strict=True):
        for choice in range(num_choices):
            own = sampling if sampling.seed is None else replace(sampling, seed=derive_seed(sampling.seed, choice))
            name = request_id if not jobs else f"{request_id}-{len(jobs)}"
            chosen, plan, prompt = planned.plan.template or template, planned.plan, question.prompt
            if planned.contract is not None:
                own, prompt = planned.contract.sampling(own), planned.contract.prompt(prompt)
            plan = plan if plan.contract is None else replace(plan, contract=None)  # an engine does not read it
            jobs.append(Job(name, prompt, plan, own, chosen, tenant, tools=question.tools))
    return jobs


def derive_seed(seed: int, choice: int) -> int:
    """Return the seed of a prompt's `choice`. The first gets the client's own, as if it had been requested alone."""
    return (seed + choice * _SEED_STEP) % _SEEDS


@dataclass(frozen=True, slots=True)
class StartedCompletion:
    """A planned request, with the fields that it got from the policy of a model name.

    `sampling_defaults`: those of the base model that answers, of the server, and of the contract that applies.
    Closing `held` releases its reservations against the limits of its key.
    """

    request: GenerationRequest
    sampling_defaults: Mapping[str, float]
    answer: Answer
    rows: Sequence[RowStream]
    held: ExitStack


class CompletionService:
    """Plans requests and streams their rows. It serves the HTTP routes and calls through a Ray handle alike."""

    def __init__(
        self,
        models: ServedModels,
        authenticator: Authenticator,
        planner: Planner,
        workers: Workers,
        grace_s: float,
        shadows: Shadows,
        notes: PromptNotes,
        usage_log: UsageLog,
        *,
        is_strict: bool,
    ) -> None:
        """`is_strict`: refuse unknown fields instead of ignoring them."""
        self._models, self._authenticator, self._planner, self._is_strict = models, authenticator, planner, is_strict
        self._workers, self._grace_s, self._shadows = workers, grace_s, shadows
        self._notes, self._usage_log = notes, usage_log
        self.sampling_defaults: Mapping[str, float] = {}  # before those of the base model; may be replaced at any time

    async def start(self, request: GenerationRequest, caller: Caller, context: RequestContext) -> StartedCompletion:
        """Check and plan the request. Its answer must be collected or streamed afterwards."""
        self._note_ignored(request, context)
        context.model, context.num_choices = request.model, request.n
        deadline = compute_deadline(context.arrived_at, request.timeout_s, self._models.first.max_request_s)
        async with within(deadline):
            request, sampling, questions, bound = await self._planner.apply_policy(request, caller.tenant)
            if not request.stream:
                check_logprobs(request, asked_logprobs(request, sampling, questions))
            with ExitStack() as stack:
                work = self._planner.measure_work(request, sampling, questions)
                usage = stack.enter_context(self._authenticator.running(caller, work))
                ids = [question for question in questions if isinstance(question.prompt, TokenIds)]
                for question in ids:
                    if question.lora.names_adapters is None:
                        self._planner.require_base(question.model)
                if any(map(self._planner.needs_routing, ids)):
                    bases = [self._models.limiting(question.model).name for question in questions]
                    questions = await self._with_texts(questions, bases, caller.tenant)
                plans = await self._planner.plan_all(questions, caller.tenant, context, usage)
                if isinstance(request, CompletionRequest) and request.echo:
                    bases = [planned.plan.base_model for planned in plans]
                    questions = await self._with_texts(questions, bases, caller.tenant)
                context.record_versions(plans)
                plans = plans if bound is None else bound.explain(plans)
                if any(planned.plan.contract is not None for planned in plans):
                    given = request.set_fields
                    plans = [
                        replace(planned, contract=applied_contract(planned.plan, question, sampling, given))
                        for question, planned in zip(questions, plans, strict=True)
                    ]
                self._notes.note(questions[0], plans[0], caller, context.request_id)
                templates = [self._models.by_name[planned.plan.base_model].template for planned in plans]
                answer = _answer_to(request, questions, plans, caller, context)
                jobs = [
                    replace(job, sampling=job.sampling.with_defaults(self.sampling_defaults))
                    for job in make_jobs(
                        context.request_id, caller.tenant, sampling, questions, plans, templates, request.n
                    )
                ]
                rows = [
                    RowStream(
                        workers=self._workers,
                        job=job,
                        index=index,
                        question=index // request.n,
                        usage=usage,
                        context=context,
                        deadline=deadline,
                        grace_s=self._grace_s,
                    )
                    for index, job in enumerate(jobs)
                ]
                if any(planned.shadow for planned in plans):
                    self._shadows.start(jobs[:: request.n], plans, deadline)
                contract, base_model = plans[0].contract, plans[0].plan.base_model
                own = {} if contract is None else contract.defaults
                defaults = {**self._models.by_name[base_model].sampling_defaults, **self.sampling_defaults, **own}
                return StartedCompletion(request, defaults, answer, rows, stack.pop_all())

    def _note_ignored(self, request: TolerantRequest, context: RequestContext) -> None:
        """Record the unknown fields. Raises: RequestInvalid for the first one, with the setting `strict_fields`."""
        if self._is_strict:
            refuse_ignored(request)
        context.ignored = ignored_fields(request)

    async def count_tokens(self, request: CountTokensRequest, caller: Caller, context: RequestContext) -> int:
        """Return how many tokens a conversation has with its tools, as a chat would render it."""
        self._note_ignored(request, context)
        found = await self._tokenize(request.question(), "messages", caller, context)
        return len(found.ids)

    async def tokenize(self, request: TokenizeRequest, caller: Caller, context: RequestContext) -> Tokenized:
        """Return the tokens of a text, or of a conversation as a chat would render it."""
        self._note_ignored(request, context)
        field = "prompt" if request.messages is None else "messages"
        options = request.add_special_tokens, request.return_token_strs
        return await self._tokenize(request.question(), field, caller, context, *options)

    async def _tokenize(
        self,
        question: Question,
        field: str,
        caller: Caller,
        context: RequestContext,
        add_special_tokens: bool | None = None,
        with_texts: bool = False,
    ) -> Tokenized:
        check_tokenized(question, field, self._models.limiting(question.model))
        async with within(compute_deadline(context.arrived_at, None, self._models.first.max_request_s)):
            question, template = await self._bound(question, caller, context)
            if isinstance(question.prompt, str):
                question = replace(question, text=question.prompt)
            is_planned = self._models.are_several or not (question.model == AUTO and isinstance(question.prompt, str))
            num_read = self._planner.tokens_to_route(question) if is_planned else 0
            num_tokens = prompt_tokens(question.prompt, question.tools)
            work = Work(num_rows=0, num_tokens=num_tokens, num_read=num_read, tokens_field=field)
            with self._authenticator.running(caller, work) as usage:
                planned = Planned(BASE_PLAN)  # for a text no template applies
                if is_planned:
                    [planned] = await self._planner.plan_all([question], caller.tenant, context, usage)
                contract = None if isinstance(question.prompt, str) else applied_contract(planned.plan, question)
                base_model = planned.plan.base_model
                workers = self._workers.named(base_model)
                await workers.ready()
                with charged(usage, work.num_tokens):
                    found = await workers.client.tokenize(
                        caller.tenant,
                        question.prompt if contract is None else contract.prompt(question.prompt),
                        template or planned.plan.template or self._models.by_name[base_model].template,
                        add_special_tokens,
                        with_texts,
                        question.tools,
                    )
                usage.saw(_ONLY, 0, len(found.ids), 0)
                return found

    async def detokenize(self, request: DetokenizeRequest, caller: Caller, context: RequestContext) -> str:
        """Return the text of token ids, with special tokens."""
        self._note_ignored(request, context)
        question = Question(TokenIds(tuple(request.tokens)), "", request.model, LoraOptions())
        async with within(compute_deadline(context.arrived_at, None, self._models.first.max_request_s)):
            question, _ = await self._bound(question, caller, context)
            work = Work(num_rows=0, num_tokens=len(request.tokens), tokens_field="tokens")
            with self._authenticator.running(caller, work) as usage:
                if self._planner.needs_routing(question):
                    self._planner.require_base(question.model)
                    base_model = self._models.limiting(question.model).name
                else:
                    [planned] = await self._planner.plan_all([question], caller.tenant, context, usage)
                    base_model = planned.plan.base_model
                workers = self._workers.named(base_model)
                await workers.ready()
                with charged(usage, work.num_tokens):
                    [text] = await workers.client.detokenize(caller.tenant, [TokenIds(tuple(request.tokens))], False)
                    return text

    async def _bound(self, question: Question, caller: Caller, context: RequestContext) -> tuple[Question, str | None]:
        """Return the question by the policy of its model name, if `model` is one, and the template of that policy.

        Raises: ModelNotFound.
        """
        context.model = question.model
        named = await self._planner.find_policy(question.model, caller.tenant, question.lora.min_generation)
        if named is None:
            return question, None
        bound = AppliedPolicy.of(named, question, caller.tenant)
        return bound.apply_to_question(question), bound.policy.template

    async def collect(self, started: StartedCompletion) -> ChatAnswer | TextAnswer:
        """Return the whole answer. Raises: RequestInvalid, if it has too many log probabilities."""
        counts: dict[int, int] = {}

        def check(index: int, num_logprobs: int) -> None:
            counts[index] = num_logprobs
            check_logprobs(started.request, sum(counts.values()))

        with started.held:
            tasks = [asyncio.create_task(row.collect(check)) for row in started.rows]
            try:
                parts = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        completions = [Completion.joined(deltas) for deltas in parts]
        if not started.answer.has_logprobs:
            return started.answer.whole(completions)
        return await asyncio.to_thread(started.answer.whole, completions)  # which may take more than a second

    async def stream(self, started: StartedCompletion) -> AsyncGenerator[JsonObject]:
        """Yield the chunks: the plans with the first text, text as it arrives, then the usage.

        An error before the first text is raised before anything is yielded.
        """
        lasts: dict[int, Delta] = {}
        with_text: set[int] = set()
        with started.held:
            async with aclosing(merge([row.deltas() for row in started.rows])) as deltas:
                async for index, delta in deltas:
                    if not lasts:
                        yield started.answer.opening()
                    is_first = index not in lasts
                    lasts[index] = delta
                    if delta.text or delta.tool_calls:
                        with_text.add(index)
                    is_empty = delta.finish_reason is not None and index not in with_text
                    chunk = partial(started.answer.chunk, index, delta, is_first=is_first, is_empty=is_empty)
                    yield await asyncio.to_thread(chunk) if delta.prompt else chunk()  # a long prompt takes a second
        self._usage_log.record(started.rows[0].context, 200)  # before the client can take the answer for complete
        options = started.request.stream_options
        if started.request.always_shows_usage or (options is not None and options.include_usage):
            yield started.answer.usage_chunk([lasts[index] for index in range(len(started.rows))])

    async def _with_texts(
        self, questions: Sequence[Question], base_models: Sequence[str], tenant: str
    ) -> Sequence[Question]:
        """Return the questions with the texts of token ids, which are those of each one's base model.

        Raises: PromptInvalid for an id outside the vocabulary; the errors of starting a Worker.
        """
        found = list(questions)
        for base_model in dict.fromkeys(base_models):
            prompts = {
                place: question.prompt
                for place, question in enumerate(questions)
                if question.text is None and base_models[place] == base_model and isinstance(question.prompt, TokenIds)
            }
            if not prompts:
                continue
            workers = self._workers.named(base_model)
            await workers.ready()
            texts = await workers.client.detokenize(tenant, list(prompts.values()), True)
            for place, text in zip(prompts, texts, strict=True):
                found[place] = replace(found[place], text=text)
        return found


def _text_read(question: Question, planned: Planned) -> str:
    """Return the text of a prompt as the model reads it."""
    if planned.contract is None or not isinstance(question.prompt, str):
        return question.text or ""
    return str(planned.contract.prompt(question.prompt))


def _answer_to(
    request: GenerationRequest,
    questions: Sequence[Question],
    plans: Sequence[Planned],
    caller: Caller,
    context: RequestContext,
) -> Answer:
    echo: tuple[str, ...] | None = None
    if isinstance(request, CompletionRequest) and request.echo:
        echo = tuple(map(_text_read, questions, plans))
    return Answer(
        "text" if isinstance(request, CompletionRequest) else "chat",
        request.model,
        plans,
        caller.tenant,
        request.lora.explain,
        num_choices=request.n,
        num_logprobs=request.num_logprobs,
        num_prompt_logprobs=request.prompt_logprobs,
        echo=echo,
        request_id=context.request_id,
        created=int(time.time()),
    )
