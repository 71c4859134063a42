"""Without a confirmation no owner draws a large part of another one's prompts, however its adapters are cut.

Each attack is approved adapter by adapter, as far as no confirmation is needed. The shares are of held-out prompts of
the starter pool's tasks, as a third tenant gets them, with the packaged encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import Encoder, Retriever
from retriever_svc.draws import LETTER_PARTS, Draws
from tests.retriever_svc.attacks import (
    everyday_prompts,
    held_out,
    narrow_groups,
    pool_of,
    published,
    routes,
    starter_samples,
)
from tests.shared_encoders import shared_encoder
from tests.soak import Scale

NUM_HELD_OUT = 6  # of a task, known to the attacker of `with users' prompts`
Groups = dict[str, list[str]]
HONEST = starter_samples()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return shared_encoder(max_cached_texts=8192)


@pytest.fixture
def tasks(scale: Scale) -> list[str]:
    return sorted(HONEST)[: scale.pick("tasks", small=2, full=12)]


def drawn_by(
    encoder: Encoder, record: AdapterRecord, others: Sequence[AdapterRecord], groups: Mapping[str, Sequence[str]]
) -> Draws:
    """Return what a version would draw in a pool of others. `groups`: the samples by name."""
    retriever = Retriever(pool_of(encoder, [*others, record]))
    measurement = retriever.draw_measurement(
        record.ref.tenant, record.ref.name, lambda victim: [Sample(text) for text in groups[victim.ref.name]]
    )
    measurement.encoding.encode_all()
    return retriever.draws(measurement)


def approved_unasked(
    encoder: Encoder, honest: Sequence[AdapterRecord], attackers: Sequence[AdapterRecord]
) -> list[AdapterRecord]:
    """Approve the adapters one after another, unless a confirmation is needed. Return the approved ones."""
    approved: list[AdapterRecord] = []
    for record in attackers:
        if not drawn_by(encoder, record, [*honest, *approved], HONEST).must_be_confirmed:
            approved.append(record)
    return approved


def copies(task: str) -> Groups:
    return {f"copy-{task}": HONEST[task]}


def halves(task: str) -> Groups:
    return {f"half-{task}": HONEST[task][::2]}


def fifths(task: str) -> Groups:
    return {f"fifth-{number}-{task}": HONEST[task][number::5] for number in range(5)}


def with_prompts(task: str) -> Groups:
    return {f"more-{task}": HONEST[task] + held_out(task)[:NUM_HELD_OUT]}


def singles(task: str) -> Groups:
    return {f"single-{number}-{task}": HONEST[task][number : number + 1] for number in range(0, 20, 2)}


# With full counts, led by the attacker unasked: nothing. If all are approved, the encoder before its training on tasks
# gave it 0 % (and 25 % of the weight of mixtures), 23, 33, 81 and 37 %.
@pytest.mark.parametrize("attack", [copies, halves, fifths, with_prompts, singles])
def test_copies_of_anothers_tasks_draw_few_of_its_prompts_unless_confirmed(
    encoder: Encoder, tasks: list[str], attack: Callable[[str], Groups], scale: Scale
) -> None:
    honest = published(encoder, HONEST, "acme")
    groups = {name: texts for task in tasks for name, texts in attack(task).items()}
    mallory = approved_unasked(encoder, honest, published(encoder, groups, "mallory"))
    prompts = [prompt for task in tasks for prompt in held_out(task)]
    plans = [route.plan.adapters for route in routes(encoder, [*honest, *mallory], prompts)]
    leaders = [plan[0].ref.tenant for plan in plans if plan]
    scale.record(f"led by {attack.__name__}", leaders.count("mallory") / len(prompts))
    assert leaders.count("mallory") <= 0.1 * len(prompts)


def test_adapters_of_ordinary_prompts_draw_few_everyday_prompts_unless_confirmed(
    encoder: Encoder, scale: Scale
) -> None:
    num = scale.pick("narrow adapters", small=6, full=50)
    mallory = published(encoder, narrow_groups(encoder, num, 5), "mallory")
    approved = approved_unasked(encoder, [], mallory)
    drawn = [not route.abstained for route in routes(encoder, approved, everyday_prompts())]
    assert np.mean(drawn) <= 0.02


def test_honest_adapters_of_two_owners_need_no_confirmation(encoder: Encoder) -> None:
    names = sorted(HONEST)
    acme = published(encoder, {name: HONEST[name] for name in names[::2]}, "acme")
    globex = published(encoder, {name: HONEST[name] for name in names[1::2]}, "globex")
    assert approved_unasked(encoder, acme, globex) == globex


def test_twins_of_two_owners_both_answer_once_the_second_is_confirmed(encoder: Encoder, tasks: list[str]) -> None:
    acme = published(encoder, {task: HONEST[task][::2] for task in tasks}, "acme")
    globex = published(encoder, {f"{task}-2": HONEST[task][1::2] for task in tasks}, "globex")
    groups = {task: HONEST[task][::2] for task in tasks}
    for record in globex:
        draws = drawn_by(encoder, record, acme, groups)
        assert draws.must_be_confirmed
        assert f"{draws.adapters[0].ref.name}-2" == record.ref.name
    for task in tasks:
        for route in routes(encoder, [*acme, *globex], held_out(task)):
            assert {adapter.ref.tenant for adapter in route.plan.adapters} == {"acme", "globex"}


CLOSINGS = [
    "Many thanks in advance, and best regards from Anna",
    "Thank you so much for your help, kind regards",
    "Thanks in advance and have a nice day, Peter",
    "With many thanks and best wishes, Maria",
    "Best regards and thank you for your time",
]
OPENINGS = [
    "Dear Sir or Madam, I hope this finds you well",
    "Hello, I hope you are well",
    "Dear team, good morning to all of you",
    "Hi there, thank you for reading this",
    "To whom it may concern, good day",
]
POLISH = ["Z góry dziękuję za pomoc, pozdrawiam serdecznie Anna", "Dziękuję i pozdrawiam", "Z poważaniem, Jan Kowalski"]


@pytest.mark.parametrize("samples", [CLOSINGS, OPENINGS, POLISH], ids=["closings", "openings", "closings in Polish"])
def test_an_adapter_of_openings_or_closings_of_letters_is_confirmed(encoder: Encoder, samples: list[str]) -> None:
    """Each is a view of a long prompt, so such an adapter would answer any request in a letter."""
    [record] = published(encoder, {"letters": samples}, "mallory")
    draws = drawn_by(encoder, record, published(encoder, HONEST, "acme"), HONEST)
    assert draws.must_be_confirmed and draws.ordinary.num == len(LETTER_PARTS)


def test_no_adapter_of_the_starter_pool_has_to_be_confirmed_for_parts_of_letters(encoder: Encoder) -> None:
    honest = published(encoder, HONEST, "acme")
    draws = drawn_by(encoder, honest[0], honest[1:], HONEST)
    assert not draws.ordinary.exceeds(draws.most_ordinary)
