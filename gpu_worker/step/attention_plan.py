"""The segments of a packed step, and the attention that the model's layers ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from gpu_worker.errors import BaseModelUnsupported


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_tokens` adjacent tokens of one row: from token `start` of the step, position `context_len` of the row."""

    row: int
    start: int
    num_tokens: int
    context_len: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def total_len(self) -> int:
        return self.context_len + self.num_tokens


class AttentionPlan(ABC):
    """One step's attention: where its tokens' keys and values are written, and who reads what."""

    token_positions: Tensor  # (N,), in their rows, on the device

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        """Store the step's keys and values, then attend every token to its own row up to itself.

        With a window, position j is visible to position i when i - window < j <= i.
        Dims: N tokens of the step, Q query heads, H key/value heads, D head size.
        query (Q, N, D), key and value (H, N, D) -> (N, Q, D).
        Raises: BaseModelUnsupported where the model's heads are not those of the cache.
        """


def check_heads(query: Tensor, key: Tensor, value: Tensor, num_heads: int, head_dim: int) -> None:
    """Raise BaseModelUnsupported unless key and value are (H, N, D) as the cache is, and query (a multiple of H, N, D).

    A cache would take other shapes without a complaint: it would store a part of them, or the same head many times.
    """
    num_tokens = query.shape[1]
    if key.shape != (num_heads, num_tokens, head_dim) or value.shape != key.shape:
        raise BaseModelUnsupported(
            f"the model attends to keys {tuple(key.shape)} and values {tuple(value.shape)}; from its config"
            f" ({num_heads}, {num_tokens}, {head_dim}) was expected (key/value heads, tokens, head size)"
        )
    if query.shape[0] % num_heads or query.shape[2] != head_dim:
        raise BaseModelUnsupported(
            f"the model attends with queries {tuple(query.shape)}; with {num_heads} key/value heads it takes a multiple"
            f" of those, each of size {head_dim}"
        )
