"""Translate a row's sampling parameters to vLLM's, and vLLM's log probabilities back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS, RequestOutputKind, StructuredOutputsParams

from gpu_worker.errors import SamplingInvalid
from gpu_worker.front.grammar.library import lark_of_calls, with_json_options
from gpu_worker.front.logprobs import Scored
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.row import Row
from gpu_worker.model.eager_check import DECODE_STEPS

_CHECKED_IDS = 20  # the most likely ids after a token, as many as vLLM returns
_HIGHEST_TEMPERATURE = 2.0  # that vLLM accepts
_LOWEST_TEMPERATURE = 0.01  # that vLLM draws with: it raises a lower one to this, with a warning for each request


class RowParams(SamplingParams):  # type: ignore[misc]
    """The parameters of a row, whose end ids are all in `stop_token_ids`."""

    def update_from_generation_config(
        self, generation_config: Mapping[str, Any], eos_token_id: int | None = None
    ) -> None:
        """Add no end id of the model. `min_tokens` would forbid it even if the row ignores it."""


def sampling_params(row: Row, vocab_size: int) -> RowParams:
    """Return vLLM's parameters. Text and stop strings are the front end's: vLLM sees token ids only.

    Raises: SamplingInvalid.
    """
    given = row.sampling
    if given.temperature > _HIGHEST_TEMPERATURE:
        limit = f"temperature must be between 0 and {_HIGHEST_TEMPERATURE:g} with the engine 'vllm'"
        raise SamplingInvalid(f"{limit}, got {given.temperature:g}", "temperature")
    return RowParams(
        max_tokens=max(row.max_new_tokens, 1),  # vLLM computes one for a row without new tokens
        min_tokens=given.min_tokens,
        temperature=given.temperature if given.temperature >= _LOWEST_TEMPERATURE else 0,
        top_p=given.top_p,
        top_k=min(given.top_k, vocab_size),
        min_p=given.min_p,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        repetition_penalty=given.repetition_penalty,
        logit_bias=dict(given.logit_bias) or None,
        logprobs=given.logprobs,
        prompt_logprobs=given.prompt_logprobs,
        logprob_token_ids=probed_ids(vocab_size) if row.capture_first_logits else None,
        seed=given.seed,
        stop_token_ids=sorted(row.end_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if given.grammar is None else structured_outputs(given.grammar),
        skip_clone=True,
    )


def check_params(*, scores_prompt: bool) -> SamplingParams:
    """Return the parameters of a prompt of the check at start."""
    return SamplingParams(
        max_tokens=DECODE_STEPS,
        temperature=0,
        logprobs=_CHECKED_IDS,
        prompt_logprobs=_CHECKED_IDS if scores_prompt else None,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def structured_outputs(grammar: Grammar) -> StructuredOutputsParams:
    """Return the grammar in vLLM's words. vLLM compiles it with the same library, but for the limits."""
    match grammar.kind:
        case "json_schema":
            return StructuredOutputsParams(json=with_json_options(grammar.text))
        case "regex":
            return StructuredOutputsParams(regex=grammar.text)
        case "choice":
            return StructuredOutputsParams(choice=json.loads(grammar.text))
        case "grammar":
            return StructuredOutputsParams(grammar=grammar.text)
        case "tool_calls":
            return StructuredOutputsParams(grammar=lark_of_calls(grammar.text))


def scored(token: int, found: Mapping[int, Any], num_top: int) -> Scored:
    """Return the token's log probability and the `num_top` most likely ids, best first. `found`: by token id."""
    ranked = sorted((entry.rank, token_id) for token_id, entry in found.items())
    top = [token_id for rank, token_id in ranked if rank <= num_top][:num_top]
    return Scored.of(found[token].logprob, top, [found[token_id].logprob for token_id in top])


def prompt_scores(row: Row, found: Sequence[Mapping[int, Any] | None]) -> list[Scored | None]:
    """Return the score of each token of the prompt after the first one; None for one that is not a number."""
    num_top = row.sampling.prompt_logprobs or 0
    scores: list[Scored | None] = []
    for token, entries in zip(row.tokens[1 : row.num_prompt_tokens], found[1:], strict=True):
        assert entries is not None, "only the first token has no log probability"
        is_number = not math.isnan(entries[token].logprob)
        scores.append(replace(scored(token, entries, num_top), rank=entries[token].rank) if is_number else None)
    return scores


def probed_ids(vocab_size: int) -> list[int]:
    """Return the ids whose log probabilities a probe compares: spread evenly over the vocabulary."""
    count = min(vocab_size, MAX_LOGPROB_TOKEN_IDS)
    return [place * vocab_size // count for place in range(count)]
