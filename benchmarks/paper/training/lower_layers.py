"""Compute the layers below the first trained one once per example, since training does not change them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.training.packing import Packed
from benchmarks.training.lora_training import Batch, Example

_CHUNK_TOKENS = 800  # computed together, in fewer and larger products


class Skip(nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class LowerLayers:
    """The layout `packed` with the input of layer `first`. Dims: T tokens, H hidden.

    `upcoming`: the examples in the order of their batches; the next ones are computed together with the current ones.
    """

    def __init__(self, packed: Packed, decoder: nn.Module, first: int, upcoming: Sequence[Example]) -> None:
        self._packed, self._decoder, self._upcoming = packed, decoder, iter(upcoming)
        layers = list(decoder.get_submodule("layers").children())
        self._below = nn.ModuleList([*layers[:first], *[Skip()] * (len(layers) - first)])
        self.above = nn.ModuleList([*[Skip()] * first, *layers[first:]])
        self._common = torch.empty(0)  # for the prompts' common prefix
        self._own: dict[int, Tensor] = {}  # for the rest of an example, by the identity of its object

    def num_tokens(self, examples: Sequence[Example]) -> int:
        return self._packed.num_tokens(examples)

    def batch(self, examples: Sequence[Example]) -> Batch:
        while missing := [example for example in examples if id(example) not in self._own]:
            self._compute(self._with_next(missing))
        hidden = torch.cat([self._common, *[self._own[id(example)] for example in examples]])
        return replace(self._packed.batch(examples), hidden=hidden[None])

    def _with_next(self, missing: Sequence[Example]) -> list[Example]:
        """Return `missing`, and as many of the upcoming examples as fit into one chunk."""
        chunk = {id(example): example for example in missing}
        for example in self._upcoming:
            if id(example) not in self._own:
                chunk[id(example)] = example
            if self.num_tokens(list(chunk.values())) >= _CHUNK_TOKENS:
                break
        return list(chunk.values())

    @torch.no_grad()
    def _compute(self, examples: Sequence[Example]) -> None:
        with _swapped(self._decoder, layers=self._below, norm=nn.Identity()):
            hidden = self._packed.batch(examples).read_by(self._decoder)[0]  # (T, H)
        lengths = [self._packed.prefix_len, *[len(e.ids) - self._packed.prefix_len for e in examples]]
        self._common, *rest = hidden.split(lengths)
        self._own |= {id(example): own for example, own in zip(examples, rest, strict=True)}


@contextmanager
def lower_layers(packed: Packed, decoder: nn.Module, first: int, upcoming: Sequence[Example]) -> Iterator[LowerLayers]:
    """Yield the layout for training `decoder`, which runs only the layers from `first` on within the block."""
    layout = LowerLayers(packed, decoder, first, upcoming)
    with _swapped(decoder, layers=layout.above):
        yield layout


@contextmanager
def _swapped(owner: nn.Module, **modules: nn.Module) -> Iterator[None]:
    before = {name: owner.get_submodule(name) for name in modules}
    for name, module in modules.items():
        setattr(owner, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            setattr(owner, name, module)
