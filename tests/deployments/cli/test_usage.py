from __future__ import annotations

from tests.deployments.scripted import run_with

ROW = {"tenant": "acme", "adapter": None, "requests": 1200, "errors": 1, "prompt_tokens": 5, "cached_tokens": 2}
ROW |= {"completion_tokens": 3, "mean_s": 0.5, "p95_s": None, "last_at": "2026-11-29T12:00:00+00:00"}
REPORT = {"object": "usage", "start": "2026-11-01", "end": "2026-11-30", "tenant": None, "usage_days": 400}
REPORT |= {"data": [ROW]}


def test_the_report_is_asked_for_and_shown_by_group() -> None:
    options = ("--by", "tenant", "--by", "adapter", "--from", "2026-11-01", "--to", "2026-11-30", "--tenant", "acme")
    shown, printed = run_with(REPORT, "usage", *options), run_with(REPORT, "usage", *options, "--json")
    path = "/v1/usage?by=tenant&by=adapter&start=2026-11-01&end=2026-11-30&tenant=acme"
    assert shown.asked == printed.asked == [("GET", path)]
    assert printed.json == REPORT
    for part in ("2026-11-01 to 2026-11-30", "acme", "(none)", "1,200", "0.50"):
        assert part in shown.out
