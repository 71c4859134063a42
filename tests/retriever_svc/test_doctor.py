from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.errors import BlobCorrupted
from lora_store.records import AdapterRecord, OutputProfile
from retriever_svc import Collision, DoctorReport, IndexSettings, ProjectionFiles
from retriever_svc.doctor import POINTS, examine
from retriever_svc.encoder import unit_rows
from retriever_svc.pool import Pool
from retriever_svc.sample_source import SampleSource
from tests.retriever_svc.pool_fakes import FakeEncoder, embedding_of, record_of, snapshot_of
from tests.retriever_svc.projectable import Projectable
from tests.retriever_svc.test_whitening import DIM, texts_of, world

EAST, NORTH, UP = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
TABLE = {"east": EAST, "north": NORTH, "up": UP, "northeast": (0.8, 0.6, 0.0), "high": (0.0, 0.6, 0.8)}
SAMPLES = {"e": ("east", "northeast"), "n": ("north", "northeast"), "u": ("up",), "e2": ("east", "northeast")}
E, N, U = (record_of(name, vector) for name, vector in (("e", EAST), ("n", NORTH), ("u", UP)))


def source(record: AdapterRecord) -> Sequence[Sample]:
    return [Sample(text) for text in SAMPLES[record.ref.name]]


def report_on(
    *records: AdapterRecord, tenant: str = "local", top_k: int = 3, source: SampleSource = source
) -> DoctorReport:
    pool = Pool.of(snapshot_of(*records, generation=4), FakeEncoder(TABLE, dim=3), IndexSettings())
    *steps, last = examine(pool, tenant, source, top_k)
    assert [(step.num_done, step.report) for step in steps] == [(n, None) for n in range(1, len(steps) + 1)]
    assert {step.num_total for step in (*steps, last)} == {len(steps)}
    assert last.report is not None
    return last.report


def test_samples_that_find_their_own_adapter_are_counted() -> None:
    report = report_on(E, N, U, top_k=2)
    assert (report.generation, report.top_k) == (4, 2)
    found = {a.ref.name: (a.num_samples, a.num_first, a.num_found, a.shadowed_by) for a in report.adapters}
    assert found == {"e": (2, 2, 2, None), "n": (2, 1, 2, None), "u": (1, 1, 1, None)}
    assert (report.share_first, report.share_found) == (pytest.approx(4 / 5), 1.0)
    assert report.always_shadowed == report.never_chosen == report.collisions == report.unreadable == ()
    empty = report_on()
    assert (empty.adapters, empty.share_first, empty.share_found) == ((), 0, 0)
    single = report_on(E, source=lambda record: [Sample("east")])  # no share of one is turned away
    assert [a.turned_away for a in single.adapters] == [()]
    assert set(single.turned_away.values()) == {0.0}


def test_an_adapter_that_none_of_its_samples_ranks_first_is_shadowed() -> None:
    report = report_on(E, record_of("e2", unit_rows(np.asarray([1, 0, 0.3], np.float32))), N)
    [shadowed] = report.always_shadowed
    assert (shadowed.ref.name, shadowed.num_first, shadowed.num_found) == ("e2", 0, 2)
    assert shadowed.shadowed_by == E.ref


def test_an_adapter_that_no_sample_finds_is_reported_as_never_chosen() -> None:
    away = record_of("u", (0.0, 0.0, -1.0))
    assert report_on(E, N, away, top_k=2).never_chosen == (away.ref,)
    assert report_on(E, N, away, top_k=3).never_chosen == ()
    assert report_on(E, N, away, top_k=2).always_shadowed[0].ref == away.ref


def test_adapters_at_one_place_collide() -> None:
    near = record_of("e2", unit_rows(np.asarray([1, 0.3, 0], np.float32)))
    [collision] = report_on(E, near, N).collisions
    assert isinstance(collision, Collision)
    assert (collision.first, collision.second) == (E.ref, near.ref)
    assert collision.cosine == pytest.approx(1 / 1.09**0.5, abs=1e-6)
    assert (collision.num_of_first, collision.num_of_second) == (1, 1)  # northeast is e2's, east is e's
    apart = record_of("e2", unit_rows(np.asarray([1, -0.4, 0], np.float32)))
    assert report_on(E, apart, N).collisions == ()


def test_adapters_whose_samples_find_each_other_collide_at_any_distance() -> None:
    swapped = {"e": ("north", "east"), "n": ("east", "north")}
    [collision] = report_on(E, N, source=lambda record: [Sample(text) for text in swapped[record.ref.name]]).collisions
    assert (collision.first, collision.second, collision.cosine) == (E.ref, N.ref, pytest.approx(0))
    assert (collision.num_of_first, collision.num_of_second) == (1, 1)


def test_only_visible_adapters_are_examined_and_counted() -> None:
    theirs = record_of("e2", EAST, tenant="b", visibility="private")
    assert Counter(a.ref.name for a in report_on(E, theirs, tenant="a").adapters) == {"e": 1}
    assert report_on(E, theirs, tenant="a").collisions == ()
    assert len(report_on(E, theirs, tenant="b").collisions) == 1


def test_adapters_without_embedding_are_skipped_and_unreadable_ones_are_named() -> None:
    def broken(record: AdapterRecord) -> Sequence[Sample]:
        if record.ref.name == "n":
            raise BlobCorrupted("x", "y")
        return source(record)

    bare, hidden = record_of("bare", None), replace(record_of("hidden", None), expires_at=datetime.now(UTC))
    others = (record_of("theirs", None, tenant="b"), record_of("foreign", EAST, encoder="another", num_samples=2))
    report = report_on(E, N, bare, hidden, *others, source=broken)
    assert (report.by_name_only, report.unembedded) == ((bare.ref,), (others[1].ref,))
    assert [adapter.ref.name for adapter in report.adapters] == ["e"]
    assert report.unreadable == (N.ref,)


@pytest.mark.parametrize(("num_swapped", "inseparable"), [(3, False), (4, True)])
def test_adapters_are_inseparable_if_a_fifth_of_the_samples_find_the_other(num_swapped: int, inseparable: bool) -> None:
    given = {"e": ["east"] * 9 + ["north"], "n": ["north"] * (11 - num_swapped) + ["east"] * (num_swapped - 1)}
    [collision] = report_on(E, N, source=lambda record: [Sample(text) for text in given[record.ref.name]]).collisions
    assert (collision.num_of_first + collision.num_of_second, collision.is_inseparable) == (num_swapped, inseparable)


def test_adapters_at_one_place_are_inseparable_and_their_outputs_are_compared() -> None:
    near = record_of("e2", unit_rows(np.asarray([1, 0.3, 0], np.float32)))
    [collision] = report_on(E, near).collisions
    assert (collision.is_inseparable, collision.agree) == (True, False)
    yes_no = [
        replace(record, embedding=replace(record.embedding, outputs=OutputProfile(("no", "yes"))))
        for record in (E, near)
        if record.embedding is not None
    ]
    [collision] = report_on(*yes_no).collisions
    assert collision.agree


def judged_report(
    record: AdapterRecord, samples: Sequence[Sample], ordinary: Sequence[Sequence[float]]
) -> DoctorReport:
    rows = unit_rows(np.asarray(ordinary, np.float32))
    pool = Pool.of(snapshot_of(record), FakeEncoder(TABLE, dim=3), IndexSettings(), ordinary=rows)
    *_, last = examine(pool, "local", lambda record: samples)
    assert last.report is not None
    return last.report


def test_samples_that_their_adapter_would_not_answer_are_counted() -> None:
    scores = [*np.linspace(0.9, 0.95, 14), *[0.2] * 6]  # six have little in common with the others
    own = replace(record_of("strays", None), embedding=embedding_of(EAST, scores))
    report = judged_report(own, [Sample("east")] * 20, [(0.5, 0.0, 0.866)] * 4)
    [finding] = report.adapters
    assert finding.num_below == 6 and finding.turned_away == (6, 6, 6)
    assert report.with_unlike_samples == (finding,)
    assert report.turned_away == {point: pytest.approx(0.3) for point in POINTS}
    far = judged_report(own, [Sample("east")] * 20, [(-1.0, 0.0, 0.0)] * 4)
    assert far.adapters[0].num_below == 6  # below the loose floor of the own samples
    even = replace(own, embedding=embedding_of(EAST, np.linspace(0.9, 0.95, 20).tolist()))
    assert judged_report(even, [Sample("east")] * 20, [(0.5, 0.0, 0.866)] * 4).with_unlike_samples == ()


def test_samples_near_ordinary_prompts_are_turned_away_as_their_prompts_would_be() -> None:
    own = replace(record_of("e", None), embedding=embedding_of(EAST, np.linspace(0.5, 0.95, 20).tolist()))
    others = [UP, (0.1, 0.2, 0.9), (0.3, 0.1, 0.8)]
    shares = [
        judged_report(own, [Sample("east")] * 20, [ordinary] * 3 + others).turned_away["balanced"]
        for ordinary in (NORTH, EAST)
    ]
    assert shares[0] < 0.2 < shares[1]


def test_adapters_whose_samples_repeat_one_instruction_are_reported() -> None:
    contents = ("a red car", "two dogs", "my old house", "the last train", "seven apples")
    one = [f"Say the following in French, please: {content}" for content in contents]
    several = [*one[:2], "Comment dit-on: good night?", "in french pls >> see you", "Translate 'bread' for me"]
    table = {text: EAST for text in (*one, *several)}
    for texts, expected in ((one, ["e"]), (several, []), (one[:4], [])):
        pool = Pool.of(snapshot_of(E), FakeEncoder(table, dim=3), IndexSettings())
        *_, last = examine(pool, "local", lambda record, texts=texts: [Sample(text) for text in texts])
        assert last.report is not None
        assert [finding.ref.name for finding in last.report.with_one_wording] == expected


def test_a_refit_is_tried_on_the_samples_of_the_pool() -> None:
    groups = world()
    texts = texts_of(groups)
    table = {text: row for own, rows in zip(texts, groups, strict=True) for text, row in zip(own, rows, strict=True)}
    encoder = Projectable(table, dim=DIM)
    records = [record_of(f"{task}", unit_rows(rows.mean(axis=0))) for task, rows in enumerate(groups)]
    pool = Pool.of(snapshot_of(*records), encoder, IndexSettings())
    *_, last = examine(pool, "local", lambda r: [Sample(t) for t in texts[int(r.ref.name)]], 3, ProjectionFiles())
    assert last.report is not None and last.report.refit is not None
    assert (last.report.refit.num_samples, last.report.refit.pays) == (600, True)
    assert report_on(E, N).refit is None  # no place for projections
