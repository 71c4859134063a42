"""Mixtures of adapters of different kinds in a torch model: LoRA, DoRA and IA³, as PEFT trains and saves them.

Every kind changes the output of a linear layer, so their changes can be summed: y = W x + Σ_p w_p δ_p(x).
LoRA: δ(x) = s B A x. DoRA: δ(x) = (m / n − 1) ⊙ W x + (m / n) ⊙ s B A x with n the row norms of W + s B A.
IA³: δ(x) = (l − 1) ⊙ W x, or W ((l − 1) ⊙ x) where it scales the input.
Sources: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353, equation 5), IA³ (arXiv 2205.05638, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.training.lora_training import FrozenLinear

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Change:
    """An adapter's change of one layer: δ(x) = c ⊙ W x + W (d ⊙ x) + B A x. A kind leaves out what it lacks.

    Dims: I in, O out, R rank. `lora_a` (R, I), `lora_b` (O, R), `outputs` c (O,), `inputs` d (I,).
    """

    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    outputs: Tensor | None = None
    inputs: Tensor | None = None


def read_changes(folder: Path, model: nn.Module) -> dict[str, Change]:
    """Return the change of each layer of `model` by the layer's name, from a PEFT folder."""
    config = PeftConfig.from_pretrained(str(folder))
    tensors = {
        name.removeprefix(_PREFIX): tensor.float()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    if isinstance(config, IA3Config):
        return {name.removesuffix(".ia3_l"): _of_ia3(name, factors, config) for name, factors in tensors.items()}
    assert isinstance(config, LoraConfig) and not config.use_rslora, folder
    scaling, end = config.lora_alpha / config.r, ".lora_A.weight"
    names = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    return {name: _of_lora(name, tensors, scaling, model.get_submodule(name)) for name in names}


def _of_ia3(name: str, factors: Tensor, config: IA3Config) -> Change:
    change = factors.flatten() - 1
    is_input = any(name.removesuffix(".ia3_l").endswith(module) for module in config.feedforward_modules or ())
    return Change(inputs=change) if is_input else Change(outputs=change)


def _of_lora(name: str, tensors: Mapping[str, Tensor], scaling: float, layer: nn.Module) -> Change:
    lora_a, lora_b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] * scaling
    magnitude = tensors.get(f"{name}.lora_magnitude_vector")
    if magnitude is None:
        return Change(lora_a, lora_b)
    weight = layer.get_parameter("weight").float()
    factors = magnitude / torch.linalg.norm(weight + lora_b @ lora_a, dim=1)
    return Change(lora_a, factors[:, None] * lora_b, outputs=factors - 1)


class Weights:
    """The weights that every layer reads: (B, P), the weight of each of P adapters for each row of the batch."""

    def __init__(self) -> None:
        self.now = torch.empty(0)


class MixedLinear(nn.Module):
    """A frozen linear layer and the changes of P adapters, None where an adapter leaves the layer alone.

    All A are stacked to (ΣR, I), all B to (ΣR, O): one product for all ranks of all adapters.
    """

    def __init__(self, base: FrozenLinear, changes: Sequence[Change | None], weights: Weights) -> None:
        super().__init__()
        self.base, self._weights = base, weights
        found = [change or Change() for change in changes]
        pairs = [(p, c.lora_a, c.lora_b) for p, c in enumerate(found) if c.lora_a is not None and c.lora_b is not None]
        self._owner = torch.tensor([p for p, a, _ in pairs for _ in range(len(a))], dtype=torch.long)  # of each rank
        self._a = torch.cat([torch.empty(0, base.in_features), *[a for _, a, _ in pairs]])
        self._b = torch.cat([torch.empty(0, base.out_features), *[b.T for _, _, b in pairs]])
        self._outputs = _stacked([c.outputs for c in found], base.out_features)
        self._inputs = _stacked([c.inputs for c in found], base.in_features)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, I) -> (B, T, O)
        g = self._weights.now
        y: Tensor = self.base(x)
        found = y
        if self._outputs is not None:
            found = found + y * (g @ self._outputs)[:, None]
        if self._inputs is not None:
            found = found + self.base(x * (g @ self._inputs)[:, None])
        return found + ((x @ self._a.T) * g[:, self._owner][:, None]) @ self._b


def _stacked(rows: Sequence[Tensor | None], size: int) -> Tensor | None:
    """Return (P, size), zeros where an adapter has none; None if no adapter has any."""
    if all(row is None for row in rows):
        return None
    return torch.stack([torch.zeros(size) if row is None else row for row in rows])


class MixedModel:
    """`model` with adapters of any of the kinds. Its linear layers must be FrozenLinear; it is changed in place."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, Path]) -> None:
        """Read each adapter's PEFT folder."""
        self.model, self._weights = model, Weights()
        self._place = {name: number for number, name in enumerate(adapters)}
        found = [read_changes(folder, model) for folder in adapters.values()]
        for name in dict.fromkeys(name for changes in found for name in changes):
            base = model.get_submodule(name)
            assert isinstance(base, FrozenLinear), name
            parent, _, child = name.rpartition(".")
            layer = MixedLinear(base, [changes.get(name) for changes in found], self._weights)
            setattr(model.get_submodule(parent), child, layer)

    def use(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Set the weight of each adapter, by name, for each row of the next batch."""
        weights = torch.zeros(len(rows), len(self._place))
        for row, chosen in enumerate(rows):
            for name, weight in chosen.items():
                weights[row, self._place[name]] = weight
        self._weights.now = weights
