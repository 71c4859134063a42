"""Check at start that vLLM computes the same log probabilities as the model's own code in transformers.

vLLM has its own code for each family, which may name, divide or mask something otherwise than the code that the model
and its adapters were trained with. So vLLM and transformers' eager model on the CPU answer the same prompts: short ones
without and with an adapter on every module, and one that is longer than the model's window. If the log probabilities
differ, the model is refused. If they differ with the adapter only, the modules that vLLM computes without it take none.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.checkpoint import auto_class, read_config
from gpu_worker.model.eager_check import (
    ADAPTED,
    DECODE_STEPS,
    DIGEST,
    MOST_HALF_SHARE,
    MOST_TOKENS,
    PLAIN,
    RANK,
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
from gpu_worker.vllm.front_model import FrontModel, keep_modules, language_modules, language_part
from gpu_worker.vllm.packing import packed
from gpu_worker.vllm.remote_bank import Send

logger = logging.getLogger(__name__)

_LONGEST_WINDOW = 512  # tokens; a longer window is not checked
_LONG_PROMPT = 40  # tokens of the long prompt of a model without such a window
_BEYOND_WINDOW = 4  # tokens of the long prompt that the first ones cannot see


@dataclass(frozen=True, slots=True)
class CheckedPrompt:
    """One prompt of the check. `scores_prompt`: compare after each of its tokens, not only after the last ones."""

    name: str
    tokens: list[int]
    has_adapter: bool
    scores_prompt: bool


@dataclass(frozen=True, slots=True)
class CheckedAnswer:
    """vLLM's greedy answer. `scores`: for the last tokens before each next one, its log probabilities by id."""

    new_tokens: list[int]
    scores: Sequence[Mapping[int, float]]


Answer = Callable[[CheckedPrompt], Awaitable[CheckedAnswer]]
"""Lets vLLM answer a prompt with DECODE_STEPS tokens. The adapter is in the workers' banks as DIGEST."""


async def check_model(
    config: VllmWorkerConfig, model: FrontModel, max_len: int, change: Send, answer: Answer
) -> FrontModel:
    """Compare vLLM with transformers. Return the model with the modules on which adapters have their effect.

    The workers' banks are empty before and after. `max_len`: of prompt and answer.
    Raises: BaseModelUnsupported with the first difference that exceeds the bound.
    """
    if (reason := reason_to_skip(config, model, max_len)) is not None:
        logger.warning("the engine's log probabilities are not compared with those of transformers: %s", reason)
        return model
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as executor:  # its OpenMP team ends with it
        eager = await loop.run_in_executor(executor, partial(EagerModel, config, model))

        async def compare(prompts: Sequence[CheckedPrompt], modules: Collection[str]) -> _Problem | None:
            eager.adapt(modules)
            if refusals := await change([packed(eager.adapter)]):
                raise _unsupported(model, f"its workers refuse an adapter of every module ({refusals[DIGEST]})")
            answers = await asyncio.gather(*map(answer, prompts))
            await change([("drop", DIGEST)])
            return await loop.run_in_executor(executor, partial(_judge, eager, prompts, answers))

        prompts = _prompts(model, max_len)
        problem = await compare(prompts, model.shapes)
        if problem is not None and problem.prompts == ADAPTED:
            model = await _with_effect(model, partial(compare, [each for each in prompts if each.has_adapter]), problem)
        elif problem is not None:
            raise _unsupported(model, problem.text)
    seconds = time.perf_counter() - began
    logger.info("the engine's log probabilities agree with transformers; the check took %.2f s", seconds)
    return model


async def _with_effect(
    model: FrontModel, compare: Callable[[Collection[str]], Awaitable[_Problem | None]], problem: _Problem
) -> FrontModel:
    """Return the model without the modules on which adapters have another effect than in transformers.

    Modules of one name are compared together, as are both parameters of experts, then all that are left.
    Raises: BaseModelUnsupported if none is left or they differ together.
    """
    kinds: dict[str, list[str]] = {}
    for module in model.shapes:
        name = module if module in model.paths else module.rpartition(".")[0]
        kinds.setdefault(name.rpartition(".")[2], []).append(module)
    wrong = [kind for kind, modules in kinds.items() if await compare(modules) is not None]
    kept = [module for kind, modules in kinds.items() if kind not in wrong for module in modules]
    if not wrong or not kept or await compare(kept) is not None:
        raise _unsupported(model, problem.text)
    logger.warning(
        "adapters of the base model's modules named %s are refused, because vLLM computes these without them",
        ", ".join(wrong),
    )
    return keep_modules(model, kept)


def reason_to_skip(config: VllmWorkerConfig, model: FrontModel, max_len: int) -> str | None:
    """Return why this model is not compared, None if it is."""
    limit = config.model_check_max_parameters
    if model.num_parameters > limit:
        return f"it has {model.num_parameters:,} parameters, worker.model_check_max_parameters is {limit:,}"
    if model.is_quantized:
        return "its weights are quantised, and transformers rounds them otherwise"
    if max_len <= DECODE_STEPS:
        return f"worker.max_model_len is {max_len}"
    return None


@dataclass(frozen=True, slots=True)
class _Problem:
    """The kind of prompts whose log probabilities differ, and what the operator reads about it."""

    prompts: str
    text: str


class EagerModel:
    """transformers' own model on the CPU, and a random adapter of some of the modules that the workers hold.

    Raises: BaseModelUnsupported if it cannot be loaded.
    """

    def __init__(self, config: VllmWorkerConfig, model: FrontModel) -> None:
        try:
            loader = auto_class(read_config(model.source))
            whole: PreTrainedModel = loader.from_pretrained(
                model.source, dtype=model.dtype, attn_implementation="eager"
            ).eval()
        except Exception as exc:
            raise _unsupported(model, f"transformers' own model cannot be loaded ({exc})") from exc
        self._model = language_part(whole)
        found, _ = language_modules(whole)
        self._mixtures, rank = found.experts | found.routers, min(RANK, config.bank_rank_rows)
        self._linears = {name: linear for name, linear in found.linears.items() if name in model.shapes}
        self._whole_adapter = replace(check_adapter(self._linears, rank), experts=check_experts(found.experts, rank))
        self.adapt(model.shapes)
        self._keeps_last = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    def adapt(self, modules: Collection[str]) -> None:
        """Leave the adapter's other modules out."""
        whole = self._whole_adapter
        self.adapter = DeviceAdapter(
            DIGEST,
            {name: module for name, module in whole.modules.items() if name in modules},
            experts={name: module for name, module in whole.experts.items() if name in modules},
        )

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], num_kept: int, *, has_adapter: bool) -> EagerLogits:
        """Return the logits (T, V) after each of the last T = `num_kept` tokens."""
        with ExitStack() as hooks:
            if has_adapter:
                adapted = {name: self._linears[name] for name in self.adapter.modules}
                hooks.enter_context(hooked(adapted, adding(self.adapter)))
                hooks.enter_context(changed_weights(self._mixtures, self.adapter))
            found = self._logits(tokens, num_kept)
            if found.dtype == torch.float32:
                return EagerLogits(found, found)
            hooks.enter_context(hooked(self._linears, jittering()))
            return EagerLogits(found, self._logits(tokens, num_kept))

    def _logits(self, tokens: Sequence[int], num_kept: int) -> Tensor:
        options = {"logits_to_keep": num_kept} if self._keeps_last else {}
        found: Tensor = self._model(input_ids=torch.tensor([list(tokens)]), use_cache=False, **options).logits
        return found[0, -num_kept:]


def _prompts(model: FrontModel, max_len: int) -> list[CheckedPrompt]:
    """Return the short prompts without and with the adapter, and a long one."""
    longest = max_len - DECODE_STEPS
    short = check_prompts(model.tokenizer, model.num_embeddings, min(MOST_TOKENS, longest))
    prompts = [
        CheckedPrompt(PLAIN if not has_adapter else ADAPTED, tokens, has_adapter, scores_prompt=True)
        for tokens in short
        for has_adapter in (False, True)
    ]
    length = _LONG_PROMPT
    if model.window is not None and model.window <= _LONGEST_WINDOW:
        length = model.window + _BEYOND_WINDOW
    length = min(length, longest)
    text = [token for tokens in short for token in tokens]
    tokens = [text[place % len(text)] for place in range(length)]
    return [*prompts, CheckedPrompt(f"of {length} tokens", tokens, has_adapter=False, scores_prompt=False)]


def _judge(eager: EagerModel, prompts: Sequence[CheckedPrompt], answers: Sequence[CheckedAnswer]) -> _Problem | None:
    """Return the first kind of prompts whose log probabilities differ: those with the adapter if no others do.

    The bound is that of the native engine's check: in float32 every token must agree, in bfloat16 a share of them.
    """
    names = dict.fromkeys(prompt.name for prompt in prompts)
    for name in sorted(names, key=lambda name: name == ADAPTED):
        differences: list[Difference] = []
        allowed: list[float] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt.name == name:
                difference, share = _compare(eager, prompt, answer)
                differences.append(difference)
                allowed.append(share)
        beyond = torch.cat([difference.beyond for difference in differences])
        if float(beyond.float().mean()) > min(sum(allowed) / len(allowed), MOST_HALF_SHARE):
            furthest = max(differences, key=lambda difference: difference.furthest)
            return _Problem(
                name,
                f"for prompts {name} its log probabilities differ from transformers' by up to {furthest.furthest:.3g}"
                f" (largest logit: {furthest.largest:.3g}); to serve it without this check set"
                " worker.model_check_max_parameters to 0",
            )
    return None


def _compare(eager: EagerModel, prompt: CheckedPrompt, answer: CheckedAnswer) -> tuple[Difference, float]:
    """Return the difference from transformers after each scored token, and the share of tokens that may differ."""
    tokens = [*prompt.tokens, *answer.new_tokens[:-1]]
    expected = eager.logits(tokens, len(answer.scores), has_adapter=prompt.has_adapter)
    logits = expected.logits.float()
    logprobs, found = logits.log_softmax(-1), logits.clone()
    for place, scores in enumerate(answer.scores):
        ids = torch.tensor(list(scores))
        found[place, ids] += torch.tensor(list(scores.values())) - logprobs[place, ids]
    return Difference.of(found, expected.logits), expected.allowed


def _unsupported(model: FrontModel, reason: str) -> BaseModelUnsupported:
    return BaseModelUnsupported(f"the vLLM engine does not support {model.model_type}: {reason}")
