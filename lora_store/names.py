"""Model names that stand for a policy: which adapters answer, how they are composed, and with which sampling."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from lora_store.adapter import AdapterRef

KEPT_POLICIES = 16  # versions of one name; `name@digest` and rollback can use these
MAX_NAMES = 256  # a tenant may have this many
MAX_POLICY_CHARS = 16_384
_MAX_SHORTENED = 1024  # policies that are remembered: clients poll the list of models


@dataclass(frozen=True, slots=True)
class NamedPolicy:
    """One version of a name.

    `policy`: JSON, from which the digest of `ref` is made; "" removes the name. `approved`: every tenant may use it.
    `base_model`: that of the adapter that the policy names, where several are served. It is not stored: the adapter's
    next version may have another one.
    """

    ref: AdapterRef
    policy: str
    actor: str
    created_at: datetime  # UTC
    approved: bool = False
    base_model: str = ""


def policy_digest(policy: str) -> str:
    """Return the digest of a policy."""
    return hashlib.sha256(policy.encode()).hexdigest()


@lru_cache(_MAX_SHORTENED)
def shorten_policy(policy: str) -> str:
    """Return the fields of a policy that are texts or numbers, for a list that shows no others.

    `model` is the first adapter that it names, if it names one.
    """
    short = {name: value for name, value in json.loads(policy).items() if isinstance(value, str | float | int)}
    return json.dumps(short | ({"model": adapter} if (adapter := find_first_adapter(policy)) else {}))


@lru_cache(_MAX_SHORTENED)
def find_first_adapter(policy: str) -> str:
    """Return the first adapter that a stored policy names, as `owner/name`, "" if it names none."""
    fields = json.loads(policy)
    try:
        name = fields["lora"]["adapters"][0]["name"]
    except (LookupError, TypeError):
        name = fields.get("model")
    return name if isinstance(name, str) and "/" in name else ""
