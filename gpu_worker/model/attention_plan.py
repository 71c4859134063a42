"""The segments of a packed step, and the interface of its attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from gpu_worker.errors import BaseModelUnsupported


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_tokens` adjacent tokens of a row, from token `start` of the step and position `context_len` of the row."""

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
    """The attention of one step: where keys and values are written, and which tokens attend to which."""

    token_positions: Tensor  # (N,) position within the row, on the device

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        """Store the step's keys and values, then attend every token to its row, up to and including itself.

        With a window, position j is visible to position i if i - window < j <= i.
        Dims: N tokens of the step, Q query heads, H key/value heads, D head size.
        query (Q, N, D), key and value (H, N, D) -> (N, Q, D).
        Raises: BaseModelUnsupported if the model's heads do not match the cache.
        """


def check_window(sliding_window: int | None, kept: int | None) -> None:
    """Raise BaseModelUnsupported if a layer sees more tokens than the cache keeps for it. None: all tokens."""
    if kept is not None and (sliding_window is None or sliding_window > kept):
        raise BaseModelUnsupported(
            f"the model attends to {'all' if sliding_window is None else sliding_window} tokens in a layer whose config"
            f" implies a window of {kept}"
        )


def check_heads(query: Tensor, key: Tensor, value: Tensor, num_heads: int, head_dim: int) -> None:
    """Raise BaseModelUnsupported unless key and value are (H, N, D) and query is (a multiple of H, N, D).

    The cache would accept other shapes silently: it would store only a part, or broadcast one head.
    """
    num_tokens = query.shape[1]
    if key.shape != (num_heads, num_tokens, head_dim) or value.shape != key.shape:
        raise BaseModelUnsupported(
            f"the model attends to keys {tuple(key.shape)} and values {tuple(value.shape)}; its config implies"
            f" ({num_heads}, {num_tokens}, {head_dim}) (key/value heads, tokens, head size)"
        )
    if query.shape[0] % num_heads or query.shape[2] != head_dim:
        raise BaseModelUnsupported(
            f"the model attends with queries {tuple(query.shape)}; the number of query heads must be a multiple of"
            f" {num_heads} key/value heads, each of size {head_dim}"
        )
