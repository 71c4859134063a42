from __future__ import annotations

from lora_store.adapter import AdapterRef
from lora_store.plan import Plan, PlannedAdapter
from retriever_svc import Route
from retriever_svc.asked_prompts import count_answers

A, B, C = (AdapterRef("local", name, name * 64) for name in "abc")


def answered(*refs: AdapterRef) -> Route:
    rows = tuple(PlannedAdapter(ref, ref.name * 64, 1.0 / len(refs)) for ref in refs)
    return Route(Plan("mixture", rows) if rows else Plan("base"), (), 1, abstained=not rows)


def test_answers_are_counted_by_the_adapter_that_should_answer_or_else_by_the_one_that_does() -> None:
    asked = [
        ((A,), answered(A, B)),
        ((A,), answered(B, A)),
        ((A,), answered()),
        ((A, B), answered(B)),
    ]  # either is right
    report = count_answers([*asked, ((), answered()), ((), answered(C))])
    a, base = report.labelled[A], report.labelled[None]
    assert (a.num, a.num_right, a.num_other, a.num_base, dict(a.others)) == (4, 2, 1, 1, {B: 1})
    assert (base.num, base.num_right, base.num_other, base.num_base) == (2, 1, 1, 0)
    assert not report.unlabelled
    report = count_answers([(None, answered(A, B)), (None, answered()), (None, answered(A))])
    assert (report.labelled, dict(report.unlabelled)) == ({}, {A: 2, None: 1})
