"""The identity of an adapter, its tensors and its samples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOCAL_TENANT = "local"
Shapes = Mapping[str, tuple[int, ...]]
"""Of each module that an adapter may change: (out, in) of a linear layer, (out, in, experts) of fused experts."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RESERVED = frozenset({"auto", ".", ".."})


def is_valid_name(name: str) -> bool:
    """Return whether `name` is allowed for an adapter, a tenant or a tag. Names are ids, never paths."""
    return _NAME.fullmatch(name) is not None and name not in _RESERVED


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One version of one adapter. `digest` covers weights, samples, template name, contract and metadata."""

    tenant: str
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.short_digest}"

    @property
    def short_digest(self) -> str:
        """The start of the digest, for people."""
        return self.digest[:12]

    @property
    def key(self) -> tuple[str, str]:
        """The tenant and the name, which all versions share."""
        return self.tenant, self.name

    def name_for(self, tenant: str) -> str:
        """Return the name that `tenant` uses: `name` for its own adapter, `owner/name` for another tenant's.

        A tenant's own adapter of the same name never hides `owner/name`.
        """
        return self.name if self.tenant == tenant else f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """One module's LoRA pair. Dims: R rank, I in, O out. `lora_a` (R, I), `lora_b` (O, R).

    Of E fused experts each has a pair of its own: `lora_a` (E, R, I), `lora_b` (E, O, R).
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float  # lora_alpha / rank, or / sqrt(rank) for rsLoRA

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-2]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """The tensors of one adapter, keyed by the base model's module path, such as `model.layers.3.mlp.up_proj`."""

    weights_digest: str
    modules: Mapping[str, ModuleWeights]

    @property
    def max_rank(self) -> int:
        """The largest rank of its modules. In a bank it needs at most as many rank rows: experts need none."""
        return max(module.rank for module in self.modules.values())


@dataclass(frozen=True, slots=True)
class Sample:
    """One example input, used to retrieve the adapter, with its answer if the publisher gave one.

    `is_accepted`: it is a prompt of a client that the owner accepted.
    """

    input: str
    output: str | None = None
    is_accepted: bool = False
