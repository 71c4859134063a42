"""A fake encoder that a projection can follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retriever_svc.whitening import Whitening
from tests.retriever_svc.pool_fakes import FakeEncoder


class Projectable(FakeEncoder):
    """A fake encoder with the projections of the real one."""

    def projected(self, projection: Whitening | None) -> Projectable:
        identity = self.identity if projection is None else projection.identity
        other = Projectable(self._table, self.dim, identity)
        other.projection = projection
        return other

    def encode(self, texts: Sequence[str], owners: Sequence[str] | None = None) -> np.ndarray:
        rows = self.encode_plain(texts, owners)
        return rows if self.projection is None else self.projection.project(rows)
