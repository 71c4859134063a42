"""Scores of adapters from their weights alone: how strongly the hidden states of a prompt excite each of them.

Dims: B prompts, T tokens, P adapters, R rank, I in, O out. With x an input of a layer, s B A the adapter there:

    arrow   |v · x| / |x|, v the first right singular vector of s B A; the mean over tokens and layers
    spectr  ‖s B A x‖ / |x|; the mean over tokens and layers
    norm    the same at the last token

Source: arrow: Ostapenko et al., Towards Modular LLMs (arXiv 2405.11157); spectr: Fleshman and Van Durme, SpectR
(arXiv 2504.03454); norm: LoGo (arXiv 2511.07129), here over all layers with adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_store import AdapterWeights, ModuleWeights

SIGNALS = ("arrow", "spectr", "norm")


@dataclass(frozen=True, slots=True)
class Directions:
    """The adapters of one layer. `first` (P, I): v. `cores` (P, R, I): matrices C with ‖C x‖ = ‖s B A x‖."""

    first: Tensor
    cores: Tensor

    @classmethod
    def of(cls, parts: Sequence[ModuleWeights]) -> Directions:
        """Return them. B = Q U with orthonormal Q, so U A has the singular values and right vectors of B A."""
        cores = torch.stack([_core(part) for part in parts])
        return cls(torch.linalg.svd(cores, full_matrices=False).Vh[:, 0], cores)

    def signals(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, I), (B, T) -> (3, B, P)
        unit = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        arrow = (unit @ self.first.T).abs()  # (B, T, P)
        spectr = torch.einsum("bti,pri->btpr", unit, self.cores).norm(dim=-1)
        weights = (mask / mask.sum(dim=1, keepdim=True))[..., None]
        last = mask.sum(dim=1).long() - 1
        at_end = spectr[torch.arange(len(last)), last]
        return torch.stack([(arrow * weights).sum(dim=1), (spectr * weights).sum(dim=1), at_end])


def _core(part: ModuleWeights) -> Tensor:
    upper = torch.linalg.qr(part.lora_b.float() * part.scaling, mode="r").R
    return upper @ part.lora_a.float()


class Spectra:
    """The adapters of a pool on a model whose modules have the adapters' names. All adapters have the same modules."""

    def __init__(self, model: nn.Module, adapters: Sequence[AdapterWeights]) -> None:
        self._model, self._decoder = model, model.get_submodule("model")
        self._layers = {
            name: Directions.of([adapter.modules[name] for adapter in adapters]) for name in adapters[0].modules
        }

    @torch.inference_mode()
    def scores(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return (B, P) by signal. `ids`, `mask` (B, T): prompts, padded at the end."""
        found: list[Tensor] = []
        with self._watched(found, mask.float()):
            self._decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        return dict(zip(SIGNALS, torch.stack(found).mean(dim=0), strict=True))

    @contextmanager
    def _watched(self, found: list[Tensor], mask: Tensor) -> Iterator[None]:
        def hook(own: Directions) -> object:
            return lambda _, inputs: found.append(own.signals(inputs[0].float(), mask))

        handles = [
            self._model.get_submodule(name).register_forward_pre_hook(hook(own))  # type: ignore[arg-type]
            for name, own in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def calibrated(scores: Tensor, reference: Tensor) -> Tensor:
    """Return scores (N, P) in standard deviations of each adapter's scores on reference prompts (M, P)."""
    return (scores - reference.mean(dim=0)) / reference.std(dim=0).clamp_min(1e-12)
