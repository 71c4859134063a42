"""Check at start that the packed engine computes the same logits as the model's own code in transformers.

A list of model families is not enough: a new model may attend twice in a layer, carry state from token to token, or
bypass the layers that adapters change. So four short prompts, and a longer one that small windows and positions that
depend on the length show in, are run through the unmodified model with transformers' eager attention, and through the
engine: prompt chunks, decode tokens, several rows at once, with and without an adapter. If the logits differ, the model
is refused. Of integer weights, the model has the numbers that the integers stand for, and rounds inputs as the engine.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gpu_worker.bank.residency import Residency
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.eager_check import (
    ADAPTED,
    ADAPTER_PLAN,
    DECODE_STEPS,
    DIGEST,
    MOST_HALF_SHARE,
    MOST_TOKENS,
    PLAIN,
    RANK,
    TEXTS,
    Difference,
    EagerLogits,
    adding,
    changed_weights,
    check_adapter,
    check_experts,
    check_prompts,
    hooked,
    jittering,
)
from gpu_worker.model.inject import Adaptable
from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.packed_attention import ATTENTION_NAME
from gpu_worker.native.attention.kv_cache import KvCache
from gpu_worker.native.forward import ForwardPass
from lora_store.plan import BASE_PLAN, Plan

logger = logging.getLogger(__name__)


_MOST_LONG_TOKENS = 40  # the longer prompt has all texts up to this


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of the comparison. `expected` (T, V): the eager logits after each token."""

    name: str
    tokens: list[int]
    plan: Plan
    expected: Tensor


class ModelCheck:
    """The check. It computes the eager logits before the engine replaces any module of the model.

    Raises: BaseModelUnsupported if the eager model cannot be run.
    """

    def __init__(self, base: BaseModel, modules: Adaptable, max_len: int, max_rank: int) -> None:
        began = time.perf_counter()
        linears, rank = modules.linears, min(RANK, max_rank)
        self._base, self._mixtures = base, modules.experts | modules.routers
        self._adapter = replace(check_adapter(linears, rank), experts=check_experts(modules.experts, rank))
        self._allowed: dict[str, float] = {}
        self._rounds = [self._round(_prompts(base, TEXTS, min(MOST_TOKENS, max_len)), linears)]
        longer = _prompts(base, [" ".join(TEXTS)], min(_MOST_LONG_TOKENS, max_len))
        if (length := longer.shape[1]) > MOST_TOKENS:
            self._rounds.append(self._round(longer, linears, f", in rows of {length} tokens,"))
        self._differences: defaultdict[tuple[str, str], list[Difference]] = defaultdict(list)
        self._eager_s = time.perf_counter() - began

    def _round(self, prompts: Tensor, linears: Mapping[str, nn.Linear], suffix: str = "") -> list[_Row]:
        """Compute the eager logits of prompts (P, T) and return their rows. `suffix`: of the rows' names."""
        try:
            plain, adapted = self._eager_logits(prompts, linears)
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:
            raise self._unsupported(f"transformers' own model fails on a short prompt ({exc})") from exc
        if not plain.logits.isfinite().all():
            raise self._unsupported("the logits of transformers' own model are not finite")
        if not Difference.of(adapted.logits, plain.logits).beyond.any():
            raise self._unsupported("an adapter on its linear layers does not change its logits")
        names = PLAIN + suffix, ADAPTED + suffix
        self._allowed |= {names[0]: min(plain.allowed, MOST_HALF_SHARE), names[1]: adapted.allowed}
        return _rows(prompts.tolist(), plain.logits, adapted.logits, names)

    @torch.inference_mode()
    def run(self, forward: ForwardPass, residency: Residency, kv_cache: KvCache) -> None:
        """Compare the forward pass with the eager logits. Bank and cache are empty before and after.

        Raises: BaseModelUnsupported with the first difference that exceeds the bound.
        """
        began = time.perf_counter()
        residency.try_pin([DIGEST], {DIGEST: self._adapter})
        residency.settle()
        for waiting in self._rounds:
            while waiting:
                waiting = self._run_some(forward, kv_cache, waiting)
        residency.unpin([DIGEST])
        residency.settle()
        residency.evict(DIGEST)
        self._judge()
        seconds = self._eager_s + time.perf_counter() - began
        logger.info("the engine's logits agree with transformers; the check took %.2f s", seconds)

    @torch.inference_mode()
    def _eager_logits(self, prompts: Tensor, linears: Mapping[str, nn.Linear]) -> tuple[EagerLogits, EagerLogits]:
        """Return the logits (P, T, V) of prompts (P, T), without and with the adapter."""
        positions = torch.arange(prompts.shape[1], device=prompts.device)[None].expand_as(prompts)

        def logits() -> Tensor:
            found: Tensor = self._base.model(input_ids=prompts, position_ids=positions, use_cache=False).logits
            return found

        def with_roundings() -> EagerLogits:
            found = logits()
            if found.dtype == torch.float32:
                return EagerLogits(found, found)
            with hooked(linears, jittering()):
                return EagerLogits(found, logits())

        with _eager(self._base):
            plain = with_roundings()
            with hooked(linears, adding(self._adapter)), changed_weights(self._mixtures, self._adapter):
                return plain, with_roundings()

    def _run_some(self, forward: ForwardPass, kv_cache: KvCache, waiting: list[_Row]) -> list[_Row]:
        """Run as many rows as fit the cache: a chunk of the first prompt, the other prompts, then decode tokens.

        Return the remaining rows.
        """
        rows: list[_Row] = []
        places: list[int] = []
        for row in waiting:
            if places and not kv_cache.fits(len(row.tokens)):
                break
            rows.append(row)
            places.append(kv_cache.allocate(len(row.tokens), len(row.tokens)))
        lengths = [len(row.tokens) for row in rows]
        done = [0] * len(rows)
        for what, ends in _steps(lengths):
            self._step(forward, what, list(zip(rows, places, done, ends, strict=True)))
            for place, end in zip(places, ends, strict=True):
                kv_cache.computed(place, end)
            done = ends
        for place in places:
            kv_cache.free(place)
        return waiting[len(rows) :]

    def _step(self, forward: ForwardPass, what: str, parts: Sequence[tuple[_Row, int, int, int]]) -> None:
        """Run one step over the tokens [done, end) of each row and compare the logits of every token."""
        segments: list[Segment] = []
        start = 0
        parts = [part for part in parts if part[3] > part[2]]
        for _, place, done, end in parts:
            segments.append(Segment(place, start, end - done, done))
            start += end - done
        if not segments:
            return
        tokens = [token for row, _, done, end in parts for token in row.tokens[done:end]]
        try:
            found = forward.logits([row.plan for row, *_ in parts], segments, tokens, range(start))
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:
            if isinstance(exc, AttributeError) and isinstance(exc.obj, LoraLinear):
                raise self._unsupported(
                    f"its code uses the {exc.name} of a linear layer instead of calling the layer, so no adapter could"
                    " change it"
                ) from exc
            raise self._unsupported(f"a step of {what} failed ({exc})") from exc
        for (row, _, done, end), segment in zip(parts, segments, strict=True):
            difference = Difference.of(found[segment.start : segment.end], row.expected[done:end])
            self._differences[what, row.name].append(difference)

    def _judge(self) -> None:
        """Raise BaseModelUnsupported for the first kind of tokens whose logits differ.

        In float32 every token must agree. In bfloat16 rounding decides ties, for example between two experts, and then
        later tokens of the row differ too. So the allowed share grows with the share of tokens that differ in
        transformers' own model under different rounding.
        """
        if max(self._allowed.values()) >= 1:
            logger.warning(
                "rounding alone changes this model's logits, so the effect of adapters can only be checked in float32"
            )
        for (what, name), differences in self._differences.items():
            beyond = torch.cat([difference.beyond for difference in differences])
            if float(beyond.float().mean()) > self._allowed[name]:
                furthest = max(differences, key=lambda difference: difference.furthest)
                raise self._unsupported(
                    f"for {what} {name} its logits differ from transformers' by up to {furthest.furthest:.3g}"
                    f" (largest logit: {furthest.largest:.3g})"
                )

    def _unsupported(self, reason: str) -> BaseModelUnsupported:
        return BaseModelUnsupported(f"this engine does not support {self._base.model.config.model_type}: {reason}")


def _prompts(base: BaseModel, texts: Sequence[str], most_tokens: int) -> Tensor:
    """Return prompts of equal length (P, T)."""
    ids = check_prompts(base.tokenizer, base.num_embeddings, most_tokens, texts)
    return torch.tensor(ids, device=base.model.device)


def _rows(prompts: Sequence[list[int]], plain: Tensor, adapted: Tensor, names: tuple[str, str]) -> list[_Row]:
    """Return each prompt as a row without and a row with the adapter. Every other prompt is shortened."""
    rows = []
    for index, tokens in enumerate(prompts):
        length = max(1, len(tokens) - 2 * (index % 2))
        rows.append(_Row(names[0], tokens[:length], BASE_PLAN, plain[index]))
        rows.append(_Row(names[1], tokens[:length], ADAPTER_PLAN, adapted[index]))
    return rows


@contextmanager
def _eager(base: BaseModel) -> Iterator[None]:
    """Use transformers' eager attention within the block."""
    base.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.model.set_attn_implementation(ATTENTION_NAME)


def _steps(lengths: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield the kind of each step, and the number of computed tokens of each row after it.

    The steps: a chunk of the first row's prompt, the rest of all prompts, then single tokens.
    """
    prompts = [max(length - DECODE_STEPS, 0) for length in lengths]
    yield "prompts", [prompts[0] // 2, *[0] * (len(lengths) - 1)]
    yield "prompts", prompts
    for step in range(1, DECODE_STEPS + 1):
        yield "decode tokens", [min(done + step, length) for done, length in zip(prompts, lengths, strict=True)]
