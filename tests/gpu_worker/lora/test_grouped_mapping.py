"""The compiled products against a loop over every token, in the precisions the worker runs in."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.lora.dense_mapping import DenseMapping
from gpu_worker.lora.grouped_mapping import GroupedMapping, grouped_mapping
from gpu_worker.lora.lora_kernel import LoraKernel
from gpu_worker.lora.mapping import composition
from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.tiny import plan_of

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


def pool_of(ranks: list[int], num_in: int, widths: dict[str, int]) -> list[AdapterWeights]:
    """Adapters of these ranks; every third lacks the last of several modules."""
    generator = torch.Generator().manual_seed(1)
    pool = []
    for number, rank in enumerate(ranks):
        names = list(widths)[: -1 if number % 3 == 2 and len(widths) > 1 else None]
        modules = {
            name: ModuleWeights(
                torch.randn(rank, num_in, generator=generator) / num_in**0.5,
                torch.randn(widths[name], rank, generator=generator),
                0.5 + number,
            )
            for name in names
        }
        pool.append(AdapterWeights(str(number), modules))
    return pool


def slow(x: Tensor, plan: Plan, pool: dict[str, AdapterWeights], name: str, num_out: int) -> Tensor:
    """What the plan adds to one token in one module, from the definitions, in float64."""
    rank = max((pool[row.weights_digest].max_rank for row in plan.adapters), default=0)
    u, added = torch.zeros(rank, dtype=torch.float64), torch.zeros(num_out, dtype=torch.float64)
    modules = [(row.weight, pool[row.weights_digest].modules.get(name)) for row in plan.adapters]
    for weight, module in modules:
        if module is not None:
            u[: module.rank] += weight * (module.lora_a.double() @ x.double())
    for weight, module in modules:
        if module is not None:
            h = u[: module.rank] if plan.strategy == "fusion" else module.lora_a.double() @ x.double()
            added += weight * module.scaling * (module.lora_b.double() @ h)
    return added


def random_plans(pool: list[AdapterWeights], num_rows: int) -> list[Plan]:
    draw = random.Random(2)
    plans = [BASE_PLAN, plan_of("selection", (pool[0], 1.0)), plan_of("mixture", (pool[1], 0.0), (pool[2], 1.5))]
    while len(plans) < num_rows:
        chosen = draw.sample(pool, draw.randint(1, 4))
        strategy = draw.choice(["mixture", "fusion"])
        plans.append(plan_of(strategy, *[(weights, draw.uniform(-1, 1)) for weights in chosen]))  # type: ignore[arg-type]
    draw.shuffle(plans)
    return plans


def settled(pool: list[AdapterWeights], num_in: int, widths: dict[str, int], dtype: torch.dtype) -> Residency:
    linears = {name: nn.Linear(num_in, width, dtype=dtype) for name, width in widths.items()}
    bank = LoraBank(linears, sum(weights.max_rank for weights in pool) + 5, free_fill=float("nan"))
    residency = Residency(bank)
    digests = [weights.weights_digest for weights in pool]
    assert residency.try_pin(digests, {weights.weights_digest: bank.to_device_layout(weights) for weights in pool})
    residency.settle()
    return residency


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_in", [1, 17, 64], ids=lambda width: f"in{width}")
@pytest.mark.parametrize("num_rows", [3, 40])
def test_grouped_products_equal_a_loop_over_tokens(
    num_rows: int, num_in: int, dtype: torch.dtype, lora_kernel: LoraKernel
) -> None:
    widths = {"x.q_proj": 33, "x.k_proj": 5, "x.v_proj": 130}
    pool = pool_of([4, 1, 7, 8, 3, 66], num_in, widths)
    pool = [
        AdapterWeights(
            weights.weights_digest,
            {n: ModuleWeights(m.lora_a.to(dtype), m.lora_b, m.scaling) for n, m in weights.modules.items()},
        )
        for weights in pool
    ]
    residency = settled(pool, num_in, widths, dtype)
    plans = random_plans(pool, num_rows)
    counts = [1 + row % 3 for row in range(num_rows)]
    lora = grouped_mapping(plans, counts, residency, lora_kernel)
    by_digest = {weights.weights_digest: weights for weights in pool}
    x = torch.randn(1, sum(counts), num_in).to(dtype)
    for name, width in widths.items():
        before = torch.randn(1, sum(counts), width).to(dtype)
        found = before.clone()
        lora.add(x, found, residency_bank(residency).modules[name])
        of_token = [plan for plan, count in zip(plans, counts, strict=True) for _ in range(count)]
        expected = before[0].double() + torch.stack(
            [slow(x[0, n], plan, by_digest, name, width) for n, plan in enumerate(of_token)]
        )
        bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found[0].double(), expected, atol=bound, rtol=0)


def residency_bank(residency: Residency) -> LoraBank:
    bank = residency._bank
    assert isinstance(bank, LoraBank)
    return bank


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_adapters_of_others_are_never_read(dtype: torch.dtype, lora_kernel: LoraKernel) -> None:
    pool = pool_of([4, 4], 16, {"m": 16})
    residency = settled(pool, 16, {"m": 16}, dtype)
    bank = residency_bank(residency)
    bank.modules["m"].bt[residency.rows("1")] = float("nan")
    plans = [plan_of("mixture", (pool[0], 1.0), (pool[1], 0.0)), BASE_PLAN, plan_of("selection", (pool[1], 1.0))]
    y = torch.zeros(1, 3, 16, dtype=dtype)
    grouped_mapping(plans, [1, 1, 1], residency, lora_kernel).add(
        torch.ones(1, 3, 16, dtype=dtype), y, bank.modules["m"]
    )
    assert y[0].isfinite().all(dim=1).tolist() == [True, True, False]
    assert not y[0, 1].any()


def test_many_tokens_of_few_adapters_take_the_dense_products(lora_kernel: LoraKernel) -> None:
    pool = pool_of([8, 8, 8], 16, {"m": 16})
    residency = settled(pool, 16, {"m": 16}, torch.float32)
    plan = plan_of("mixture", *[(weights, 1 / 3) for weights in pool])

    def chosen(num_tokens: int, plan: Plan) -> type:
        return type(composition([plan], [num_tokens], residency, torch.float32, lora_kernel, CPU))

    assert chosen(1, plan) is GroupedMapping
    assert chosen(1000, plan) is DenseMapping
    assert chosen(1000, plan_of("selection", (pool[0], 1.0))) is GroupedMapping  # it reads a third of the rows
    assert composition([BASE_PLAN], [1000], residency, torch.float32, lora_kernel, CPU) is None
