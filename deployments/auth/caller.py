"""Who asks: a tenant, what its key may do, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import RoleMissing
from lora_store import LOCAL_TENANT, TenantQuota

Role = Literal["infer", "publish", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)


class KeyLimits(BaseModel):
    """What one key may use; None = any amount. The share of the pool is what its tenant may hold after its publish."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(default=None, ge=1)
    # Of prompts and answers, and of what the encoder reads.
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)  # rows at once: prompts × n over all requests
    max_adapters: int | None = Field(default=None, ge=0)
    max_bytes: int | None = Field(default=None, ge=0)  # of weights, kept older versions included

    @property
    def pool_share(self) -> TenantQuota | None:
        if self.max_adapters is None and self.max_bytes is None:
            return None
        return TenantQuota(self.max_adapters, self.max_bytes)


_NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """`roles` do not include one another. `key_id` stands in the catalogue as the actor of what was changed."""

    tenant: str
    roles: frozenset[Role]
    key_id: str
    limits: KeyLimits = _NO_LIMITS

    def require(self, role: Role) -> None:
        """Raises: RoleMissing."""
        if role not in self.roles:
            raise RoleMissing(self.key_id, role)


ANONYMOUS_TENANT = ""  # no tenant has this name: it sees what is public
LOCAL_CALLER = Caller(LOCAL_TENANT, frozenset(ROLES), "local")
"""Whoever asks where there are no keys, and who calls through a Ray handle and names nobody else."""
