from __future__ import annotations

import json
from typing import Any

import pytest

from tests.deployments.scripted import refusal, run_with

DIGEST = "d" * 64
POET = {"id": "acme/poet", "digest": DIGEST, "visibility": "public", "num_samples": 20, "tags": ["fun"]}
POET |= {"created_at": "2026-01-02"}
DRAWS = {"needs_confirmation": False, "text": "poet would answer 0.0% of ordinary prompts."}
MANY = {"needs_confirmation": True, "text": "poet would answer 75.0% of the samples of globex/rhymes."}
APPROVED = {"name": "poet", "digest": DIGEST, "draws": DRAWS, "generation": 5}
APPROVAL = ("POST", "/v1/loras/acme%2Fpoet/approve")
SHOWN_AND_CHECKED = [("GET", "/v1/loras/acme%2Fpoet"), ("POST", "/v1/loras/acme%2Fpoet/approve?dry_run=true")]
APPROVE = ("access", "approve", "acme/poet")


@pytest.mark.parametrize("wanted", ["public", "private"])
def test_an_adapter_is_made_public_or_private(wanted: str) -> None:
    said = run_with({"name": "poet", "visibility": wanted, "generation": 7}, "access", wanted, "acme/poet")
    assert (said.asked, said.sent) == ([("PATCH", "/v1/loras/acme%2Fpoet")], [{"visibility": wanted}])
    assert f"poet is {wanted} at generation 7" in said.out


def test_the_version_with_the_given_digest_is_approved_and_can_be_confirmed() -> None:
    given = (*APPROVE, "--digest", DIGEST)
    said = run_with(APPROVED, *given)
    assert (said.asked, said.sent) == ([APPROVAL], [{"digest": DIGEST}])
    assert f"poet {'d' * 12} is approved at generation 5" in said.out
    draws_many = refusal("confirmed: must be true to approve this version. poet would answer 75.0% of …")
    refused = run_with((400, draws_many), *given)
    assert (refused.code, "--confirmed: must be true" in refused.err) == (1, True)
    confirmed = run_with(APPROVED | {"draws": MANY}, *given, "--confirmed")
    assert (confirmed.code, confirmed.sent) == (0, [{"digest": DIGEST, "confirmed": True}])


@pytest.mark.parametrize("given", [(), ("--digest", DIGEST)])
def test_a_dry_run_shows_what_a_version_would_draw_and_approves_nothing(given: tuple[str, ...]) -> None:
    said = run_with([(200, POET), (200, APPROVED)], *APPROVE, *given, "--dry-run")
    assert (said.code, said.asked) == (0, SHOWN_AND_CHECKED)
    assert DRAWS["text"] in said.out


@pytest.mark.parametrize(
    ("typed", "is_approved", "draws"),
    [("y\n", True, DRAWS), ("y\n", True, MANY), ("n\n", False, MANY), ("", False, DRAWS)],
)
def test_without_a_digest_the_shown_version_is_approved_after_confirmation(
    typed: str, is_approved: bool, draws: dict[str, Any]
) -> None:
    answers = [(200, POET), (200, APPROVED | {"draws": draws}), (200, APPROVED)]
    said = run_with(answers, *APPROVE, input=typed)
    assert DIGEST in said.out and draws["text"] in said.out + said.err
    assert said.asked == SHOWN_AND_CHECKED + [APPROVAL] * is_approved
    confirmed = {"confirmed": True} if draws is MANY else {}
    assert said.sent[1:] == [{"digest": DIGEST}] + [{"digest": DIGEST} | confirmed] * is_approved
    assert (said.code == 0) == is_approved


def test_a_confirmed_approval_prints_only_the_answer_as_json() -> None:
    said = run_with([(200, POET), (200, APPROVED), (200, APPROVED)], *APPROVE, "--json", input="y\n")
    echo, _, answer = said.stdout.partition("\n")  # a terminal echoes what is typed
    assert (echo, json.loads(answer)) == (" y", APPROVED)
    assert DRAWS["text"] in said.err


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([(200, POET), (403, refusal("this operation needs the role 'admin'"))], "needs the role 'admin'"),
        (
            [(200, POET | {"visibility": "private"})],
            "'acme/poet' is private: make it public first with `loraretriever access public",
        ),
    ],
)
def test_an_approval_that_the_server_would_refuse_is_not_asked_for(answers: list[Any], says: str) -> None:
    said = run_with(answers, *APPROVE, input="y\n")
    assert (said.code, len(said.asked), said.stdout) == (1, len(answers), "")
    assert says in said.err
