"""Texts that are not in the code: of request fields, and of settings without a comment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def load(name: str) -> Mapping[str, Any]:
    """Return the texts of `fields` or `settings`."""
    texts: Mapping[str, Any] = yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))
    return texts
