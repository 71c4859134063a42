"""Compare what the engine says of the next token with what PEFT says, in float32 and for every strategy."""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from gpu_worker.config import NativeWorkerConfig, VllmWorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.front.text.token_bytes import TokenBytes
from gpu_worker.model.base_model import load_config, model_source
from gpu_worker.model.checkpoint import find_quantised, load_whole
from gpu_worker.model.inject import Adaptable
from gpu_worker.model.text_part import text_options
from gpu_worker.start import start_engine
from lora_store import (
    LOCAL_TENANT,
    AdapterRef,
    AdapterWeights,
    Label,
    Limits,
    ModuleWeights,
    Plan,
    PlannedAdapter,
    Strategy,
    check_folder,
    write_peft_folder,
)
from lora_store.bounded_files import read_tensors
from lora_store.composition import compose
from lora_store.peft_config import read_config
from lora_store.peft_files import WEIGHTS_FILE, pair_tensors

TOLERANCE = 1e-3  # of a log probability; other summation orders differ by less
PROMPT = "The parrot says that the weather in the harbour is"
_HALF = 0.5
_NUM_COMPARED = 20  # tokens
_MAX_LEN = 256


def parity_with_peft(
    folder: Path, config: NativeWorkerConfig | VllmWorkerConfig, limits: Limits | None = None
) -> dict[str, float]:
    """Return the largest difference from PEFT of a likely token's log probability, by strategy.

    Only the weights and their configuration matter, not the folder's name, samples or base model's name.
    `mixture` and `fusion` combine the adapter and a noisy copy of it, which has one more rank, with equal weights.
    PEFT computes the adapter itself, its `cat` combination, and the merged adapter (Σ m A, Σ m B) padded with zeros.
    PEFT has no combination of adapters on experts, so there the concatenation is an adapter as well. Neither rounds the
    base model, whatever `worker.quantization` says. Raises: AdapterRefused, for what exceeds `limits` too.
    """
    limits = limits or Limits()
    if isinstance(config, NativeWorkerConfig):
        config = replace(config, quantization="none")
    with tempfile.TemporaryDirectory() as copies:
        return _parity(*_in_pefts_names(folder, config, limits, Path(copies)), config)


def _parity(
    folder: Path, adapter: Mapping[str, ModuleWeights], config: NativeWorkerConfig | VllmWorkerConfig
) -> dict[str, float]:
    other = _noisy(adapter)
    plans = {
        "selection": _plan("selection", adapter=1.0),
        "mixture": _plan("mixture", adapter=_HALF, other=_HALF),
        "fusion": _plan("fusion", adapter=_HALF, other=_HALF),
    }
    tokens, found = asyncio.run(_engine_answers(config, {"adapter": adapter, "other": other}, plans))
    copies = {"other": other, "fusion": _fused(adapter, other)}
    if _has_experts(adapter):
        copies["mixture"], _ = compose([(adapter, _HALF), (other, _HALF)])
    expected = _peft_logprobs(config, folder, copies, tokens)
    read = TokenBytes(AutoTokenizer.from_pretrained(model_source(config)).backend_tokenizer)
    token_bytes = [read(token_id) for token_id in range(len(expected["selection"]))]
    return {strategy: _furthest(found[strategy], expected[strategy], token_bytes) for strategy in plans}


def _in_pefts_names(
    folder: Path, config: NativeWorkerConfig | VllmWorkerConfig, limits: Limits, copies: Path
) -> tuple[Path, Mapping[str, ModuleWeights]]:
    """Return the folder and its adapter. If its tensors have other names than PEFT's of this base, a copy in `copies`.

    Adapters on experts are copied too: PEFT loads several only if their configs name the parameters alike.
    """
    base = _text_model(config)
    shapes = Adaptable.of(base).shapes
    if config.engine == "vllm":
        shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    named = read_config(folder, limits).base_model or ""
    adapter = check_folder(
        folder,
        label=Label("adapter", base_model=named),
        accepts_base={named},
        module_shapes=shapes,
        limits=limits,
        samples_folder=copies,  # without any
    ).modules
    weights = folder / WEIGHTS_FILE
    is_named = weights.exists() and pair_tensors(read_tensors(weights, limits)).keys() == adapter.keys()
    if is_named and not _has_experts(adapter):
        return folder, adapter
    write_peft_folder(copies / folder.name, adapter, base_model=named)
    return copies / folder.name, adapter


def _has_experts(modules: Mapping[str, ModuleWeights]) -> bool:
    return any(module.lora_a.ndim > 2 for module in modules.values())


def _text_model(config: NativeWorkerConfig | VllmWorkerConfig) -> PreTrainedModel:
    """Load transformers' model, of a multimodal checkpoint that of its text part."""
    source = model_source(config)
    whole = load_config(source)
    if find_quantised(whole):
        raise BaseModelUnsupported(
            f"{config.base_model} has quantised weights, which PEFT does not compute as the engine does: compare with"
            " the model that they were made from"
        )
    return load_whole(source, dtype=torch.float32, attn_implementation="eager", **text_options(whole))


def _noisy(modules: Mapping[str, ModuleWeights]) -> dict[str, ModuleWeights]:
    """Return the modules with noise of a tenth of their standard deviation, and one more rank of noise."""
    random = torch.Generator().manual_seed(0)

    def add_noise(tensor: Tensor, rank_dim: int) -> Tensor:
        size = 0.1 * float(tensor.float().std(correction=0))
        more = torch.zeros_like(tensor.narrow(rank_dim, 0, 1))
        wider = torch.cat((tensor, more), rank_dim).float()
        return wider + size * torch.randn(wider.shape, generator=random)

    return {
        name: ModuleWeights(add_noise(module.lora_a, -2), add_noise(module.lora_b, -1), module.scaling)
        for name, module in modules.items()
    }


def _fused(*adapters: Mapping[str, ModuleWeights]) -> dict[str, ModuleWeights]:
    """Average the parameters: A = Σ m A_s and B = Σ m · scaling_s · B_s, padded with zeros to the largest rank."""
    fused = {}
    for name in adapters[0]:
        modules = [adapter[name] for adapter in adapters]
        rank = max(module.rank for module in modules)
        (*experts, _, num_in), num_out = modules[0].lora_a.shape, modules[0].lora_b.shape[-2]
        a, b = torch.zeros(*experts, rank, num_in), torch.zeros(*experts, num_out, rank)
        for module in modules:
            a[..., : module.rank, :] += _HALF * module.lora_a.float()
            b[..., : module.rank] += _HALF * module.scaling * module.lora_b.float()
        fused[name] = ModuleWeights(a, b, 1.0)
    return fused


def _plan(strategy: Strategy, **weights: float) -> Plan:
    rows = [PlannedAdapter(AdapterRef("local", name, name), name, weight) for name, weight in weights.items()]
    return Plan(strategy, tuple(rows))


async def _engine_answers(
    config: NativeWorkerConfig | VllmWorkerConfig,
    adapters: Mapping[str, Mapping[str, ModuleWeights]],
    plans: Mapping[str, Plan],
) -> tuple[Sequence[int], dict[str, dict[bytes, float]]]:
    """Return the prompt's tokens, and by strategy the log probabilities of the likeliest next tokens.

    The engine is the one that the settings name, on the CPU. It computes all strategies in one batch.
    """
    pool = {name: AdapterWeights(name, dict(modules)) for name, modules in adapters.items()}
    config = replace(
        config,
        device="cpu",
        dtype="float32",
        kv_tokens=None,
        max_model_len=_MAX_LEN,
        max_batch_size=len(plans),
        bank_rank_rows=sum(weights.max_rank for weights in pool.values()),
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=_NUM_COMPARED)
    engine = await start_engine(config, lambda name: _done(pool[name]))
    try:
        tokenized = await engine.tokenizer.tokenize(PROMPT, "auto", tenant=LOCAL_TENANT)
        outcomes = await engine.generate([Job(strategy, PROMPT, plan, sampling) for strategy, plan in plans.items()])
    finally:
        engine.stop()
    found: dict[str, dict[bytes, float]] = {}
    for strategy, outcome in zip(plans, outcomes, strict=True):
        if isinstance(outcome, Exception):
            raise outcome
        found[strategy] = dict(outcome.logprobs[0].top)
    return tokenized.ids, found


def _done(weights: AdapterWeights) -> Future[AdapterWeights]:
    future: Future[AdapterWeights] = Future()
    future.set_result(weights)
    return future


def _furthest(found: Mapping[bytes, float], expected: Tensor, token_bytes: Sequence[bytes]) -> float:
    """Return the largest difference of a log probability. `expected` (V,): PEFT's. Several ids may have one text."""
    known: dict[bytes, list[float]] = defaultdict(list)
    for logprob, token in zip(expected.tolist(), token_bytes, strict=True):
        known[token].append(logprob)
    return max(min(abs(logprob - each) for each in known[token]) for token, logprob in found.items())


def _peft_logprobs(
    config: NativeWorkerConfig | VllmWorkerConfig,
    folder: Path,
    copies: Mapping[str, Mapping[str, ModuleWeights]],
    tokens: Sequence[int],
) -> dict[str, Tensor]:
    """Return the log probabilities (V,) of the next token by strategy, computed by PEFT and transformers.

    `copies`: adapters by the name that they get in PEFT, the copy first.
    """
    base = _text_model(config)
    with tempfile.TemporaryDirectory() as folder_of_copies:
        # The copy must be first: PEFT scales a concatenation by 1 only if its first adapter is not rank-stabilised.
        for name, modules in copies.items():
            write_peft_folder(Path(folder_of_copies) / name, modules, base_model=config.base_model)
        model = PeftModel.from_pretrained(base, str(Path(folder_of_copies) / "other"), adapter_name="other").eval()
        for name in copies.keys() - {"other"}:
            model.load_adapter(str(Path(folder_of_copies) / name), adapter_name=name)
        model.load_adapter(str(folder), adapter_name="selection")
    if "mixture" not in copies:
        model.add_weighted_adapter(["other", "selection"], [_HALF, _HALF], "mixture", combination_type="cat")
    logprobs = {}
    for strategy in ("selection", "mixture", "fusion"):
        model.set_adapter(strategy)
        with torch.inference_mode():
            logprobs[strategy] = model(input_ids=torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
    return logprobs
