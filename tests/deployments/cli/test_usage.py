from __future__ import annotations

import json

from tests.deployments.scripted import refusal, run, scripted, words

_COUNTS = {"requests": 1200, "errors": 1, "prompt_tokens": 5, "cached_tokens": 2, "completion_tokens": 3}
REPORT = {
    "object": "usage",
    "start": "2026-11-01",
    "end": "2026-11-30",
    "data": [
        {
            "tenant": "acme",
            "adapter": None,
            **_COUNTS,
            "mean_s": 0.5,
            "p95_s": None,
            "last_at": "2026-11-29T12:00:00+00:00",
        }
    ],
}


def test_the_report_is_asked_for_and_shown_by_group() -> None:
    options = ("--by", "tenant", "--by", "adapter", "--from", "2026-11-01", "--to", "2026-11-30", "--tenant", "acme")
    with scripted((200, REPORT), (200, REPORT)) as server:
        shown = run("usage", *options, "--url", server.url)
        printed = run("usage", *options, "--json", "--url", server.url)
    path = "/v1/usage?by=tenant&by=adapter&start=2026-11-01&end=2026-11-30&tenant=acme"
    assert server.asked == [("GET", path)] * 2
    assert json.loads(printed.stdout) == REPORT
    for part in ("2026-11-01 to 2026-11-30", "acme", "(none)", "1,200", "0.50"):
        assert part in words(shown.stdout)


def test_a_refusal_names_the_option_that_was_typed() -> None:
    with scripted((400, refusal("start: 2026-12-01 is after end, 2026-11-30; give an earlier day"))) as server:
        result = run("usage", "--from", "2026-12-01", "--url", server.url)
    assert result.exit_code == 1 and words(result.stderr).startswith("--from: 2026-12-01 is after")
