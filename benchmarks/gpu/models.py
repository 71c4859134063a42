"""The base models of `benchmarks.gpu`: random weights in a given shape, saved with a byte tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

LLAMA_8B: Mapping[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "initializer_range": 0.005,  # otherwise attention picks one token, and rounding decides which
}
"""The shape of Llama-3.1-8B."""
TOY: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}


def layer_shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the (out, in) of the linear modules of one layer."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    outputs = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden, "gate_proj": inner, "up_proj": inner}
    return {name: (out, hidden) for name, out in outputs.items()} | {"down_proj": (hidden, inner)}


def save_random(folder: Path, shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Path:
    """Save a random Llama of this shape, drawn on the device, unless the folder has one. Return the folder."""
    if (folder / "tokenizer.json").exists():
        return folder
    config = LlamaConfig(bos_token_id=256, eos_token_id=257, pad_token_id=258, **shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)  # last, as the mark of a complete folder
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, so that a prompt has as many tokens as bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    vocabulary |= {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
