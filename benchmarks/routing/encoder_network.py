"""The packaged encoder as a network whose linear layers learn a low-rank change, in bfloat16.

It computes what transformers' BertModel does with the mean of all tokens, in a third of its time on CPUs: a change is
added to the weight before the product, and no number is converted in between.

Dims: N texts, T tokens of the longest, H heads, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from retriever_svc.packaged_encoder import FIRST_FACTOR, LINEAR, SECOND_FACTOR

MAX_TOKENS = 128  # longer texts are cut in training
_MASKED = -1e4  # added to the logits of padding


class EncoderNetwork(nn.Module):
    """Texts → the means of their tokens' states, with a trainable change of rank `rank` for each linear layer."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__()
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        self._prompt = settings["prompts"]["task"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding(pad_id=config["pad_token_id"])
        self._num_layers, self._num_heads = config["num_hidden_layers"], config["num_attention_heads"]
        self._epsilon = config["layer_norm_eps"]
        self._frozen = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        self.first, self.second = nn.ParameterDict(), nn.ParameterDict()
        for name in self.linear_layers():
            num_out, num_in = tensors[f"{name}.weight"].shape
            self.first[_key(name)] = nn.Parameter(torch.randn(rank, num_in) / num_in**0.5)
            self.second[_key(name)] = nn.Parameter(torch.zeros(num_out, rank))

    def linear_layers(self) -> Iterator[str]:
        """Yield the names of the linear layers."""
        for layer in range(self._num_layers):
            yield from (f"encoder.layer.{layer}.{name}" for name in LINEAR.values())

    def changes(self) -> dict[str, Tensor]:
        """Return the changes of the weights by the names that `retriever_svc.packaged_encoder` reads."""
        found = {}
        for name in self.linear_layers():
            found[f"{name}.weight{FIRST_FACTOR}"] = self.first[_key(name)].detach().half()
            found[f"{name}.weight{SECOND_FACTOR}"] = self.second[_key(name)].detach().half()
        return found

    def forward(self, texts: Sequence[str]) -> Tensor:  # (N, D) in float32
        read = self._tokenizer.encode_batch([self._prompt + text for text in texts])
        ids = torch.tensor([text.ids for text in read])
        mask = torch.tensor([text.attention_mask for text in read])
        bias = torch.where(mask[:, None, None, :].bool(), 0.0, _MASKED).bfloat16()
        table = self._frozen
        positions = table["embeddings.position_embeddings.weight"][: ids.shape[1]]
        words = table["embeddings.word_embeddings.weight"][ids]
        x = self._norm(words + positions + table["embeddings.token_type_embeddings.weight"][0], "embeddings")
        for layer in range(self._num_layers):
            place = f"encoder.layer.{layer}"
            x = self._norm(x + self._attend(x, place, bias), f"{place}.attention.output")
            inner = functional.gelu(self._linear(x, f"{place}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{place}.output.dense"), f"{place}.output")
        weights = mask[:, :, None].float()
        return (x.float() * weights).sum(1) / weights.sum(1)

    def _attend(self, x: Tensor, place: str, bias: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        parts = (self._linear(x, f"{place}.attention.self.{part}") for part in ("query", "key", "value"))
        query, key, value = (part.unflatten(2, (self._num_heads, -1)).transpose(1, 2) for part in parts)  # (N, H, T, ·)
        logits = query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + bias
        return self._linear((logits.softmax(-1) @ value).transpose(1, 2).flatten(2), f"{place}.attention.output.dense")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        change = self.second[_key(name)] @ self.first[_key(name)]
        return functional.linear(x, self._frozen[f"{name}.weight"] + change.bfloat16(), self._frozen[f"{name}.bias"])

    def _norm(self, x: Tensor, place: str) -> Tensor:
        name = f"{place}.LayerNorm"
        weight, bias = self._frozen[f"{name}.weight"], self._frozen[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self._epsilon)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's parameters have no dots in their names
