"""SECURITY.md names settings, roles and paths that exist."""

from __future__ import annotations

import re
import tomllib

from deployments.auth.authenticator import ROLES
from deployments.config.app import AppConfig
from tests.docs.pages import ROOT, blocks_of

PORTS = ROOT / "docs" / "explanation" / "security-model.md"
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
    assert "## Ports\n" in PORTS.read_text()
    assert "## Who may reach what\n" in (ROOT / "k8s" / "README.md").read_text()


def test_the_firewall_drops_every_port_of_rays_from_addresses_of_both_kinds() -> None:
    rules = [line.partition(" input ")[2] for block in blocks_of(PORTS) for line in block.text.splitlines()]
    [own, nodes, drop] = [rule for rule in rules if rule.endswith((" accept", " drop"))]
    assert own == "iif lo accept" and re.fullmatch(r"ip saddr \{ [\d., ]+ \} accept", nodes)
    matched = re.fullmatch(r"tcp dport \{ (.*) \} ct state new drop", drop)
    assert matched, "a match of addresses is of one kind only: ip for IPv4, ip6 for IPv6"
    ranges = [[int(port) for port in part.split("-")] for part in matched[1].split(", ")]
    for port in (6379, 8265, 9464, 10_001, 52_365, 65_535):  # of Ray, and --metrics-port
        assert any(part[0] <= port <= part[-1] for part in ranges), port
    assert not any(part[0] <= 8000 <= part[-1] for part in ranges)


def test_the_actions_of_workflows_are_named_by_commit() -> None:
    used = [found for file in WORKFLOWS for found in re.findall(r"uses: (.*)", file.read_text())]
    assert len(used) >= 9 and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action) for action in used), used
