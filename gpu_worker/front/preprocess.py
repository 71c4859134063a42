"""Convert a job to a row of the engine: render, tokenize and validate it."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

from tokenizers import Tokenizer

from gpu_worker.config import ToolParser, WorkerConfig
from gpu_worker.errors import GrammarInvalid, PromptInvalid, PromptTooLong, SamplingInvalid
from gpu_worker.front.grammar.compiler import GrammarCompiler
from gpu_worker.front.grammar.library import make_vocabulary
from gpu_worker.front.grammar.state import GrammarState
from gpu_worker.front.grammar.tool_grammar import tool_grammar
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompt_memo import PromptMemo
from gpu_worker.front.request.prompts import Message, resolve_template, template_stops
from gpu_worker.front.request.request import MAX_CHARS_PER_TOKEN, Job, Prompt, SamplingParams, TokenIds, Tokenized
from gpu_worker.front.request.tool_parser import ToolCallParser
from gpu_worker.front.request.tool_prompts import choose_style, find_style, render_conversation
from gpu_worker.front.request.tools import Tools, ToolStyle
from gpu_worker.front.row import Row, Sink
from gpu_worker.front.text.decode_stream import text_offsets
from gpu_worker.front.text.incremental_detokenizer import IncrementalDetokenizer
from gpu_worker.front.text.token_bytes import TokenBytes, marker_tokens

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Clock = Callable[[], float]


class PromptModel(Protocol):
    """The properties of a base model that prompts depend on."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def backend_tokenizer(self) -> Tokenizer: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_embeddings(self) -> int: ...
    @property
    def sampling_defaults(self) -> Mapping[str, float]: ...


class RequestPreprocessor:
    """The thread-safe preprocessor of an engine. `clock`: the engine's clock, which deadlines refer to.

    `max_new_tokens`: of jobs whose client set no `max_tokens`; None: what the context has left. Without `grammars`,
    jobs with structured output are refused. `tool_parser`: the form of tool calls with the chat template, `auto`
    for the one that it shows.
    """

    def __init__(
        self,
        base: PromptModel,
        max_len: int,
        clock: Clock = time.monotonic,
        *,
        grammars: GrammarCompiler | None = None,
        tool_parser: ToolParser = "auto",
        max_new_tokens: int | None = None,
    ) -> None:
        self._base, self._max_len, self._clock = base, max_len, clock
        self._grammars = grammars
        self._max_unasked = max_len if max_new_tokens is None else max_new_tokens
        self._tool_style = find_style(base.tokenizer, tool_parser)
        self._visible = visible_tokens(base, self._tool_style)
        self._token_bytes = TokenBytes(base.backend_tokenizer)
        self._memo = PromptMemo()
        self._num_embeddings = base.num_embeddings

    @classmethod
    def of(
        cls,
        config: WorkerConfig,
        base: PromptModel,
        max_len: int,
        grammars: GrammarCompiler,
        clock: Clock = time.monotonic,
    ) -> Self:
        """Return the preprocessor of an engine with these settings."""
        return cls(
            base,
            max_len,
            clock,
            grammars=grammars,
            tool_parser=config.tool_parser,
            max_new_tokens=config.max_new_tokens,
        )

    def __call__(
        self, job: Job, sink: Sink, *, capture_first_logits: bool = False, arrived: float | None = None
    ) -> Row:
        """Render and tokenize the job's prompt. `arrived`: arrival time by the engine's clock; None: now.

        Waits for the compiler if the job has a new grammar.
        Raises: PromptInvalid, PromptTooLong, SamplingInvalid, GrammarInvalid, EngineFull.
        """
        arrived = self._clock() if arrived is None else arrived
        job = replace(job, sampling=job.sampling.with_defaults(self._base.sampling_defaults))
        self._require_ids("logit_bias", [token_id for token_id, _ in job.sampling.logit_bias])
        tokens = list(self._tokens(job) if isinstance(job.prompt, TokenIds) else self._memo.tokens(job, self._tokens))
        row = self.of_tokens(job, tokens, sink, capture_first_logits=capture_first_logits)
        row.deadline = math.inf if job.time_left_s is None else arrived + job.time_left_s
        return row

    def begin_prompt(self, job: Job) -> Future[Any] | None:
        """Tokenize the job's prompt for its row. If another row does so now, return the future of its end.

        Raises: PromptInvalid, PromptTooLong.
        """
        if isinstance(job.prompt, TokenIds):
            return None
        begun = self._memo.begin(job, self._tokens)
        return None if begun.done() else begun

    def of_tokens(self, job: Job, tokens: list[int], sink: Sink, *, capture_first_logits: bool = False) -> Row:
        """Make a row with these tokens instead of the job's prompt.

        Raises: PromptTooLong, SamplingInvalid, GrammarInvalid, EngineFull.
        """
        max_new_tokens = self._max_new_tokens(len(tokens), job.sampling)
        if job.sampling.min_tokens > max_new_tokens:
            message = f"min_tokens must be at most the {max_new_tokens} new tokens that fit the context"
            raise SamplingInvalid(f"{message}, got {job.sampling.min_tokens}", "min_tokens")
        grammar = self.grammar_of(job)
        is_raw = not isinstance(job.prompt, tuple)
        has_own_end = is_raw or grammar is not None  # a stop must not cut the grammar's text
        own_stops = () if has_own_end else template_stops(job.template, self._base.tokenizer)
        reports_prompt = job.sampling.prompt_logprobs is not None
        return Row(
            request_id=job.request_id,
            plan=job.plan,
            sampling=job.sampling if job.tools is None else replace(job.sampling, grammar=grammar),
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            max_new_tokens=max_new_tokens,
            end_ids=self._end_ids(job),
            seed=secrets.randbits(63) if job.sampling.seed is None else job.sampling.seed,
            detokenizer=IncrementalDetokenizer(
                self._base.backend_tokenizer, job.sampling.stop + own_stops, tokens, self._visible
            ),
            sink=sink,
            token_bytes=self._token_bytes,
            grammar=None if grammar is None else self._grammar_state(grammar, job.tenant, tokens),
            tool_calls=None if job.tools is None else self._tool_parser(job, job.tools, grammar),
            capture_first_logits=capture_first_logits,
            tenant=job.tenant,
            prompt_offsets=text_offsets(self._base.backend_tokenizer, tokens) if reports_prompt else (),
            skips_prefix_cache=reports_prompt,
        )

    async def compile_grammar(self, job: Job) -> None:
        """Wait for the compiler without a thread if the job has a new grammar. Raises: GrammarInvalid, EngineFull."""
        grammar = self.grammar_of(job)
        if grammar is not None and self._grammars is not None:
            await self._grammars.compile(grammar, job.tenant)

    def grammar_of(self, job: Job) -> Grammar | None:
        """Return the grammar that the job's answer follows. Raises: GrammarInvalid, SamplingInvalid."""
        if job.tools is None:
            return job.sampling.grammar
        return tool_grammar(job.tools, self._choose_style(job).form, job.sampling.grammar)

    def _choose_style(self, job: Job) -> ToolStyle:
        return choose_style(job.template, self._base.tokenizer, self._tool_style)

    def _tool_parser(self, job: Job, tools: Tools, grammar: Grammar | None) -> ToolCallParser:
        style, names = self._choose_style(job), {function.name for function in tools.functions}
        return ToolCallParser(style.form, names, is_constrained=grammar is not None, max_calls=style.max_calls(tools))

    def tokenize(
        self,
        prompt: Prompt,
        template: str,
        *,
        add_special_tokens: bool | None = None,
        with_texts: bool = False,
        tools: Tools | None = None,
    ) -> Tokenized:
        """Return the tokens of a prompt, which may exceed the context; `with_texts`: also the text of each.

        `add_special_tokens`: None for what a job with this prompt does. Raises: PromptInvalid.
        """
        ids = self._ids(prompt, template, tools, add_special_tokens)
        read = ids if with_texts else ()
        texts = tuple(self._token_bytes(token_id).decode(errors="replace") for token_id in read)
        return Tokenized(tuple(ids), texts, self._max_len)

    def detokenize(self, prompts: Sequence[TokenIds], *, skip_special_tokens: bool) -> list[str]:
        """Return the text of each prompt. Raises: PromptInvalid for an id outside the vocabulary."""
        for prompt in prompts:
            self._require_known(prompt.ids)
        decode = self._base.backend_tokenizer.decode_batch  # decodes one prompt at a time, on this thread only
        return [decode([prompt.ids], skip_special_tokens=skip_special_tokens)[0] for prompt in prompts]

    def _grammar_state(self, grammar: Grammar, tenant: str, tokens: list[int]) -> GrammarState:
        if self._grammars is None:
            raise SamplingInvalid(f"{grammar.param}: this engine has no structured output; remove it", grammar.param)
        return self._grammars.state(grammar, tenant, tokens, len(tokens), self._base.vocab_size)

    def _tokens(self, job: Job) -> Sequence[int]:
        tokens = self._ids(job.prompt, job.template, job.tools)
        if not tokens:
            raise PromptInvalid("the prompt has no tokens; send a prompt that is not empty")
        if len(tokens) >= self._max_len:  # no room for an answer; the ids are not cached
            raise _too_long(len(tokens), None, self._max_len)
        self._require_embedded(tokens)
        return tokens

    def _ids(
        self, prompt: Prompt, template: str, tools: Tools | None = None, add_special_tokens: bool | None = None
    ) -> Sequence[int]:
        """Return the token ids of the prompt. Raises: PromptInvalid, PromptTooLong."""
        if isinstance(prompt, TokenIds):
            self._require_known(prompt.ids)
            return prompt.ids
        text = prompt if isinstance(prompt, str) else self._rendered(prompt, template, tools)
        if len(text) > self._max_len * MAX_CHARS_PER_TOKEN:
            raise PromptTooLong.of(f"{len(text)} characters", self._max_len)
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise PromptInvalid(
                "the prompt contains an unpaired surrogate, which is not valid Unicode; remove it"
            ) from exc
        if add_special_tokens is None:  # a chat template adds its own
            is_raw = isinstance(prompt, str)
            add_special_tokens = is_raw or resolve_template(template, self._base.tokenizer) != "chat"
        # Without offsets, and as a batch: a single text would hold the interpreter's lock until its end.
        [encoded] = self._base.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        tokens: list[int] = encoded.ids
        return tokens

    def _rendered(self, messages: Sequence[Message], template: str, tools: Tools | None) -> str:
        return render_conversation(messages, template, self._base.tokenizer, self._tool_style, tools)

    def _require_known(self, ids: Sequence[int]) -> None:
        """Refuse ids that are not in the vocabulary. Raises: PromptInvalid."""
        size = min(self._base.vocab_size, self._base.num_embeddings)
        unknown = next((token_id for token_id in ids if not 0 <= token_id < size), None)
        if unknown is not None:
            raise PromptInvalid(f"the prompt has the token id {unknown}; this model has ids from 0 to {size - 1}")

    def _require_embedded(self, tokens: Sequence[int]) -> None:
        """Refuse ids outside the embedding: tokenizers of text-only models may have image tokens."""
        largest = max(tokens)
        if largest >= self._num_embeddings:
            token = self._base.tokenizer.convert_ids_to_tokens(largest)
            raise PromptInvalid(
                f"the prompt contains the token {token!r} (id {largest}), which this model does not support (ids 0 to"
                f" {self._num_embeddings - 1}); remove it"
            )

    def _max_new_tokens(self, num_prompt_tokens: int, sampling: SamplingParams) -> int:
        room = self._max_len - num_prompt_tokens
        asked = None if sampling.max_tokens_is_default else sampling.max_tokens
        if room < 1 or (asked is not None and asked > room):
            raise _too_long(num_prompt_tokens, asked, self._max_len)
        if asked is not None:
            return asked
        most = min(room, self._max_unasked)
        return most if sampling.max_tokens is None else min(most, sampling.max_tokens)

    def _end_ids(self, job: Job) -> frozenset[int]:
        ids = frozenset(job.sampling.stop_token_ids)
        self._require_ids("stop_token_ids", ids)
        return ids if job.sampling.ignore_eos else ids | self._base.eos_token_ids

    def _require_ids(self, name: str, ids: Collection[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self._base.vocab_size:
                raise SamplingInvalid(
                    f"{name} must have ids from 0 to {self._base.vocab_size - 1}, got {token_id}", name
                )


def visible_tokens(base: PromptModel, style: ToolStyle) -> Mapping[int, str]:
    """Return the special tokens that have a text, by id: the markers of calls in the chat template's form."""
    if not style.is_native:
        return {}
    added = base.backend_tokenizer.get_added_tokens_decoder()
    return {i: token.content for i, token in added.items() if token.special and token.content in style.form.special}


def grammar_compiler(base: PromptModel, tool_parser: ToolParser = "auto") -> GrammarCompiler:
    """Return a compiler for the base model's vocabulary. `tool_parser`: as of `RequestPreprocessor`."""
    return GrammarCompiler(partial(_make_vocabulary, base, tool_parser))


def _make_vocabulary(base: PromptModel, tool_parser: ToolParser) -> LLTokenizer:
    special = special_ids(base, tool_parser)
    return make_model_vocabulary(base.backend_tokenizer, base.vocab_size, base.eos_token_ids, special)


def special_ids(base: PromptModel, tool_parser: ToolParser) -> list[int]:
    """Return the ids that are never text in a grammar: markers, except for those of calls."""
    tokenizer = base.backend_tokenizer
    style = find_style(base.tokenizer, tool_parser)
    visible = visible_tokens(base, style)
    flagged = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return [
        token_id
        for token_id, marker in marker_tokens(tokenizer).items()
        if (token_id not in visible if token_id in flagged else marker not in style.form.special)
    ]


def make_model_vocabulary(
    tokenizer: Tokenizer, size: int, end_ids: Collection[int], special_ids: Collection[int]
) -> LLTokenizer:
    """Return the model's vocabulary for grammars. Raises: GrammarInvalid if no id ends an answer."""
    if not end_ids:
        raise GrammarInvalid("this base model has no token that ends an answer, so no format can be followed")

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return make_vocabulary(TokenBytes(tokenizer), size, end_ids, special_ids, tokenize)


def _too_long(num_prompt_tokens: int, num_new_tokens: int | None, max_len: int) -> PromptTooLong:
    if num_prompt_tokens < max_len:
        return PromptTooLong.of(f"{num_prompt_tokens} tokens", max_len, num_new_tokens)
    left = ", which leave no room for an answer" if num_prompt_tokens == max_len else ""
    return PromptTooLong.of(f"{num_prompt_tokens} tokens{left}", max_len)
