"""What a packed step is made of, and what the model's attention layers ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


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
        """
