"""What accepted prompts and outcomes change, and that neither may harm the samples that publishers chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from lora_store.adapter import Sample, is_valid_name
from lora_store.bounded_files import Limits
from lora_store.events import Rank
from lora_store.feedback import MAX_PER_KEY, Feedback
from lora_store.rankings import OUTCOME, Ranking
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from retriever_svc import IndexSettings, Retriever
from retriever_svc.doctor import examine
from retriever_svc.draws import DrawMeasurement
from retriever_svc.encoder import unit_rows
from retriever_svc.learning import MAX_OUTCOMES, OWN_PER_ACCEPTED, Effect, Learnt, Refused, Resampled, accept, learn
from retriever_svc.ordinary_prompts import bare_words, ordinary_prompts
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, live_pool, names, record_of, snapshot_of
from tests.retriever_svc.routing import route_one

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
DIM = 4


def near(axis: int, step: float, towards: int = 3) -> np.ndarray:
    """Return a unit vector near an axis, `step` towards another one."""
    vector = np.zeros(DIM, np.float32)
    vector[axis], vector[towards] = 1.0, step
    return unit_rows(vector)


POET_TEXTS = [f"poem {number}" for number in range(6)]
CODER_TEXTS = [f"code {number}" for number in range(6)]
TABLE: dict[str, np.ndarray] = {
    **{text: near(0, 0.1 * number) for number, text in enumerate(POET_TEXTS)},
    **{text: near(1, 0.1 * number) for number, text in enumerate(CODER_TEXTS)},
    # Far enough from every sample that an outcome for them does not reach one.
    **{"rhyme please": near(0, 2.5, towards=2), "rhyme now": near(0, -2.5, towards=2), "odd": near(2, 0.0, towards=3)},
}
SAMPLES = {"poet": [*map(Sample, POET_TEXTS)], "coder": [*map(Sample, CODER_TEXTS)]}
ENCODER = FakeEncoder(TABLE, dim=DIM)


def record(name: str, texts: Sequence[str], **fields: object) -> AdapterRecord:
    vectors = np.stack([TABLE[text] for text in texts])
    return record_of(name, unit_rows(vectors.mean(axis=0)), num_samples=len(texts), **fields)  # type: ignore[arg-type]


POET, CODER = record("poet", POET_TEXTS), record("coder", CODER_TEXTS)


def pool_of(*records: AdapterRecord, ordinary: np.ndarray | None = None, **fields: object) -> Pool:
    snapshot = snapshot_of(*(records or (POET, CODER)), **fields)
    return Pool.of(snapshot, ENCODER, IndexSettings(), ordinary=ordinary)  # type: ignore[arg-type]


def accepted(texts: Sequence[str], own: Mapping[str, Sequence[Sample]] = SAMPLES, **fields: object) -> Resampled:
    return accept(pool_of(**fields), POET, texts, lambda r: own[r.ref.name], "balanced")  # type: ignore[arg-type]


def test_an_accepted_prompt_is_a_sample_beside_the_publishers() -> None:
    found = accepted(["rhyme please"])
    assert [*found.samples[:6]] == SAMPLES["poet"]
    assert found.samples[6:] == (Sample("rhyme please", is_accepted=True),)
    assert (found.left_out, found.effect.refusal) == ((), None)


def test_near_copies_of_samples_and_of_each_other_count_once() -> None:
    table = {"rhyme again": near(0, 2.4, towards=2), "poem 0!": near(0, 0.01)}
    encoder = FakeEncoder({**TABLE, **table}, dim=DIM)
    pool = Pool.of(snapshot_of(POET, CODER), encoder, IndexSettings())
    texts = ["rhyme please", "rhyme again", "poem 0!"]
    found = accept(pool, POET, texts, lambda r: SAMPLES[r.ref.name], "balanced")
    assert [sample.input for sample in found.samples if sample.is_accepted] == ["rhyme please"]
    assert found.left_out == ("rhyme again", "poem 0!")


def test_at_most_a_quarter_of_the_rows_are_accepted_and_new_ones_push_out_the_oldest() -> None:
    earlier = [Sample("rhyme now", is_accepted=True), Sample("odd", is_accepted=True)]
    own = {**SAMPLES, "poet": [*SAMPLES["poet"], *earlier]}
    found = accepted(["rhyme please"], own)
    taken = [sample.input for sample in found.samples if sample.is_accepted]
    assert taken == ["rhyme please", "rhyme now"]
    assert len(taken) == len(SAMPLES["poet"]) // OWN_PER_ACCEPTED
    assert 4 * len(taken) <= len(found.samples)
    found = accepted(["rhyme please", "rhyme now", "odd"])
    assert [sample.input for sample in found.samples if sample.is_accepted] == ["rhyme please", "rhyme now"]
    assert found.left_out == ("odd",)


def test_accepted_prompts_keep_to_the_limits_of_samples() -> None:
    table = {**TABLE, "odd" * 3: TABLE["odd"]}
    pool, texts = Pool.of(snapshot_of(POET, CODER), FakeEncoder(table, dim=DIM), IndexSettings()), ["odd" * 9, " "]
    for max_samples, num in ((6, 0), (7, 1)):
        limits = Limits(max_samples=max_samples, max_sample_bytes=9)
        found = accept(pool, POET, texts, lambda r: SAMPLES[r.ref.name], "balanced", limits=limits)
        assert len(found.samples) == max_samples
        assert found.samples[6:] == (Sample("odd" * 3, is_accepted=True),)[:num], "it is cut as a publisher's is"
        assert found.left_out == (" ", "odd" * 3)[: 2 - num]


def test_a_liar_cannot_take_a_victims_prompts() -> None:
    """The attacker names its adapter in requests with the victim's prompts, and accepts all that are proposed."""
    lies = [f"lie {number}" for number in range(20)]
    table = {**TABLE, **{text: near(1, 0.05 * number, towards=2) for number, text in enumerate(lies)}}
    encoder = FakeEncoder(table, dim=DIM)
    pool = Pool.of(snapshot_of(POET, CODER), encoder, IndexSettings())
    found = accept(pool, POET, lies, lambda r: SAMPLES[r.ref.name], "balanced")
    rows = np.stack([table[sample.input] for sample in found.samples])
    after = Retriever(
        live_pool(encoder, Source(record_of("poet", unit_rows(rows.mean(axis=0))), CODER)), min_score=-1.0
    )
    assert [names(route_one(after, text))[0] for text in CODER_TEXTS] == ["coder"] * 6


def test_a_change_that_costs_publishers_their_samples_is_refused() -> None:
    texts = [f"poem {number}" for number in range(6)]
    stray = {text: near(0, 0.0) for text in texts} | {"far": near(1, 0.0)}
    beside = record_of("beside", near(0, 0.1, towards=1), num_samples=1)
    encoder = FakeEncoder({**stray, "beside": near(0, 0.1, towards=1)}, dim=DIM)
    poet = record_of("poet", near(0, 0.0), num_samples=6)
    own = {"poet": [*map(Sample, texts)], "beside": [Sample("beside")]}
    pool = Pool.of(snapshot_of(poet, beside), encoder, IndexSettings())
    kept = accept(pool, poet, [], lambda r: own[r.ref.name], "balanced")
    assert kept.effect.refusal is None
    found = accept(pool, poet, ["far"], lambda r: own[r.ref.name], "balanced")
    assert found.effect.refusal is not None and "samples" in found.effect.refusal


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [((100, 100), (0, 0), None), ((100, 99), (0, 0), "1 of 100 samples"), ((100, 100), (7, 8), "8 of 400 ordinary")],
)
def test_the_bounds_of_a_change(before: tuple[int, int], after: tuple[int, int], says: str | None) -> None:
    effect = Effect(100, *before, 400, *after)
    assert (effect.refusal is None) if says is None else says in (effect.refusal or "")
    assert Effect(1000, 100, 91, 400, 9, 9).refusal is None, "less than one in a hundred, and no worse than before"


def test_ordinary_prompts_that_an_adapter_would_answer_are_counted() -> None:
    ordinary = np.stack([near(2, 0.02 * number) for number in range(40)])
    table = {**TABLE, **{f"hello {number}": near(2, 0.3 + 0.2 * number, towards=1) for number in range(2)}}
    encoder = FakeEncoder(table, dim=DIM)
    small = record_of("poet", near(0, 0.0), num_samples=6)
    pool = Pool.of(snapshot_of(small, CODER), encoder, IndexSettings(), ordinary=ordinary)
    own = {**SAMPLES, "poet": [Sample("poem 0")] * 6}
    effect = accept(pool, small, ["hello 0", "hello 1"], lambda r: own[r.ref.name], "never").effect
    assert (effect.num_ordinary, effect.answered_before, effect.answered_after) == (40, 40, 40)
    strict = accept(pool, small, ["hello 0", "hello 1"], lambda r: own[r.ref.name], "strict").effect
    assert strict.answered_before == 0
    least = accept(pool, small, ["hello 0", "hello 1"], lambda r: own[r.ref.name], "strict", min_score=-1.0).effect
    assert least.answered_before == 40, "requests without their own operating point use it, too"


def test_bare_words_and_other_ordinary_prompts_are_bounded_apart() -> None:
    is_word = bare_words(len(ordinary_prompts()))
    small = record_of("poet", near(0, 0.0), num_samples=6)
    for mask, num in ((is_word, 616), (~is_word, 517)):
        ordinary = np.where(mask[:, np.newaxis], near(0, 0.0), near(2, 0.0))
        pool = Pool.of(snapshot_of(small), ENCODER, IndexSettings(), ordinary=ordinary)
        effect = accept(pool, small, ["poem 1"], lambda r: SAMPLES[r.ref.name], "balanced", min_score=0.5).effect
        assert (effect.num_ordinary, effect.answered_before, effect.answered_after) == (num, num, num)


def test_a_change_is_refused_for_the_group_of_ordinary_prompts_that_it_harms() -> None:
    """Before and after it an adapter answers every bare word, and after it 100 of the others, too."""
    is_word = bare_words(len(ordinary_prompts()))
    ordinary = np.where(is_word[:, np.newaxis], near(0, 0.0), near(3, 0.0))
    ordinary[np.flatnonzero(~is_word)[:100]] = near(2, 0.5, towards=0)
    encoder = FakeEncoder({**TABLE, **{f"hello {n}": near(2, 0.3 + 0.2 * n, towards=1) for n in range(2)}}, dim=DIM)
    small = record_of("poet", near(0, 0.0), num_samples=6)
    pool = Pool.of(snapshot_of(small), encoder, IndexSettings(), ordinary=ordinary)
    texts, own = ["hello 0", "hello 1"], [Sample("poem 0")] * 6
    refusal = accept(pool, small, texts, lambda _: own, "balanced", min_score=0.5).effect.refusal
    assert refusal == "adapters would answer 100 of 517 ordinary prompts"


def outcome(text: str, adapter: str | None, score: float, key: str = "k", number: int = 0) -> Feedback:
    return Feedback.of_request(f"{text} {adapter} {score} {key} {number}", text, adapter, key, score)


def learnt(*outcomes: Feedback, pool: Pool | None = None, tenant: str = "local") -> Learnt:
    return learn(pool or pool_of(), tenant, outcomes, lambda r: SAMPLES[r.ref.name], "balanced")


def routed(rankings: Sequence[Ranking], text: str, tenant: str = "local") -> list[str]:
    source = Source()
    ranks = tuple(Rank("local", ranking, place == 0, "me", NOON) for place, ranking in enumerate(rankings))
    source.now = snapshot_of(POET, CODER, rankings={"local": ranks})
    return names(route_one(Retriever(live_pool(ENCODER, source), min_score=0.3), text, tenant=tenant))


def test_a_praised_adapter_answers_nearly_the_same_prompts_of_that_tenant_only() -> None:
    rankings = learnt(outcome("odd", "coder", 1)).rankings
    assert routed([], "odd") == []
    assert routed(rankings, "odd") == ["coder"]
    assert routed(rankings, "odd", tenant="rival") == []
    assert routed(rankings, "poem 0") == ["poet"], "other prompts are routed as before"


def test_a_blamed_adapter_does_not_answer_nearly_the_same_prompts() -> None:
    rankings = learnt(outcome("rhyme please", "poet", -1)).rankings
    assert routed([], "rhyme please") == routed([], "poem 5") == routed([], "rhyme now") == ["poet"]
    assert routed(rankings, "rhyme please") == []
    praised = learnt(outcome("rhyme now", None, 1)).rankings
    assert routed(praised, "rhyme now") == [], "praise of the base model takes every adapter away"
    both = learnt(outcome("rhyme please", "poet", 1, "a"), outcome("rhyme please", "poet", -0.5, "b")).rankings
    assert routed(both, "rhyme please") == ["poet"], "outcomes of one prompt count in sum"


@pytest.mark.parametrize(
    "said",
    [outcome("odd", None, -1), outcome("odd", "coder", 0), outcome("odd", "nobody", 1)],
    ids=["blame of the base model", "a withdrawn outcome", "an unknown adapter"],
)
def test_an_outcome_that_names_no_choice_changes_nothing(said: Feedback) -> None:
    assert learnt(said).rankings == ()


def test_one_key_has_few_outcomes_for_an_adapter_and_a_tenant_has_a_bounded_number() -> None:
    alike = [outcome("odd", "coder", 1, number=number) for number in range(9)]
    assert len(learnt(*alike).rankings) == MAX_PER_KEY
    many = [outcome("odd", "coder", 1, key=f"k{number}") for number in range(MAX_OUTCOMES + 9)]
    assert len(learnt(*many).rankings) == MAX_OUTCOMES
    flood = [outcome("odd", "coder", 1, key="loud", number=number) for number in range(MAX_OUTCOMES + 9)]
    assert len(learnt(*flood, outcome("odd", "coder", 1, key="quiet")).rankings) == MAX_PER_KEY + 1


def test_outcomes_about_adapters_that_are_gone_or_may_not_be_found_take_no_place() -> None:
    strange = record("strange", POET_TEXTS, tenant="rival")
    pool = Pool.of(snapshot_of(POET, CODER, strange), ENCODER, IndexSettings(requires_approval=True))
    gone = [outcome("odd", f"gone{number}", 1) for number in range(MAX_OUTCOMES)]
    hidden = [outcome("odd", "rival/strange", 1, key=f"k{number}") for number in range(MAX_OUTCOMES)]
    found = learnt(*gone, *hidden, outcome("odd", "coder", 1), pool=pool)
    assert [item.ref.name for ranking in found.rankings for item in ranking.adapters] == ["coder"]


def test_keys_take_turns_at_a_tenants_places() -> None:
    """A single key may have all places. Beside others it keeps its newest outcomes, and the order is not changed."""
    axes = np.eye(24, dtype=np.float32)
    records = [record_of(f"adapter{place}", axes[place], num_samples=1) for place in range(23)]
    encoder = FakeEncoder({"odd": axes[23], **{row.ref.name: axes[place] for place, row in enumerate(records)}}, dim=24)
    pool = Pool.of(snapshot_of(*records), encoder, IndexSettings())
    loud = [outcome("odd", f"adapter{place // 3}", 1, key="loud", number=place) for place in range(66)]
    quiet = [outcome("odd", "adapter22", 1, key=key, number=number) for key in ("a", "b") for number in range(2)]

    def ids(*said: Feedback) -> list[str]:
        found = learn(pool, "local", said, lambda r: [Sample(r.ref.name)], "balanced")
        assert (found.num_refused, found.num_left) == (0, 0)
        return [ranking.anchor.name.removeprefix(OUTCOME) for ranking in found.rankings]

    assert ids(*loud) == [said.id for said in loud[:MAX_OUTCOMES]]
    assert ids(*loud, *quiet) == [said.id for said in [*loud[: MAX_OUTCOMES - 4], *quiet]]


def test_an_outcome_that_takes_a_publishers_samples_away_is_left_out_and_others_apply() -> None:
    found = learnt(outcome("poem 0", "poet", -1), outcome("odd", "coder", 1))
    assert ([ranking.adapters[0].ref.name for ranking in found.rankings], found.num_refused) == (["coder"], 1)


def counted_learn(
    monkeypatch: pytest.MonkeyPatch, said: Sequence[Feedback], refused: set[Refused], pool: Pool | None = None
) -> tuple[Learnt, int]:
    """Return also how many pools are built: one after the change for each check, and one before for all of them."""
    pool, build, num_built = pool or pool_of(), Pool.of, 0

    def count(*args: Any, **fields: Any) -> Pool:
        nonlocal num_built
        num_built += 1
        return build(*args, **fields)

    with monkeypatch.context() as patched:
        patched.setattr(Pool, "of", count)
        return learn(pool, "local", said, lambda r: SAMPLES[r.ref.name], "balanced", refused=refused), num_built


def test_few_checks_find_a_harmful_outcome_and_the_next_call_leaves_it_out_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = [outcome("odd", "coder", 1, key=f"k{number}") for number in range(MAX_OUTCOMES - 1)]
    said.insert(40, outcome("poem 0", "poet", -1))
    refused = set[Refused]()
    found, num_built = counted_learn(monkeypatch, said, refused)
    assert (len(found.rankings), found.num_refused) == (MAX_OUTCOMES - 1, 1)
    assert num_built <= 15
    assert counted_learn(monkeypatch, said, refused) == (found, 2)
    newer = pool_of(record("poet", POET_TEXTS, version="newer"), CODER)
    assert counted_learn(monkeypatch, said, refused, newer)[1] > 2, "an adapter near the outcome has changed"


def with_applied(found: Learnt, *records: AdapterRecord) -> Snapshot:
    ranks = tuple(Rank("local", ranking, place == 0, "me", NOON) for place, ranking in enumerate(found.rankings))
    return snapshot_of(*records, rankings={"local": ranks})


def test_a_further_outcome_is_checked_by_the_samples_near_it_alone() -> None:
    rows = unit_rows(np.random.default_rng(0).normal(size=(80, 16)).astype(np.float32))
    texts = [[f"text {place} {number}" for number in range(32)] for place in range(80)]
    encoder = FakeEncoder({text: row for own, row in zip(texts, rows, strict=True) for text in own}, dim=16)
    records = [record_of(f"adapter{place}", row, num_samples=32) for place, row in enumerate(rows)]
    source = {row.ref.name: list(map(Sample, own)) for row, own in zip(records, texts, strict=True)}
    said = [outcome(texts[place][0], f"adapter{place}", 1) for place in range(63)]

    def num_encoded(wanted: Sequence[Feedback], snapshot: Snapshot) -> tuple[Learnt, int]:
        encoder.batches.clear()
        pool = Pool.of(snapshot, encoder, IndexSettings())
        found = learn(pool, "local", wanted, lambda r: source[r.ref.name], "balanced")
        return found, sum(map(len, encoder.batches))

    first, num_first = num_encoded(said[1:], snapshot_of(*records))
    assert len(first.rankings) == 62 and num_first > 2048, "more than the encoder keeps"
    second, num_second = num_encoded(said, with_applied(first, *records))
    assert len(second.rankings) == 63 and num_second <= 63 + 16 * 32
    again, num_again = num_encoded(said, with_applied(second, *records))
    assert (again, num_again) == (second, 63)


def test_the_checks_of_one_call_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [outcome("poem 0", "poet", -1, key=f"k{number}") for number in range(MAX_OUTCOMES)]
    refused, num_rounds = set[Refused](), 0
    found = Learnt((), num_left=MAX_OUTCOMES)
    while found.num_left:
        found, num_built = counted_learn(monkeypatch, said, refused)
        assert (num_built <= 17, found.rankings, found.num_refused) == (True, (), MAX_OUTCOMES - found.num_left)
        num_rounds += 1
    assert 1 < num_rounds <= 10, "later calls check the others"


def test_outcomes_that_apply_stay_while_later_harmful_ones_are_looked_for() -> None:
    said = [outcome("odd", "coder", 1, key=f"k{number}") for number in range(MAX_OUTCOMES)]
    pool = Pool.of(with_applied(learnt(*said), POET, CODER), ENCODER, IndexSettings())
    harmful = [outcome("poem 0", "poet", -1, key="a"), outcome("code 0", "coder", -1, key="b")]
    found = learnt(harmful[0], *said[:31], harmful[1], *said[31:], pool=pool)
    assert (len(found.rankings), found.num_refused, found.num_left) == (MAX_OUTCOMES - 2, 2, 0)


def test_an_outcome_that_another_outweighed_is_checked_when_that_one_is_withdrawn() -> None:
    blame, praise = outcome("poem 0", "poet", -1), outcome("poem 0", "poet", 1)
    both = learnt(blame, praise)
    assert len(both.rankings) == 2
    pool = Pool.of(with_applied(both, POET, CODER), ENCODER, IndexSettings())
    assert learnt(blame, pool=pool) == Learnt((), num_refused=1)
    assert learnt(praise, pool=pool).rankings == both.rankings[1:]


def test_a_refused_outcome_is_checked_again_when_an_applied_one_is_withdrawn() -> None:
    axes, refused = np.eye(18, dtype=np.float32), set[Refused]()
    table = {f"{place} {number}": axes[place] for place in range(16) for number in range(32)}
    for place in (0, 1):  # each outcome takes 3 of 512 samples, and both take more than a hundredth
        table |= {f"{place} {number}": unit_rows(axes[place] + 1.5 * axes[16 + place]) for number in range(3)}
    encoder = FakeEncoder({**table, "a": axes[16], "b": axes[17]}, dim=18)
    records = [record_of(str(place), axes[place], num_samples=32) for place in range(16)]

    def learn_again(snapshot: Snapshot, *said: Feedback) -> tuple[int, int]:
        pool = Pool.of(snapshot, encoder, IndexSettings())
        own = lambda r: [Sample(f"{r.ref.name} {number}") for number in range(32)]  # noqa: E731
        found.append(learn(pool, "local", said, own, "balanced", refused=refused))
        return len(found[-1].rankings), found[-1].num_refused

    found, said = list[Learnt](), [outcome("a", "0", -1), outcome("b", "1", -1)]
    assert learn_again(snapshot_of(*records), *said) == (1, 1)
    assert learn_again(with_applied(found[0], *records), said[1]) == (1, 0)


@pytest.mark.parametrize("check", ["learning", "doctor", "draws"])
def test_a_check_reads_others_samples_beside_the_cached_texts_of_its_tenant(check: str) -> None:
    encoder, rivals = FakeEncoder(TABLE, dim=DIM), record("poet", POET_TEXTS, tenant="rival", approved=True)
    pool = Pool.of(snapshot_of(rivals, CODER), encoder, IndexSettings())
    if check == "learning":
        learn(pool, "local", [outcome("odd", "rival/poet", 1)], lambda r: SAMPLES[r.ref.name], "balanced")
    elif check == "doctor":
        list(examine(pool, "local", lambda r: SAMPLES[r.ref.name]))
    else:
        DrawMeasurement.of(pool, CODER, lambda r: SAMPLES[r.ref.name]).encoding.encode_all()
    owners = {owner for owner, text in encoder.owned if text in POET_TEXTS}
    assert owners and not any(map(is_valid_name, owners)), "or response times would reveal private samples"


def test_an_outcome_of_another_prompt_under_the_same_request_id_is_checked() -> None:
    first = learnt(replace(outcome("odd", "poet", -1), id="R"))
    pool = Pool.of(with_applied(first, POET, CODER), ENCODER, IndexSettings())
    assert learnt(replace(outcome("poem 0", "poet", -1), id="R"), pool=pool) == Learnt((), num_refused=1)
    again = learnt(replace(outcome("odd", "poet", -1), id="R"), pool=pool)
    assert again.rankings[0] is first.rankings[0], "the checked vector stays"


def test_the_choice_says_what_outcomes_spoke_for() -> None:
    rankings = learnt(outcome("rhyme please", "poet", -1)).rankings
    source = Source()
    source.now = Snapshot(
        1, {("local", "poet"): POET}, rankings={"local": (Rank("local", rankings[0], True, "", NOON),)}
    )
    route = route_one(Retriever(live_pool(ENCODER, source), min_score=0.3), "rhyme please")
    assert [(candidate.ref.name, candidate.outcome) for candidate in route.candidates] == [("poet", -1.0)]
    assert route.abstained
