"""Keys files for tests, and keys that go with them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.auth.api_keys import hash_of
from deployments.auth.authenticator import ROLES


def entry(key: str, tenant: str = "acme", roles: Sequence[str] = ROLES, **more: Any) -> dict[str, Any]:
    """The entry of `key`, whose id says which key it is."""
    return {"id": f"id-{key}", "sha256": hash_of(key), "tenant": tenant, "roles": list(roles), **more}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    """The file with these entries, replaced as an operator should: in one step."""
    made = path.with_suffix(".new")
    made.write_text(json.dumps(entries))
    os.replace(made, path)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def keys_of_all_roles(folder: Path) -> Path:
    """Write one key for everything, and one for each role alone."""
    return write(folder / "keys.json", entry("all"), *[entry(role, roles=[role]) for role in ROLES])
