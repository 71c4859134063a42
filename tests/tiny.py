"""Tiny models and random adapters for all tests, and the definition of equal logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gpu_worker.config import configure_worker
from gpu_worker.model.base_model import BaseModel, load_base_model
from gpu_worker.model.inject import target_linears
from lora_store.adapter import AdapterRef, AdapterWeights, ModuleWeights, Shapes
from lora_store.plan import Plan, PlannedAdapter, Strategy

TinyFolders = Mapping[str, Path]  # the fixture `tiny_folders`
TinyBase = Callable[..., BaseModel]  # the fixture `tiny_base`
VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.2,
}
_WINDOW = 12
FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE,
            head_dim=8,
            sliding_window=_WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=8,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=_WINDOW)),
    # A multiple of 256 ids, as most published vocabularies have: `argmax` takes its fast path for those only.
    "llama_512_ids": lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 512})),
}


def gemma3_with_wide_heads() -> Gemma3ForCausalLM:
    """Return a random Gemma-3 with heads of 32 values: vLLM's attention supports no smaller ones on the CPU."""
    changes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE | changes,
            head_dim=32,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=32,
        )
    )


def change_json(file: Path, changes: Mapping[str, Any]) -> None:
    """Write these settings into a JSON file, which keeps its others."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(merged(kept, changes)))


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the changes, also within settings that are settings themselves."""
    result = {**settings, **changes}
    for name in settings.keys() & changes.keys():
        if isinstance(settings[name], dict) and isinstance(changes[name], dict):
            result[name] = merged(settings[name], changes[name])
    return result


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and three special tokens, so that any text survives a round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def tiny_config(folder: Path, **changes: Any) -> Any:
    """Return the configuration of a small float32 worker over a tiny model, of the native engine by default."""
    settings: dict[str, Any] = {
        "engine": "native",
        "base_model": str(folder),
        "dtype": "float32",
        "bank_rank_rows": 32,
        "max_batch_size": 8,
        "max_model_len": 160,
        "max_step_tokens": 64,
    }
    return configure_worker(**{**settings, **changes})


class InlineExecutor(Executor):
    """Runs submitted work at once, on the caller's thread."""

    def submit(self, fn: Callable[..., object], /, *args: object, **kwargs: object) -> Future:  # type: ignore[override]
        future: Future[object] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def linear_shapes(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear layer that an adapter may target."""
    linears = target_linears(base.model, base.model.get_output_embeddings())
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def random_adapter(
    shapes: Shapes,
    seed: int,
    *,
    rank: int = 4,
    modules: Callable[[str], bool] = lambda name: True,
    rank_of: Callable[[str], int] | None = None,
    scaling: float = 2.0,
    size: float = 0.15,
) -> AdapterWeights:
    """Return an adapter with random tensors, large enough to change a tiny model's answers."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, (num_out, num_in, *num) in shapes.items():
        if modules(name):
            r = rank if rank_of is None else rank_of(name)
            a = torch.randn(*num, r, num_in, generator=generator) * size
            b = torch.randn(*num, num_out, r, generator=generator) * size
            chosen[name] = ModuleWeights(a, b, scaling)
    return AdapterWeights(hashlib.sha256(f"random-{seed}-{rank}-{scaling}".encode()).hexdigest(), chosen)


def plan_of(strategy: Strategy, *parts: tuple[AdapterWeights, float]) -> Plan:
    """Return a plan over adapters with these weights."""
    planned = tuple(
        PlannedAdapter(AdapterRef("local", f"a{weights.weights_digest[:8]}", weights.weights_digest), digest, weight)
        for weights, weight in parts
        for digest in [weights.weights_digest]
    )
    return Plan(strategy, planned)


def assert_equal_logits(found: Tensor, expected: Tensor) -> None:
    """Check that logits are equal: float32 within 1e-4, bfloat16 within 0.05 · max|logit| on the same prefix."""
    if found.dtype == expected.dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    else:
        bound = 0.05 * float(expected.float().abs().max())
        torch.testing.assert_close(found.float(), expected.float(), atol=bound, rtol=0)


def save_talkative(model: Path, target: Path) -> Path:
    """Save the tiny model so that it never chooses a token without text, as a greedy random model may always do."""
    base = load_base_model(tiny_config(model))
    with torch.no_grad():
        base.model.get_output_embeddings().weight[256:] = 0  # so their logits are 0 and never the largest
    base.model.save_pretrained(target)
    base.tokenizer.save_pretrained(target)
    return target
