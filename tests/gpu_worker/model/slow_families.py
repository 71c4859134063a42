"""Logits of families that transformers lacks, computed in float64 from the tensors of their files, token by token.

Nothing of the classes under test is used: names, shapes and formulas are those of the authors' own classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Settings = dict[str, Any]


class Weights:
    """The tensors of a model under a prefix, in float64."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name].double()

    def under(self, prefix: str) -> Weights:
        return Weights(self._tensors, f"{self._prefix}{prefix}.")

    def has(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def apply(self, name: str, x: Tensor) -> Tensor:
        """Return the outputs (T, O) of a linear layer for x (T, I)."""
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if self.has(f"{name}.bias") else y

    def norm(self, name: str, x: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (self[f"{name}.weight"] + offset)


def slow_logits(folder: Path, tokens: Sequence[int]) -> Tensor:
    """Return the logits (T, V) after each token."""
    settings = json.loads((folder / "config.json").read_text())
    weights = Weights(load_file(folder / "model.safetensors"))
    find = {
        "nemotron-nas": _nemotron_nas,
        "molmo": _molmo,
        "plamo3": _plamo3,
        "k2_horizon": _k2_horizon,
    }[settings["model_type"]]
    return find(weights, settings, torch.tensor(list(tokens)))


def _waves(num: int, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, D / 2) of the positions of `num` tokens."""
    frequencies = torch.tensor([theta ** (-2 * place / size) for place in range(size // 2)], dtype=torch.float64)
    angles = torch.arange(num, dtype=torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (T, H, D), whose pairs are D / 2 apart. `cos`, `sin`: (T, D / 2), or (T, H, D / 2)."""
    if cos.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, window: int | None = None) -> Tensor:
    """Return (T, H * D) of queries (T, H, D), keys and values (T, K, D), for one token and head after the other."""
    num, heads, size = queries.shape
    found = torch.zeros(num, heads, size, dtype=torch.float64)
    for token in range(num):
        start = 0 if window is None else max(0, token + 1 - window)
        for head in range(heads):
            of_keys = head * keys.shape[1] // heads
            scores = keys[start : token + 1, of_keys] @ queries[token, head] / math.sqrt(size)
            found[token, head] = scores.softmax(0) @ values[start : token + 1, of_keys]
    return found.flatten(1)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def _gated(weights: Weights, x: Tensor) -> Tensor:
    return weights.apply("down_proj", _silu(weights.apply("gate_proj", x)) * weights.apply("up_proj", x))


def _qkv(weights: Weights, x: Tensor, size: int) -> list[Tensor]:
    return [weights.apply(f"{name}_proj", x).unflatten(-1, (-1, size)) for name in "qkv"]


def _nemotron_nas(weights: Weights, settings: Settings, tokens: Tensor) -> Tensor:
    x, size, eps = weights["model.embed_tokens.weight"][tokens], settings["head_dim"], settings["rms_norm_eps"]
    waves = _waves(len(x), size, settings["rope_parameters"]["rope_theta"])
    for number, block in enumerate(settings["block_configs"]):
        layer = weights.under(f"model.layers.{number}")
        if not block["attention"]["no_op"]:
            q, k, v = _qkv(layer.under("self_attn"), layer.norm("input_layernorm", x, eps), size)
            assert q.shape[1] == k.shape[1] * block["attention"]["n_heads_in_group"]
            x = x + layer.apply("self_attn.o_proj", _attend(_rotate(q, *waves), _rotate(k, *waves), v))
        if not block["ffn"]["no_op"]:
            x = x + _gated(layer.under("mlp"), layer.norm("post_attention_layernorm", x, eps))
    return weights.apply("lm_head", weights.norm("model.norm", x, eps))


def _molmo(weights: Weights, settings: Settings, tokens: Tensor) -> Tensor:
    model = weights.under("model.transformer")
    eps, size = settings["layer_norm_eps"], settings["hidden_size"] // settings["num_attention_heads"]
    x = torch.cat((model["wte.embedding"], model["wte.new_embedding"]))[tokens]
    waves = _waves(len(x), size, settings["rope_parameters"]["rope_theta"])
    is_before = not settings["norm_after"]
    width, keys = settings["hidden_size"], settings["num_key_value_heads"] * size

    def add(layer: Weights, norm: str, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        return x + (part(layer.norm(norm, x, eps)) if is_before else layer.norm(norm, part(x), eps))

    for number in range(settings["num_hidden_layers"]):
        layer = model.under(f"blocks.{number}")

        def attention(x: Tensor, layer: Weights = layer) -> Tensor:
            q, k, v = layer.apply("att_proj", x).split((width, keys, keys), -1)
            if settings["attention_layer_norm"]:
                q, k = layer.norm("q_norm", q, eps), layer.norm("k_norm", k, eps)
            q, k, v = (each.unflatten(-1, (-1, size)) for each in (q, k, v))
            return layer.apply("attn_out", _attend(_rotate(q, *waves), _rotate(k, *waves), v))

        def mlp(x: Tensor, layer: Weights = layer) -> Tensor:
            up, gate = layer.apply("ff_proj", x).chunk(2, -1)
            return layer.apply("ff_out", up * _silu(gate))

        x = add(layer, "attn_norm", x, attention)
        x = add(layer, "ff_norm", x, mlp)
    return model.apply("ff_out", model.norm("ln_f", x, eps))


def _plamo3(weights: Weights, settings: Settings, tokens: Tensor) -> Tensor:
    x, size, eps = weights["model.embed_tokens.weight"][tokens], settings["head_dim"], settings["rms_norm_eps"]
    heads, keys = (settings[f"num_{name}_heads"] for name in ("attention", "key_value"))
    for number in range(settings["num_hidden_layers"]):
        is_full = (number + 1) % settings["sliding_window_pattern"] == 0
        window = None if is_full else settings["window_size"]
        waves = _waves(len(x), size, 1_000_000 if is_full else settings["rope_local_theta"])
        layer = weights.under(f"model.layers.layers.{number}")
        y = layer.apply("mixer.qkv_proj", layer.norm("pre_mixer_norm", x, eps, 1.0))
        q, k, v = y.unflatten(-1, (-1, size)).split((heads, keys, keys), 1)
        q, k = layer.norm("mixer.q_norm", q, eps, 1.0), layer.norm("mixer.k_norm", k, eps, 1.0)
        y = layer.apply("mixer.o_proj", _attend(_rotate(q, *waves), _rotate(k, *waves), v, window))
        x = x + layer.norm("post_mixer_norm", y, eps, 1 / 5)
        gate, up = layer.apply("mlp.gate_up_proj", layer.norm("pre_mlp_norm", x, eps, 1.0)).chunk(2, -1)
        x = x + layer.norm("post_mlp_norm", layer.apply("mlp.down_proj", _silu(gate) * up), eps, 1 / 5**1.5)
    return weights.norm("model.norm", x, eps, 1.0) @ weights["model.embed_tokens.weight"].T


def _k2_horizon(weights: Weights, settings: Settings, tokens: Tensor) -> Tensor:
    x, size, eps = weights["model.embed_tokens.weight"][tokens], settings["head_dim"], settings["rms_norm_eps"]
    waves = _waves(len(x), size, settings["rope_parameters"]["rope_theta"])

    def norm(weights: Weights, name: str, x: Tensor, num: int) -> Tensor:
        parts = [part / (part.pow(2).mean(-1, keepdim=True) + eps).sqrt() for part in x.chunk(num, -1)]
        return torch.cat(parts, -1) * weights[f"{name}.weight"]

    num = settings["layernorm_num_groups"]
    for number in range(settings["num_hidden_layers"]):
        layer = weights.under(f"model.layers.{number}")
        attention, y = layer.under("self_attn"), norm(layer, "input_layernorm", x, num)
        q, k, v = _qkv(attention, y, size)
        if settings["query_key_norm"]:
            q = norm(attention, "q_norm", q.flatten(1), q.shape[1]).view_as(q)
            k = norm(attention, "k_norm", k.flatten(1), k.shape[1]).view_as(k)
        found = _attend(_rotate(q, *waves), _rotate(k, *waves), v)
        if settings["attention_gate_func"] == "softplus":  # of base 2
            found = found * (1 + 2 ** attention.apply("gate_proj", y)).log2()
        x = x + attention.apply("o_proj", found)
        x = x + _gated(layer.under("mlp"), norm(layer, "post_attention_layernorm", x, num))
    return weights.apply("lm_head", norm(weights, "model.norm", x, num))
