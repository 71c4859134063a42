from __future__ import annotations

from typing import Any

import pytest

from deployments.cli.publish_report import describe_outcome

PLAIN = {"name": "poet", "generation": 4, "found_by_auto": True, "replicas": {"ready": 1, "behind": 0}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"kept": {"tags": ["support", "eu"], "template": None, "visibility": "public"}}
            | {"changed": {"samples": {"from": 20, "to": 0}}},
            "; tags: support, eu (kept); samples: none (was 20)",
        ),
        (
            {"kept": {"visibility": "private"}, "changed": {"template": {"from": "alpaca", "to": None}}},
            "; template: the server's (was alpaca); visibility: private (kept)",
        ),
        (
            {"found_by_auto": False, "expires_at": "2026-01-02T03:04:05.678901+00:00"},
            " (by name only, until 2026-01-02T03:04:05 UTC)",
        ),
        ({"replicas": {"ready": 1, "behind": 2}}, " (2 replicas are not up to date yet)"),
    ],
)
def test_the_line_of_a_version_says_what_it_keeps_and_changes(changes: dict[str, Any], says: str) -> None:
    assert describe_outcome(PLAIN | changes, is_dry=False) == f"poet is live at generation 4{says}"
