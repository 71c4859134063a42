"""The keys of a row's blocks in the prefix cache.

Keys and values of a token depend on the tokens before it and on the composition that computed it. So a block's key is
a chained hash over both: key(i) = sha256(key(i - 1), tokens of block i), where key(-1) is the row's namespace. A
namespace is the digest of tenant, composition, and each adapter's weights digest and weight.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Sequence
from hashlib import sha256

from lora_store.plan import Plan


class Prefix:
    """The keys of one row's full blocks, computed when asked for. `tokens`: the row's own list, which grows."""

    def __init__(
        self, tokens: Sequence[int], namespace: bytes, weights_digests: Collection[str], block_tokens: int
    ) -> None:
        self.weights_digests = weights_digests
        self._tokens, self._block_tokens = tokens, block_tokens
        self._last, self._keys = namespace, list[bytes]()

    def key(self, block: int) -> bytes:
        """Return the key of a full block."""
        while len(self._keys) <= block:
            start = len(self._keys) * self._block_tokens
            ids = self._tokens[start : start + self._block_tokens]
            assert len(ids) == self._block_tokens, "only full blocks have a key"
            self._last = sha256(self._last + array("I", ids).tobytes()).digest()
            self._keys.append(self._last)
        return self._keys[block]


def make_namespace(plan: Plan, tenant: str, *, shares_base: bool) -> bytes:
    """Return the digest of the tenant and the composition. Equal compositions have equal digests.

    An adapter of weight 0 changes nothing. `shares_base`: prompts without adapters share blocks among tenants.
    """
    members = sorted((each.weights_digest, float(each.weight).hex()) for each in plan.adapters if each.weight != 0)
    composition = "base" if not members else "fusion" if plan.averages_parameters else "mixture"
    owner = [] if shares_base and not members else [tenant]
    return sha256(json.dumps([owner, composition, members]).encode()).digest()
