"""Random logits and sampling settings of every kind in one batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.front.draw import Draw
from gpu_worker.front.request.request import SamplingParams

SETTINGS: dict[str, list[Any]] = {
    "temperature": [0, 1e-45, 1e-40, 1e-3, 0.3, 1.0, 1.0, 1.0, 2.0, 100.0],
    "top_k": [0, 0, 0, 1, 2, 5, 50, 256, 257, 1024, 1025, 3000, 10**6],
    "top_p": [1.0, 1.0, 0.95, 0.5, 0.9999, 1e-9, 1e-300],
    "min_p": [0.0, 0.0, 0.05, 0.5, 1.0],
    "presence_penalty": [0.0, 0.0, 0.0, 1.5],
    "frequency_penalty": [0.0, 0.0, 0.0, -0.4],
    "repetition_penalty": [1.0, 1.0, 1.0, 1.3, 0.5],
    "logprobs": [None, None, 0, 5, 20],
}
ROWS: list[Callable[[Tensor], Tensor]] = [
    lambda row: row * 2,
    lambda row: row * 8,
    lambda row: row * 0.1,  # nearly flat
    lambda row: (row * 2).round(),  # many ties
    lambda row: torch.zeros_like(row),
    lambda row: torch.where(row > 0, 0.0, -0.0),
    lambda row: (row * 3).masked_fill(row > 0.5, -math.inf),
    lambda row: torch.full_like(row, -math.inf).index_fill(0, torch.tensor([len(row) // 2]), 1.0),
    lambda row: row - 1000,
    lambda row: (row * 1e30).nan_to_num(),
]
UNSOUND: list[Callable[[Tensor], Tensor]] = [
    lambda row: row.index_fill(0, torch.tensor([len(row) - 1]), math.nan),
    lambda row: row.index_fill(0, torch.tensor([0]), -math.nan),
    lambda row: row.index_fill(0, torch.tensor([len(row) // 2]), math.inf),
    lambda row: torch.full_like(row, -math.inf),
]


def random_draw(chance: random.Random, vocabulary: int) -> Draw:
    chosen = {name: chance.choice(values) for name, values in SETTINGS.items()}
    if chance.random() < 0.2:
        biased = chance.sample(range(vocabulary), min(vocabulary, 3))
        chosen["logit_bias"] = tuple((i, chance.uniform(-20, 20)) for i in biased)
    is_early = vocabulary > 2 and chance.random() < 0.2
    forbidden = tuple(chance.sample(range(vocabulary), 2)) if is_early else ()
    tokens = [chance.randrange(vocabulary) for _ in range(chance.randint(1, 30))]
    seed, position = chance.randrange(2**63), chance.randrange(10_000)
    num_prompt = chance.randint(0, len(tokens))
    allowed = random_mask(chance, vocabulary) if chance.random() < 0.4 else None
    return Draw(SamplingParams(**chosen), seed, position, forbidden, tokens, num_prompt, allowed)


def random_mask(chance: random.Random, vocabulary: int) -> NDArray[np.uint32]:
    """Whole words, none of a word, or some of it; also bits behind the vocabulary, which mean nothing."""
    kinds = [lambda: 0, lambda: 2**32 - 1, lambda: chance.getrandbits(32), lambda: 1 << chance.randrange(32)]
    weights = [chance.random() for _ in kinds]
    words = [chance.choices(kinds, weights)[0]() for _ in range(-(-vocabulary // 32))]
    return np.array(words, np.uint32)


def random_batch(chance: random.Random, num_rows: int, vocabulary: int) -> tuple[Tensor, list[Draw]]:
    generator = torch.Generator().manual_seed(chance.randrange(2**60))
    rows = [
        chance.choice(UNSOUND if chance.random() < 0.1 else ROWS)(torch.randn(vocabulary, generator=generator))
        for _ in range(num_rows)
    ]
    return torch.stack(rows), [random_draw(chance, vocabulary) for _ in range(num_rows)]
