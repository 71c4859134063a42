"""No tenant can change how often another tenant's prompts abstain, whatever samples it publishes.

The tests check behaviour only: the share of prompts that abstain, before and after an attack.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import Encoder, IndexSettings, LivePool, ProjectionFiles, Retriever, Route, RouteRequest
from retriever_svc.calibration import Adapters, Calibration, leave_one_out_scores
from retriever_svc.embedding import embed_groups
from retriever_svc.encoder import unit_rows
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, record_of
from tests.soak import Scale

MAX_SHIFT = 0.02  # largest change of the share that an attack may cause
HONEST, STRANGER, ATTACKER = "acme", "initech", "mallory"
ANSWERING = "answering"  # the tag of honest adapters
DIM = 64
EXAMPLES = Path(__file__).parents[2] / "examples"
FOREIGN = Path(__file__).with_name("foreign_prompts.txt").read_text().splitlines()

Groups = Mapping[str, Sequence[str]]  # the texts of each adapter's samples


@dataclass(frozen=True)
class Shares:
    """Shares of prompts that abstain: prompts of a task in the pool, and prompts without an adapter."""

    in_task: float
    foreign: float

    def assert_near(self, other: Shares, bound: float = MAX_SHIFT) -> None:
        assert abs(self.in_task - other.in_task) <= bound, (self, other)
        assert abs(self.foreign - other.foreign) <= bound, (self, other)


@dataclass(frozen=True)
class World:
    """An honest pool, and prompts to measure it."""

    encoder: FakeEncoder | Encoder
    honest: Groups
    in_task: Sequence[str]
    foreign: Sequence[str]
    files: ProjectionFiles | None = None

    def records(self, groups: Groups, tenant: str, *, approved: bool) -> list[AdapterRecord]:
        embeddings = embed_groups(self.encoder, [[Sample(text) for text in texts] for texts in groups.values()])
        tags = () if tenant == ATTACKER else (ANSWERING,)
        bare = [record_of(name, None, tenant=tenant, tags=tags) for name in groups]
        return [replace(r, embedding=e, approved=approved) for r, e in zip(bare, embeddings, strict=True)]

    def shares(self, records: Sequence[AdapterRecord], asker: str, *, requires_approval: bool = False) -> Shares:
        settings = IndexSettings(requires_approval=requires_approval)
        pools = LivePool(lambda model: self.encoder, Source(*records), settings=settings, projections=self.files)
        retriever = Retriever(pools)
        return Shares(_abstaining(retriever, self.in_task, asker), _abstaining(retriever, self.foreign, asker))


def _abstaining(retriever: Retriever, prompts: Sequence[str], asker: str) -> float:
    """Return the share that abstains with honest adapters only: adapters that attract prompts are another attack."""
    routes = retriever.route([RouteRequest(prompt, tenant=asker, tags=(ANSWERING,)) for prompt in prompts])
    assert all(isinstance(route, Route) for route in routes)
    return sum(route.abstained for route in routes if isinstance(route, Route)) / len(routes)


def vector_world(num_adapters: int) -> World:
    """Return tasks of 20 samples around centres that share a direction, like prompts of one language."""
    rng = np.random.default_rng(5)
    table: dict[str, np.ndarray] = {}

    def texts(name: str, centre: np.ndarray, noise: float, count: int) -> list[str]:
        rows = unit_rows((centre + noise * rng.standard_normal((count, DIM)) / DIM**0.5).astype(np.float32))
        named = {f"{name} {number}": row for number, row in enumerate(rows)}
        table.update(named)
        return list(named)

    def centre() -> np.ndarray:
        return unit_rows(np.eye(1, DIM)[0] * 0.5 + rng.standard_normal(DIM) / DIM**0.5)

    tasks = {f"task-{n}": (centre(), rng.uniform(0.4, 1.2)) for n in range(num_adapters)}
    honest = {name: texts(name, *task, 20) for name, task in tasks.items()}
    in_task = [text for name, task in tasks.items() for text in texts(f"asked {name}", *task, 4)]
    near = [unit_rows(task[0] + 0.8 * centre()) for task in tasks.values()]
    foreign = [text for n in range(100) for text in texts(f"foreign-{n}", near[n % num_adapters], 0.5, 2)]
    for number, row in enumerate(np.eye(DIM, dtype=np.float32)[1:]):
        table[f"unlike {number}"] = row
    table["equal"] = unit_rows(rng.standard_normal((1, DIM)).astype(np.float32))[0]
    return World(FakeEncoder({text: row.tolist() for text, row in table.items()}, dim=DIM), honest, in_task, foreign)


def unlike(num_adapters: int, num_samples: int, text: Callable[[int], str]) -> Groups:
    """Return adapters whose samples have nothing in common."""
    return {f"u{n}": [text(num_samples * n + i) for i in range(num_samples)] for n in range(num_adapters)}


def equal(num_adapters: int, text: str = "equal") -> Groups:
    """Return adapters whose 200 samples are one text."""
    return {f"e{n}": [text] * 200 for n in range(num_adapters)}


def _unlike_vector(number: int) -> str:
    return f"unlike {number % (DIM - 1)}"


def wide(num_adapters: int, num_samples: int = 20) -> Groups:
    """Return adapters of prompts of all tasks: as wide as the pool."""
    texts = [f"asked task-{n} {i}" for n in range(12) for i in range(4)]
    return {f"w{n}": [texts[(5 * n + 7 * i) % len(texts)] for i in range(num_samples)] for n in range(num_adapters)}


def copies(num_adapters: int) -> Groups:
    """Return adapters with the samples of the first honest ones."""
    return {f"c{n}": [f"task-{n % 12} {i}" for i in range(20)] for n in range(num_adapters)}


ATTACKS = {
    "fifty of one sample": unlike(50, 1, _unlike_vector),
    "twenty as wide as the pool": wide(20),
    "two hundred as wide as the pool": wide(200),
    "copies of each adapter": copies(12),
    "ten copies of each adapter": copies(120),
    "two of two unlike samples": unlike(2, 2, _unlike_vector),
    "two of eight unlike samples": unlike(2, 8, _unlike_vector),
    "thirteen of two unlike samples": unlike(13, 2, _unlike_vector),
    "thirteen of twenty unlike samples": unlike(13, 20, _unlike_vector),
    "five of equal samples": equal(5),
    "fifty of equal samples": equal(50),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
@pytest.mark.parametrize("num_adapters", [12, 120], ids=["240 samples", "2400 samples"])
@pytest.mark.parametrize("asker", [HONEST, STRANGER], ids=["whose pool it is", "of approved adapters"])
def test_another_tenants_adapters_do_not_move_abstention(asker: str, num_adapters: int, attack: Groups) -> None:
    world = vector_world(num_adapters)
    honest = world.records(world.honest, HONEST, approved=asker == STRANGER)
    before = world.shares(honest, asker)
    assert 0 < before.in_task < 0.2 < before.foreign < 1, before  # so that it can change in both directions
    attackers = world.records(attack, ATTACKER, approved=False)
    world.shares([*honest, *attackers], asker).assert_near(before)
    world.shares([*attackers, *honest], asker).assert_near(before)  # in any order


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
@pytest.mark.parametrize("num_own", [1, 2, 4])
def test_a_tenant_with_few_adapters_abstains_as_without_an_attacker(num_own: int, attack: Groups) -> None:
    world = vector_world(12)
    names = list(world.honest)
    own = world.records({name: world.honest[name] for name in names[:num_own]}, STRANGER, approved=False)
    others = world.records({name: world.honest[name] for name in names[num_own:]}, HONEST, approved=False)
    before = world.shares([*own, *others], STRANGER)
    assert 0 < before.in_task < 1, before  # so that it can change in both directions
    attackers = world.records(attack, ATTACKER, approved=False)
    world.shares([*own, *others, *attackers], STRANGER).assert_near(before)


@pytest.mark.parametrize("num_adapters, num_bad", [(12, 2), (120, 13)])
def test_a_few_unlike_adapters_that_were_approved_do_not_switch_abstention_off(num_adapters: int, num_bad: int) -> None:
    world = vector_world(num_adapters)
    honest = world.records(world.honest, HONEST, approved=True)
    attackers = world.records(unlike(num_bad, 20, _unlike_vector), ATTACKER, approved=True)
    before = world.shares(honest, STRANGER, requires_approval=True)
    after = world.shares([*honest, *attackers], STRANGER, requires_approval=True)
    assert before.in_task - after.in_task <= 0.05, (before, after)
    assert after.foreign >= before.foreign / 2, (before, after)


ODD_TEXTS = (
    "0110 1001 1100 0011",
    "Ελλάδα, θάλασσα, ουρανός",
    "int main(void) { return 0; }",
    "♜♞♝♛♚♝♞♜",
    "zzzz zzzz zzzz",
    "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε",
    "SELECT * FROM t",
    "ACGTTGCAACGT",
    "do re mi fa so la ti",
    "[ERROR] 0x7f segfault at 00000000",
    "Д о ж д ь",
    "e4 e5 Nf3 Nc6 Bb5 a6",
    "H2SO4 + 2 NaOH",
    "<svg><path d='M0 0'/></svg>",
    "いろはにほへと",
    "...---...",
)


def _odd_text(number: int) -> str:
    """Return a text like no prompt of the test, and hardly like the others."""
    return ODD_TEXTS[number % len(ODD_TEXTS)]


def _lines(path: Path) -> list[str]:
    return [json.loads(line)["input"] for line in path.read_text().splitlines()]


def test_the_starter_pool_abstains_as_before_under_attack(scale: Scale) -> None:
    """Uses the packaged encoder, and prompts for which no adapter was made."""
    num_tasks = scale.pick("tasks", small=6, full=12)
    num_prompts = scale.pick("held-out prompts a task", small=6, full=12)
    num_foreign = scale.pick("foreign prompts", small=12, full=len(FOREIGN))
    num_equal = scale.pick("adapters of equal samples", small=5, full=50)
    folders = sorted(path.parent for path in (EXAMPLES / "starter_pool").glob("*/lora_samples.jsonl"))[:num_tasks]
    assert len(folders) == num_tasks
    honest = {folder.name: _lines(folder / "lora_samples.jsonl") for folder in folders}
    asked = [_lines(EXAMPLES / "starter_heldout" / f"{name}.jsonl")[:num_prompts] for name in honest]
    encoder, files = Encoder(), ProjectionFiles()
    encoder = encoder.projected(files.shipped(encoder.identity))
    world = World(encoder, honest, [text for texts in asked for text in texts], FOREIGN[:num_foreign], files)
    records = world.records(honest, HONEST, approved=False)
    before = world.shares(records, HONEST)
    scale.record("in-task prompts that abstain", before.in_task)
    scale.record("foreign prompts that abstain", before.foreign)
    assert before.in_task <= 0.06, before  # 2 of 36 prompts, about 3 % in full
    assert before.foreign >= 0.95, before
    for attack in (
        unlike(2, 2, _odd_text),
        unlike(2, 8, _odd_text),
        unlike(13, 2, _odd_text),
        equal(num_equal, _odd_text(0)),
    ):
        attackers = world.records(attack, ATTACKER, approved=False)
        world.shares([*records, *attackers], HONEST).assert_near(before)


@pytest.mark.parametrize("num_samples", [1, 2, 20, 200])
def test_an_adapter_whose_samples_are_ordinary_prompts_does_not_answer_others(num_samples: int) -> None:
    """Uses the packaged encoder, and ordinary prompts that set no threshold."""
    encoder, files = Encoder(), ProjectionFiles()
    encoder = encoder.projected(files.shipped(encoder.identity))
    rows = files.ordinary(encoder)
    own = np.random.default_rng(0).permutation(rows)[:num_samples]
    attacker = Adapters(unit_rows(own.mean(axis=0))[np.newaxis], [leave_one_out_scores(own)])
    prompts = encoder.encode(_lines(EXAMPLES.parent / "benchmarks" / "routing" / "held_out_prompts.jsonl")[::3])
    [threshold], _ = Calibration.of(Adapters(rows[:0], []), rows).judge(attacker, np.zeros(1), 0.03)
    assert (prompts @ attacker.vectors[0] >= threshold).mean() <= 0.1
