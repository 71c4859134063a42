"""Look the model's embedding up in the matrix of its output head, so that tied models hold that matrix once.

Dims: N tokens, I width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.quantization import QuantizedLinear, QuantizedWeight


class Rows(Protocol):
    """A layer that returns rows of its weight, in the dtype that the model computes in."""

    def rows(self, outputs: Tensor) -> Tensor: ...  # (N,) -> (N, I)


class EmbeddingRows(nn.Module):
    """The matrix of an embedding that shares it with no output head."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._dtype = dtype

    def rows(self, outputs: Tensor) -> Tensor:  # (N,) -> (N, I)
        return self.weight[outputs].to(self._dtype)


class QuantizedRows(nn.Module):
    """The integers of an embedding that shares them with no output head, read slowly."""

    def __init__(self, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized, self._dtype = quantized, dtype

    def rows(self, outputs: Tensor) -> Tensor:  # (N,) -> (N, I)
        return self.quantized.rows(outputs).dequantized(self._dtype)


class LookupEmbedding(nn.Module):
    """The model's own embedding over the rows of a step's tokens, which another module stores in its own way."""

    def __init__(self, own: nn.Embedding, source: Rows) -> None:
        super().__init__()
        own.padding_idx = None  # concerns gradients only, and would have to be one of the rows
        del own.weight
        self.num_embeddings = own.num_embeddings
        self.own, self.source = own, source

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., I)
        self.own.weight = self.source.rows(ids.reshape(-1))
        found: Tensor = self.own(torch.arange(ids.numel()).view(ids.shape))
        return found


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the output head is a linear layer that has the embedding's matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(embedding, LookupEmbedding):
        return embedding.source is head
    if not isinstance(head, nn.Linear) or isinstance(head, QuantizedLinear) or not isinstance(embedding, nn.Embedding):
        return False
    return head.weight is embedding.weight


@contextmanager
def keeping_tie(model: PreTrainedModel) -> Iterator[None]:
    """Replace the head of a tied model within the block; then the embedding is looked up in the new one."""
    was_tied = is_tied(model)
    yield
    if was_tied and not is_tied(model):
        look_up(model, model.get_output_embeddings())
        if not is_tied(model):
            raise BaseModelUnsupported(
                "integer weights are not supported with an embedding that limits its rows' norms"
            )


def look_up(model: PreTrainedModel, source: Rows) -> None:
    """Let the model's embedding take its rows from `source`, in place."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, LookupEmbedding):
        embedding.source = source
    elif isinstance(embedding, nn.Embedding) and embedding.max_norm is None:
        model.set_input_embeddings(LookupEmbedding(embedding, source))
