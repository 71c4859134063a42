from __future__ import annotations

from dataclasses import replace

from benchmarks.paper.stages.served import Case, Reply, cases_of, report, starter


def test_other_plans_and_texts_are_counted() -> None:
    cases = [Case(question, "mixture") for question in starter()[1][:4]]
    reply = Reply("mixture", (("d", 0.5, 0.7), ("e", 0.5, 0.6)), "yes")
    others = [
        replace(reply, adapters=(("d", 0.5, 0.700001), ("e", 0.5, 0.6))),
        replace(reply, adapters=(("e", 0.5, 0.7), ("d", 0.5, 0.6))),
        replace(reply, adapters=reply.adapters[:1]),
        replace(reply, text="no"),
    ]
    text, plans, texts = report(cases, [reply] * 4, others)
    assert (plans, texts) == (0.5, 0.75)
    assert "| mixture | 4 | 2 | 3 |" in text


def test_cases_are_different_pairs_of_question_and_method_and_the_same_every_time() -> None:
    questions = starter()[1]
    cases = cases_of(questions, 200)
    assert len(questions) == 144 and len(set(cases)) == len(cases) == 200
    assert cases == cases_of(questions, 200)
    assert {case.method for case in cases} == {"mixture", "selection", "fusion"}
