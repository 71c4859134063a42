"""A cache of the tests whose free pages hold NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_worker.native.attention.kv_cache import KvShape
from gpu_worker.native.attention.kv_pages import HostKvCache


class Poisoned(HostKvCache):
    """A cache in host memory without the compiled kernel, in which pages hold NaN unless a row has written them."""

    def __init__(self, shape: KvShape) -> None:
        super().__init__(shape)
        for store in self.stores:
            store.fill_(torch.nan)

    def _wipe(self, group: int, pages: Sequence[int]) -> None:
        self.stores[group][:, :, :, list(pages)] = torch.nan
