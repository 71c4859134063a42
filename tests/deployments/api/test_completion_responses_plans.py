from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.api.completion_responses import plan_object
from deployments.api.responses import Planned
from lora_store import BASE_PLAN, Trial
from lora_store.trials import TrialVersion
from retriever_svc import Candidate
from tests.deployments.adapter_records import adapter
from tests.deployments.shown_plans import CODER, PLAN, POET

NEAR = Candidate(POET.ref, 0.4567, threshold=0.5, confidence=0.02)
FAR = Candidate(CODER.ref, 0.47, threshold=0.6, confidence=0.001)
FITS = Candidate(CODER.ref, 0.75, threshold=0.5, confidence=0.625)


def explained(planned: Planned, tenant: str = "local") -> tuple[str | None, str | None]:
    shown = plan_object(planned, tenant, explain=True)
    return shown.get("reason"), shown.get("why")


def test_an_abstention_names_the_adapter_that_lacks_least_and_what_would_choose_it() -> None:
    reason, why = explained(Planned(BASE_PLAN, (FAR, NEAR), abstained=True, reason="below_threshold"))
    assert reason == "below_threshold"
    assert why == (
        "No adapter fits, so the base model answers. poet comes nearest: it scores 0.457 and needs 0.500. "
        "lora.min_score 0.456 would choose it."
    )
    assert NEAR.score >= 0.456


def test_a_choice_says_how_well_the_best_candidate_fits() -> None:
    plan = replace(PLAN, adapters=(replace(PLAN.adapters[0], ref=CODER.ref),))
    reason, why = explained(Planned(plan, (NEAR, FITS), reason="fits"), tenant="us")
    assert reason == "fits"
    assert why == ("local/coder fits: it scores 0.750 and needs 0.500, and is right with a probability of about 62%.")


def test_a_choice_is_explained_by_the_adapter_that_leads_it() -> None:
    wide = Candidate(CODER.ref, 0.6, threshold=0.1, confidence=0.9)  # further above its threshold
    _, why = explained(Planned(PLAN, (Candidate(POET.ref, 0.75, 0.7, 0.5), wide), reason="fits"))
    assert why is not None and why.startswith("poet fits: it scores 0.750 and needs 0.700")
    assert "previous turn" not in why


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_choice_is_explained_by_the_live_version_of_the_one_that_answers(share: float) -> None:
    new = adapter("poet", version="new")
    trial = TrialVersion(POET.ref, new.ref, new.weights_digest, Trial(new.ref.digest, share))
    wide = Candidate(CODER.ref, 0.6, threshold=0.1, confidence=0.9)  # further above its threshold
    routed = Planned(replace(PLAN, trials=(trial,)), (Candidate(POET.ref, 0.75, 0.7, 0.5), wide), reason="fits")
    drawn = routed.drawn("request/0")
    assert drawn.plan.adapters[0].ref == (new.ref if share else POET.ref)
    _, why = explained(drawn)
    assert why is not None and why.startswith("poet fits: it scores 0.750 and needs 0.700")


@pytest.mark.parametrize(("needs", "stays"), [(0.5, True), (0.9, False)])
def test_an_adapter_that_stays_for_the_next_turn_is_explained(needs: float, stays: bool) -> None:
    nearer = Candidate(CODER.ref, 0.8, threshold=needs)  # if it does not fit, there is nothing to explain
    _, why = explained(Planned(PLAN, (nearer, Candidate(POET.ref, 0.75, 0.5, 0.5)), reason="fits"))
    assert why is not None
    said = " It answered the previous turn and stays: coder scores 0.800, which is not clearly better."
    assert why.endswith(said) == stays


def test_a_pool_without_candidates_and_a_clients_own_prompt_have_their_reasons() -> None:
    for reason, said in (("no_candidates", "no adapter with samples"), ("housekeeping", "the client's own")):
        planned = Planned(BASE_PLAN, abstained=True)
        found, why = explained(replace(planned, reason=reason))
        assert found == reason and why is not None
        assert said in why


@pytest.mark.parametrize(("tags", "said"), [(("a",), "and the tag 'a'"), (("a", "b"), "and the tags 'a' and 'b'")])
def test_a_choice_by_tags_without_candidates_names_the_tags(tags: tuple[str, ...], said: str) -> None:
    _, why = explained(Planned(BASE_PLAN, abstained=True, reason="no_candidates", tags=tags))
    assert why == f"The pool has no adapter with samples {said} that this request may use, so the base model answers."


def test_named_adapters_need_no_reason_and_explanations_come_on_request_only() -> None:
    assert explained(Planned(PLAN)) == (None, None)
    assert "why" not in plan_object(Planned(PLAN, (FITS,), reason="fits"), "local", explain=False)


def test_candidates_carry_their_threshold_and_confidence() -> None:
    shown = plan_object(Planned(BASE_PLAN, (NEAR,), abstained=True, reason="below_threshold"), "local", explain=True)
    assert shown["candidates"] == [
        {"name": "poet", "digest": POET.ref.digest, "score": 0.4567, "threshold": 0.5, "confidence": 0.02}
    ]
