"""Keys files for tests, and matching keys."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.auth.api_keys import hash_key
from deployments.auth.authenticator import ROLES


def entry(key: str, tenant: str = "acme", roles: Sequence[str] = ROLES, **more: Any) -> dict[str, Any]:
    """Return the entry of `key`. Its id identifies the key."""
    return {"id": f"id-{key}", "sha256": hash_key(key), "tenant": tenant, "roles": list(roles), **more}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    """Write the file with these entries, replacing it atomically as an operator should."""
    made = path.with_suffix(".new")
    made.write_text(json.dumps(entries))
    os.replace(made, path)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def keys_of_all_roles(folder: Path) -> Path:
    """Write one key with all roles, and one for each role."""
    return write(folder / "keys.json", entry("all"), *[entry(role, roles=[role]) for role in ROLES])
