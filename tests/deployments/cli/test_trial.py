from __future__ import annotations

from typing import Any

import pytest

from tests.deployments.scripted import run, run_with, words

TRIAL = {"digest": "e" * 64, "share": 0.1, "shadow": False}
SHARE = [("POST", "/v1/loras/poet/share")]


@pytest.mark.parametrize(
    ("options", "body", "trial", "says"),
    [
        (("10", "--version", "e" * 8), {"share": 0.1, "shadow": False, "digest": "e" * 8}, TRIAL, "answers 10 %"),
        (("50", "--shadow"), {"share": 0.5, "shadow": True}, TRIAL | {"share": 0.5, "shadow": True}, "shadows 50 %"),
    ],
)
def test_a_trial_sends_the_share_and_prints_who_answers(
    options: tuple[str, ...], body: dict[str, Any], trial: dict[str, Any], says: str
) -> None:
    said = run_with({"name": "poet", "trial": trial, "generation": 9}, "trial", "start", "poet", *options)
    assert (said.asked, said.sent) == (SHARE, [body])
    assert says in said.out and "since generation 9" in said.out


def test_promote_makes_the_version_under_trial_live() -> None:
    answers = [(200, {"id": "poet", "trial": TRIAL}), (201, {"name": "poet", "digest": "e" * 64, "generation": 9})]
    said = run_with(answers, "trial", "promote", "poet")
    assert said.sent[-1] == {"digest": "e" * 64} and f"poet is live as {'e' * 12}" in said.out
    none = run_with({"id": "poet", "trial": None}, "trial", "promote", "poet")
    assert none.code == 1 and "no version of 'poet' is under trial" in none.err


def test_stop_ends_the_trial() -> None:
    said = run_with({"name": "poet", "trial": None, "generation": 9}, "trial", "stop", "poet")
    assert (said.asked, said.sent) == (SHARE, [{"share": 0}])
    assert "the live version answers every request since generation 9" in said.out


@pytest.mark.parametrize("percent", ["0", "101", "-1"])
def test_a_share_outside_of_its_range_is_refused_with_the_way_to_end_a_trial(percent: str) -> None:
    result = run("trial", "start", "poet", "--", percent)
    assert result.exit_code == 2
    assert "must be above 0 and at most 100" in words(result.stderr)
    assert "`loraretriever trial stop poet` ends a trial" in words(result.stderr)
