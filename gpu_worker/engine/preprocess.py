"""Convert a job to a row of the engine: render, tokenize and validate it."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Tokenizer

from gpu_worker.config import ToolParser
from gpu_worker.engine.row import Row, Sink
from gpu_worker.errors import PromptInvalid, PromptTooLong, SamplingInvalid
from gpu_worker.grammar.compiler import GrammarCompiler
from gpu_worker.grammar.library import make_vocabulary
from gpu_worker.grammar.state import GrammarState
from gpu_worker.grammar.tool_grammar import tool_grammar
from gpu_worker.request.grammar import Grammar
from gpu_worker.request.prompt_memo import PromptMemo
from gpu_worker.request.prompts import Message, resolve_template, template_stops
from gpu_worker.request.request import DEFAULT_MAX_TOKENS, MAX_CHARS_PER_TOKEN, Job
from gpu_worker.request.tool_parser import ToolCallParser
from gpu_worker.request.tool_prompts import find_style, render_conversation, style_of
from gpu_worker.request.tools import Tools, ToolStyle
from gpu_worker.text.incremental_detokenizer import IncrementalDetokenizer
from gpu_worker.text.token_bytes import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLTokenizer


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


class RequestPreprocessor:
    """The thread-safe preprocessor of an engine. `clock`: the engine's clock, which deadlines refer to.

    Without `grammars`, jobs with structured output are refused. `tool_parser`: the form of tool calls with the
    chat template, `auto` for the one that it shows.
    """

    def __init__(
        self,
        base: PromptModel,
        max_len: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        grammars: GrammarCompiler | None = None,
        tool_parser: ToolParser = "auto",
    ) -> None:
        self._base, self._max_len, self._clock = base, max_len, clock
        self._grammars = grammars
        self._tool_style = find_style(base.tokenizer, tool_parser)
        self._visible = visible_tokens(base, self._tool_style)
        self._token_bytes = TokenBytes(base.backend_tokenizer)
        self._memo = PromptMemo()
        self._num_embeddings = base.num_embeddings

    def __call__(
        self, job: Job, sink: Sink, *, capture_first_logits: bool = False, arrived: float | None = None
    ) -> Row:
        """Render and tokenize the job's prompt. `arrived`: arrival time by the engine's clock; None: now.

        Waits for the compiler if the job has a new grammar.
        Raises: PromptInvalid, PromptTooLong, SamplingInvalid, GrammarInvalid, EngineFull.
        """
        arrived = self._clock() if arrived is None else arrived
        self._require_ids("logit_bias", [token_id for token_id, _ in job.sampling.logit_bias])
        tokens = list(self._memo.tokens(job, self._tokens))
        row = self.of_tokens(job, tokens, sink, capture_first_logits=capture_first_logits)
        row.deadline = math.inf if job.time_left_s is None else arrived + job.time_left_s
        return row

    def of_tokens(self, job: Job, tokens: list[int], sink: Sink, *, capture_first_logits: bool = False) -> Row:
        """Make a row with these tokens instead of the job's prompt.

        Raises: PromptTooLong, SamplingInvalid, GrammarInvalid, EngineFull.
        """
        max_new_tokens = self._max_new_tokens(len(tokens), job.sampling.max_tokens)
        grammar = self.grammar_of(job)
        has_own_end = isinstance(job.prompt, str) or grammar is not None  # a stop must not cut the grammar's text
        own_stops = () if has_own_end else template_stops(job.template, self._base.tokenizer)
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
        )

    def grammar_of(self, job: Job) -> Grammar | None:
        """Return the grammar that the job's answer follows. Raises: GrammarInvalid, SamplingInvalid."""
        if job.tools is None:
            return job.sampling.grammar
        return tool_grammar(job.tools, self._style_of(job).form, job.sampling.grammar)

    def _style_of(self, job: Job) -> ToolStyle:
        return style_of(job.template, self._base.tokenizer, self._tool_style)

    def _tool_parser(self, job: Job, tools: Tools, grammar: Grammar | None) -> ToolCallParser:
        style, names = self._style_of(job), {function.name for function in tools.functions}
        return ToolCallParser(style.form, names, is_constrained=grammar is not None, max_calls=style.max_calls(tools))

    def _grammar_state(self, grammar: Grammar, tenant: str, tokens: list[int]) -> GrammarState:
        if self._grammars is None:
            raise SamplingInvalid(f"{grammar.param}: this engine has no structured output; remove it", grammar.param)
        return self._grammars.state(grammar, tenant, tokens, len(tokens), self._base.vocab_size)

    def _tokens(self, job: Job) -> Sequence[int]:
        is_raw = isinstance(job.prompt, str)
        text = job.prompt if isinstance(job.prompt, str) else self._rendered(job, job.prompt)
        if len(text) > self._max_len * MAX_CHARS_PER_TOKEN:
            raise PromptTooLong(
                f"a prompt of {len(text)} characters exceeds the context of {self._max_len} tokens; shorten it"
            )
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise PromptInvalid(
                "the prompt contains an unpaired surrogate, which is not valid Unicode; remove it"
            ) from exc
        # a chat template adds its own
        with_bos = is_raw or resolve_template(job.template, self._base.tokenizer) != "chat"
        tokens: list[int] = self._base.tokenizer(text, add_special_tokens=with_bos).input_ids
        if not tokens:
            raise PromptInvalid("the prompt has no tokens; send a prompt that is not empty")
        if len(tokens) >= self._max_len:  # no room for an answer; the ids are not cached
            raise PromptTooLong(_too_long(len(tokens), None, self._max_len))
        self._require_embedded(tokens)
        return tokens

    def _rendered(self, job: Job, messages: Sequence[Message]) -> str:
        return render_conversation(messages, job.template, self._base.tokenizer, self._tool_style, job.tools)

    def _require_embedded(self, tokens: Sequence[int]) -> None:
        """Refuse ids outside the embedding: tokenizers of text-only models may have image tokens."""
        largest = max(tokens)
        if largest >= self._num_embeddings:
            token = self._base.tokenizer.convert_ids_to_tokens(largest)
            raise PromptInvalid(
                f"the prompt contains the token {token!r} (id {largest}), which this model does not support (ids 0 to"
                f" {self._num_embeddings - 1}); remove it"
            )

    def _max_new_tokens(self, num_prompt_tokens: int, wanted: int | None) -> int:
        room = self._max_len - num_prompt_tokens
        if room < 1 or (wanted is not None and wanted > room):
            raise PromptTooLong(_too_long(num_prompt_tokens, wanted, self._max_len))
        return min(room, DEFAULT_MAX_TOKENS) if wanted is None else wanted

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
    return GrammarCompiler(partial(_vocabulary_of, base, tool_parser))


def _vocabulary_of(base: PromptModel, tool_parser: ToolParser) -> LLTokenizer:
    """Return the base model's vocabulary for grammars.

    Tokens that the tokenizer calls special are never text, except for the markers of calls.
    """
    tokenizer = base.backend_tokenizer
    visible = visible_tokens(base, find_style(base.tokenizer, tool_parser))
    added = tokenizer.get_added_tokens_decoder().items()
    special = [i for i, token in added if token.special and i not in visible]

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return make_vocabulary(TokenBytes(tokenizer), base.vocab_size, base.eos_token_ids, special, tokenize)


def _too_long(num_prompt_tokens: int, num_new_tokens: int | None, max_len: int) -> str:
    new = "" if num_new_tokens is None else f" plus max_tokens {num_new_tokens}"
    return (
        f"{num_prompt_tokens} prompt tokens{new} exceed the context of {max_len} tokens; shorten the prompt or lower"
        " max_tokens"
    )
