"""Trials: another version of an adapter answers a share of its requests, or a copy of them that no client sees."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from lora_store.adapter import AdapterRef

_DRAWN_BITS = 64


@dataclass(frozen=True, slots=True)
class Trial:
    """A version of the same name as the live one, and its share of the requests that name no version.

    With `is_shadow` the live version answers them all. A copy of the share goes to the other version as well; its
    answers are measured and dropped.
    """

    digest: str
    share: float  # above 0, at most 1
    is_shadow: bool = False

    def includes(self, key: str) -> bool:
        """Return whether the request with this key belongs to the share, always the same for the same key.

        A larger share of the same version includes the requests of a smaller one.
        """
        drawn = hashlib.sha256(f"{self.digest}\0{key}".encode()).digest()[: _DRAWN_BITS // 8]
        return bool(int.from_bytes(drawn, "big") < self.share * 2**_DRAWN_BITS)

    def to_json(self) -> str:
        return json.dumps({"digest": self.digest, "share": self.share, "is_shadow": self.is_shadow})

    @classmethod
    def from_json(cls, text: str) -> Trial:
        values: dict[str, Any] = json.loads(text)
        return cls(values["digest"], values["share"], values["is_shadow"])


@dataclass(frozen=True, slots=True)
class TrialVersion:
    """A version under trial that may take the place of a plan's adapter `live`."""

    live: AdapterRef
    ref: AdapterRef
    weights_digest: str
    trial: Trial
