from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pytest

from lora_store.events import Rank
from lora_store.feedback import Feedback
from lora_store.plan import Plan
from retriever_svc import NoAdapterMatched, Retriever, Route, RouteRequest
from retriever_svc.encoder import MAX_CHARS, tokens_read
from retriever_svc.route import Candidate
from retriever_svc.views import LONG_CHARS, choose_views, read_ends, split_views, tokens_routed, with_views
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, live_pool, names, record_of
from tests.retriever_svc.routing import EAST, NORTH, SOUTHWEST, retriever_of, route_one

PASSAGE = "The river rises in the hills and flows past three old mills. " * 8
MIDDLE = "It was first described by a travelling monk."
QUESTION = "Which tax rate applies to this invoice?"


def test_a_short_prompt_or_one_paragraph_is_read_as_a_whole() -> None:
    for text in ("", "hello", "one\n\ntwo", PASSAGE, f"\n\n{PASSAGE}\n \n", "x" * 10_000):
        assert split_views(text) == [text]


def test_a_long_prompt_has_its_first_and_last_paragraphs_as_views() -> None:
    text = f"{PASSAGE}\n\n{MIDDLE}\n \n{QUESTION}\n"
    passage = PASSAGE.strip()
    assert split_views(text) == [text, QUESTION, f"{MIDDLE}\n\n{QUESTION}", passage, f"{passage}\n\n{MIDDLE}"]
    assert split_views(text.replace("\n", "\r\n")) == split_views(text)
    for blank in ("\n\n", "\n\n\n", "\n \n", "\r\n\r\n"):
        assert split_views(f"{QUESTION}{blank}{passage}")[1:] == [passage, QUESTION], "none repeats the whole"
    polite = f"Hi,\n\n{passage}\n\nThanks"
    assert split_views(polite) == [polite, f"{passage}\n\nThanks", f"Hi,\n\n{passage}"], (
        "a part that says nothing is none"
    )
    long = "a" * (LONG_CHARS - 32) + "\n\n" + "b" * 30
    assert len(long) == LONG_CHARS and len(split_views(long)) == 3
    assert split_views(long[:-1]) == [long[:-1]]


def test_the_ends_of_a_text_beyond_what_is_read_have_their_views() -> None:
    for text in (QUESTION, "x" * MAX_CHARS):
        assert read_ends(text) == text
    long = "\n\n".join([QUESTION, *[f"{number}. {MIDDLE}" for number in range(1000)], PASSAGE.strip()])
    assert len(long) > 2 * MAX_CHARS and len(read_ends(long)) == MAX_CHARS
    assert split_views(read_ends(long))[1:] == split_views(long)[1:]
    assert tokens_routed(long) == tokens_routed(read_ends(long))


def test_each_view_counts_with_the_tokens_that_are_read_of_it() -> None:
    text = f"{PASSAGE}\n\n{MIDDLE}\n\n{QUESTION}"
    assert tokens_routed(text) == sum(map(tokens_read, split_views(text))) > 2 * tokens_read(text)
    assert tokens_routed(QUESTION) == tokens_read(QUESTION)


def test_each_view_is_a_request_like_its_own() -> None:
    long = RouteRequest(f"{QUESTION}\n\n{PASSAGE}", tenant="acme", abstain="strict", tags=("x",))
    views, places = with_views([RouteRequest("east"), long, RouteRequest("north")])
    assert places == [range(0, 1), range(1, 4), range(4, 5)]
    assert [view.text for view in views[1:4]] == split_views(long.text)
    assert {(view.tenant, view.abstain, view.tags) for view in views[1:4]} == {("acme", "strict", ("x",))}


def answer(*margins: float, outcomes: Sequence[float] = ()) -> Route:
    """Return a Route whose candidates are above their thresholds by these margins, and have these outcomes."""
    ref = record_of("a", EAST).ref
    given = zip(margins, outcomes or [0.0] * len(margins), strict=True)
    candidates = tuple(Candidate(ref, 0.5 + margin, 0.5, 0.5, outcome) for margin, outcome in given)
    return Route(Plan("base", generation=1), candidates, 1, abstained=max(margins, default=-1) < 0)


def test_the_view_nearest_to_its_best_adapter_decides() -> None:
    whole, refused = answer(0.3), NoAdapterMatched(0.2, 0.5)
    prompts = [
        ([whole], 0),
        ([whole, answer(-0.2), answer()], 0),
        ([whole, answer(0.1, -0.3), answer(0.05, 0.2), answer(-0.1)], 2),
        ([answer(-0.4), refused, answer(0.01)], 2),
        ([whole, answer(0.3), answer(0.4, 0.01, outcomes=(-1.0, 0.0))], 1),  # the nearest one there may not answer
        ([refused, refused], 0),
    ]
    answers, places = list[Route | NoAdapterMatched](), list[range]()
    for views, _ in prompts:
        places.append(range(len(answers), len(answers) + len(views)))
        answers += views
    expected = [own[chosen] for own, (_, chosen) in zip(places, prompts, strict=True)]
    assert choose_views(answers, places) == expected


def test_a_request_behind_or_before_other_text_finds_its_adapter() -> None:
    """The whole texts lie on the other side, where no adapter fits."""
    passage = PASSAGE.strip()
    behind, before = f"{passage}\n\n{MIDDLE}\n\n{QUESTION}", f"{QUESTION}\n\n{MIDDLE}\n\n{passage}"
    alone = f"{passage}\n\n{MIDDLE}\n\n{passage}"
    away = (-0.6, -0.8)
    others = {view: away for text in (behind, before, alone) for view in split_views(text)}
    encoder = FakeEncoder(others | {QUESTION: EAST})
    retriever = retriever_of(record_of("e", EAST), record_of("n", NORTH), encoder=encoder, ordinary=SOUTHWEST)
    for text in (behind, before):
        assert names(route_one(retriever, text, top_k=1)) == ["e"]
    nothing = route_one(retriever, alone)
    assert nothing.abstained
    np.testing.assert_allclose([candidate.score for candidate in nothing.candidates], [-0.6, -0.8], atol=1e-6)


def test_views_of_many_prompts_are_encoded_with_one_call_and_answered_in_order() -> None:
    long = f"{QUESTION}\n\n{PASSAGE.strip()}"
    encoder = FakeEncoder({view: NORTH for view in split_views(long)} | {"east": EAST})
    retriever = retriever_of(record_of("e", EAST), record_of("n", NORTH), encoder=encoder)
    encoder.batches.clear()
    first, second, third = retriever.route([RouteRequest(text, top_k=1) for text in ("east", long, "east")])
    assert [names(route) for route in (first, second, third) if isinstance(route, Route)] == [["e"], ["n"], ["e"]]
    assert encoder.batches == [["east", *split_views(long), "east"]]


@pytest.mark.parametrize(
    ("adapter", "score", "answering"),
    [("local/east", -1.0, []), (None, 1.0, []), ("local/up", 1.0, ["up"])],
    ids=["blame", "praise of the base model", "praise of another one"],
)
def test_an_outcome_counts_for_every_view_of_a_prompt_that_has_the_judged_one(
    adapter: str | None, score: float, answering: list[str]
) -> None:
    """The adapter in the east fits the question best, and a second view that is not near the question."""
    passage, other = PASSAGE.strip(), "Which country has the longest coast?"
    texts = [f"{passage}\n\n{MIDDLE}\n\n{question}" for question in (QUESTION, other)]
    table = {view: (0.0, 0.0, -1.0) for text in texts for view in split_views(text)}
    table |= {QUESTION: (0.8, 0.6, 0.0), f"{MIDDLE}\n\n{QUESTION}": (0.5, -0.866, 0.0), other: (0.6, -0.8, 0.0)}
    adapters = record_of("east", (1.0, 0.0, 0.0)), record_of("up", (0.0, 0.0, 1.0))
    source = Source(*adapters)
    pools = live_pool(FakeEncoder(table, dim=3), source)
    retriever = Retriever(pools, min_score=0.4)
    before = route_one(retriever, texts[0], top_k=1)
    assert (names(before), before.text) == (["east"], QUESTION)
    outcome = Feedback.of_request("id", before.text, adapter, "key", score)
    [learnt] = retriever.learn("local", [outcome], lambda record: []).rankings
    source.commit(*adapters, rankings={"local": (Rank("local", learnt, True, "me", datetime.now(UTC)),)})
    pools.catch_up()
    after = route_one(retriever, texts[0], top_k=1)
    assert (names(after), after.text) == (answering, QUESTION if answering else texts[0])
    assert names(route_one(retriever, texts[1], top_k=1)) == ["east"], "another question behind the same text"
