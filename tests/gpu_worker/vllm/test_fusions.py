"""A fusion is one adapter: its name has all of its parts, its tensors are their averages, and it leaves with them."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import Executor, Future
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.bank.device_layout import DeviceAdapter, to_device_layout
from gpu_worker.errors import AdapterLoadFailed, AdapterUnfit
from gpu_worker.vllm.fusions import FusionLoader, composed, contains_any, list_adapters, split_name, with_fusion
from lora_store.adapter import AdapterRef, AdapterWeights
from lora_store.plan import BASE_PLAN, MAX_ABS_WEIGHT, Plan, PlannedAdapter
from tests.gpu_worker.conformance.reference import deltas
from tests.gpu_worker.engine_driver import HeldExecutor
from tests.tiny import InlineExecutor, plan_of, random_adapter

SHAPES = {"q_proj": (6, 5), "k_proj": (3, 5), "down_proj": (5, 7), "experts.down_proj": (5, 3, 4)}
WEIGHTS = st.floats(-MAX_ABS_WEIGHT, MAX_ABS_WEIGHT, allow_nan=False).filter(lambda weight: weight not in (0, 1))
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


def fusion(parts: dict[str, float], name: str = "poet") -> Plan:
    return Plan(
        "fusion", tuple(PlannedAdapter(AdapterRef("local", name, "v"), part, weight) for part, weight in parts.items())
    )


def name_of(plan: Plan) -> str:
    [adapter] = with_fusion(plan).adapters
    assert adapter.weight == 1
    return adapter.weights_digest


class Pool:
    """Adapters to fetch, and the digests that were fetched."""

    def __init__(self, *pool: AdapterWeights) -> None:
        self.adapters, self.fetched = {weights.weights_digest: weights for weights in pool}, list[str]()
        self.held: dict[str, Future[AdapterWeights]] = {}

    def fetch(self, digest: str) -> Future[AdapterWeights]:
        self.fetched.append(digest)
        fetched: Future[AdapterWeights] = Future()
        if digest in self.held:
            return self.held[digest]
        if digest in self.adapters:
            fetched.set_result(self.adapters[digest])
        else:
            fetched.set_exception(AdapterLoadFailed("no such adapter"))
        return fetched

    def loader(
        self, executor: Executor | None = None, budget_bytes: int = 1 << 20, dtype: torch.dtype = torch.float32
    ) -> FusionLoader:
        return FusionLoader(
            self.fetch,
            to_device_layout=partial(to_device_layout, shapes=SHAPES, dtype=dtype),
            executor=executor or InlineExecutor(),
            budget_bytes=budget_bytes,
            on_done=lambda: None,
        )


@given(st.dictionaries(DIGESTS, WEIGHTS, min_size=1, max_size=5))
def test_a_name_holds_every_digest_and_the_exact_weight(parts: dict[str, float]) -> None:
    name = name_of(fusion(parts))
    found = split_name(name)
    assert found is not None and dict(found) == parts
    assert sorted(list_adapters([name, "b" * 64])) == sorted([*parts, "b" * 64])
    assert contains_any(name, [next(iter(parts))]) and not contains_any(name, ["other"])


def test_equal_fusions_have_one_name_and_others_another() -> None:
    known = name_of(fusion({"a": 0.5, "b": 0.25}))
    assert name_of(fusion({"b": 0.25, "c": 0.0, "a": 0.5}, name="another")) == known
    others = [{"a": 0.5, "b": 0.25000000000000006}, {"a": 0.5, "c": 0.25}, {"a": 0.25, "b": 0.5}, {"a": 0.5}]
    assert len({known, *[name_of(fusion(parts)) for parts in others]}) == 1 + len(others)


def test_only_an_average_needs_a_fusion() -> None:
    assert with_fusion(fusion({"a": 1.0})).adapters == fusion({"a": 1.0}).adapters
    assert with_fusion(fusion({"a": 0.0})) == BASE_PLAN
    mixture = Plan("mixture", fusion({"a": 0.5, "b": 0.25}).adapters)
    assert with_fusion(mixture) is mixture
    assert split_name("a" * 64) is None and not contains_any("a" * 64, ["a" * 64])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_a_fusion_equals_the_padded_averages(dtype: torch.dtype, bound: float) -> None:
    """Ranks differ between adapters and between modules, one adapter lacks modules, and one weight is negative."""
    pool = [
        random_adapter(SHAPES, 1),
        random_adapter(SHAPES, 2, rank=2, modules=lambda name: name != "q_proj"),
        random_adapter(SHAPES, 3, rank_of=lambda name: 5 if name == "down_proj" else 1),
    ]
    plan = plan_of("fusion", *zip(pool, (0.5, -0.75, 0.3), strict=True))
    expected = deltas(plan, {weights.weights_digest: weights for weights in pool})
    found = Pool(*pool).loader(dtype=dtype).load(name_of(plan)).result(0)
    modules = {**found.modules, **found.experts}
    assert found.max_rank == 5 and modules.keys() == expected.keys() and list(found.experts) == ["experts.down_proj"]
    for name, module in modules.items():
        change = module.bt.double().mT @ module.a.double()
        assert float((change - expected[name]).abs().max() / expected[name].abs().max()) < bound


def test_a_fusion_is_composed_once_from_adapters_that_others_use_too() -> None:
    one, two = random_adapter(SHAPES, 1), random_adapter(SHAPES, 2)
    pool, executor = Pool(one, two), HeldExecutor()
    loader = pool.loader(executor)
    name = name_of(plan_of("fusion", (one, 0.5), (two, 0.25)))
    loads = [loader.load(name) for _ in range(3)]
    alone = loader.load(one.weights_digest)
    assert loader.loading == {name, one.weights_digest, two.weights_digest}
    assert [work() for work in executor.held[:2]] == [None, None], "the conversions of two adapters"
    del executor.held[:2]
    assert len(executor.held) == 1 and not loads[0].done(), "the average is computed on the executor too"
    executor.release()
    assert {id(load.result(0)) for load in loads} == {id(loader.load(name).result(0))}
    assert alone.result(0).weights_digest == one.weights_digest
    assert sorted(pool.fetched) == sorted([one.weights_digest, two.weights_digest])


def test_a_fusion_keeps_its_parts_until_it_is_composed_and_no_longer() -> None:
    one, two = random_adapter(SHAPES, 1), random_adapter(SHAPES, 2)
    executor = HeldExecutor()
    loader = Pool(one, two).loader(executor)
    name = name_of(plan_of("fusion", (one, 0.5), (two, 0.25)))
    load = loader.load(name)
    assert loader.pending_parts(name) == {each.weights_digest: loader.load(each.weights_digest) for each in (one, two)}
    executor.release()
    assert load.done() and loader.pending_parts(name) == {}
    part = weakref.ref(loader.load(two.weights_digest))
    loader.discard(two.weights_digest)
    gc.collect()
    assert part() is None, f"{one.weights_digest} is still cached and must not keep the other"


def test_a_part_that_cannot_be_loaded_fails_its_fusions_and_nothing_is_kept() -> None:
    one, missing = random_adapter(SHAPES, 1), random_adapter(SHAPES, 2)
    loader = Pool(one).loader()
    name = name_of(plan_of("fusion", (one, 0.5), (missing, 0.5)))
    assert isinstance(loader.load(name).exception(0), AdapterLoadFailed)
    assert name not in loader and one.weights_digest in loader and loader.pending_parts(name) == {}
    assert loader.load(one.weights_digest).exception(0) is None


def test_an_average_that_is_not_finite_is_refused() -> None:
    wide = [random_adapter(SHAPES, seed, size=5e37, scaling=1.0) for seed in (1, 2)]
    loader = Pool(*wide).loader()
    assert all(loader.load(weights.weights_digest).exception(0) is None for weights in wide)
    error = loader.load(name_of(plan_of("fusion", (wide[0], 4.0), (wide[1], 4.0)))).exception(0)
    assert isinstance(error, AdapterUnfit) and "non-finite" in str(error)


def test_discarding_a_part_drops_the_cached_fusions_that_contain_it() -> None:
    one, two, three = (random_adapter(SHAPES, seed) for seed in (1, 2, 3))
    loader = Pool(one, two, three).loader()
    names = [name_of(plan_of("fusion", (first, 0.5), (second, 0.5))) for first, second in ((one, two), (two, three))]
    for name in names:
        loader.load(name)
    loader.discard(one.weights_digest)
    assert [name in loader for name in names] == [False, True]
    loader.discard(two.weights_digest)
    loader.discard(three.weights_digest)
    assert loader.cached_bytes == 0


def test_an_executor_that_has_shut_down_fails_the_fusion() -> None:
    one, two = random_adapter(SHAPES, 1), random_adapter(SHAPES, 2)
    pool, executor = Pool(one, two), InlineExecutor()
    loader = pool.loader(executor)
    for weights in (one, two):
        loader.load(weights.weights_digest)

    def refuse(*_: object) -> Future[DeviceAdapter]:
        raise RuntimeError("cannot schedule new futures after shutdown")

    executor.submit = refuse  # type: ignore[method-assign,assignment]
    name = name_of(plan_of("fusion", (one, 0.5), (two, 0.5)))
    error = loader.load(name).exception(0)
    assert isinstance(error, AdapterLoadFailed) and isinstance(error.__cause__, RuntimeError)
    assert loader.pending_parts(name) == {}


def test_composing_leaves_the_adapters_unchanged() -> None:
    weights = random_adapter(SHAPES, 1)
    adapter = to_device_layout(weights, SHAPES, torch.float32)
    before = {name: module.a.clone() for name, module in adapter.modules.items()}
    composed("fusion(a*0.5+b*0.5)", [(adapter, 0.5), (adapter, 0.5)])
    assert all(torch.equal(adapter.modules[name].a, a) for name, a in before.items())
