"""SECURITY.md names settings, roles and paths that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from deployments.auth.authenticator import ROLES
from deployments.config.app import AppConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "SECURITY.md").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_every_setting_and_role_that_it_names_exists() -> None:
    named = set(re.findall(r"`([a-z]+_[a-z_]+)(?:: (?:true|false))?`", PAGE))
    assert len(named) >= 8
    assert named - {"auth_token"} <= AppConfig.model_fields.keys()
    assert tuple(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == ROLES


def test_it_supports_the_current_version_and_is_linked_with_sections_that_exist() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"now {version.rpartition('.')[0]}." in PAGE
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
    assert "## Ports\n" in (ROOT / "docs" / "explanation" / "security-model.md").read_text()
    assert "## Who may reach what\n" in (ROOT / "k8s" / "README.md").read_text()


def test_the_actions_of_workflows_are_named_by_commit() -> None:
    used = [found for file in WORKFLOWS for found in re.findall(r"uses: (.*)", file.read_text())]
    assert len(used) >= 9 and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action) for action in used), used
