"""The authenticated caller: its tenant, the roles of its key, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import RoleMissing
from lora_store import LOCAL_TENANT, TenantQuota

Role = Literal["infer", "publish", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)


class KeyLimits(BaseModel):
    """Limits of one key; None means unlimited. `max_adapters` and `max_bytes` apply to the tenant's whole pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(default=None, ge=1)
    # counts prompts, answers, and text that the encoder reads
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)  # rows in progress: prompts × n over all requests
    max_adapters: int | None = Field(default=None, ge=0)
    max_bytes: int | None = Field(default=None, ge=0)  # of weights, including older versions

    @property
    def tenant_quota(self) -> TenantQuota | None:
        if self.max_adapters is None and self.max_bytes is None:
            return None
        return TenantQuota(self.max_adapters, self.max_bytes)


_NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated client. No role implies another. The catalogue records `key_id` as the author of changes."""

    tenant: str
    roles: frozenset[Role]
    key_id: str
    limits: KeyLimits = _NO_LIMITS

    def require(self, role: Role) -> None:
        """Check that the caller has `role`. Raises: RoleMissing."""
        if role not in self.roles:
            raise RoleMissing(self.key_id, role)


ANONYMOUS_TENANT = ""  # no tenant has this name; it sees public adapters only
LOCAL_CALLER = Caller(LOCAL_TENANT, frozenset(ROLES), "local")
"""The caller where no keys are set, and the default caller of Ray handles."""
