"""The adapters' additions to a layer, by a loop over tokens, with pools and plans to test."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.model.step_context import Composition
from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.tiny import plan_of

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # relative to the largest value
WIDTHS = {"x.q_proj": 33, "x.k_proj": 5, "x.v_proj": 130}  # they read the same input


def pool_of(
    ranks: Sequence[int], num_in: int, widths: Mapping[str, int], dtype: torch.dtype = torch.float32
) -> list[AdapterWeights]:
    """Return adapters of these ranks; every third lacks the last of several modules."""
    generator = torch.Generator().manual_seed(1)
    pool = []
    for number, rank in enumerate(ranks):
        names = list(widths)[: -1 if number % 3 == 2 and len(widths) > 1 else None]
        modules = {
            name: ModuleWeights(
                (torch.randn(rank, num_in, generator=generator) / num_in**0.5).to(dtype),
                torch.randn(widths[name], rank, generator=generator),
                0.5 + number,
            )
            for name in names
        }
        pool.append(AdapterWeights(str(number), modules))
    return pool


def added_slowly(x: Tensor, plan: Plan, pool: dict[str, AdapterWeights], name: str, num_out: int) -> Tensor:
    """Return the plan's addition to one token in one module, from the definitions, in float64."""
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


def settled(
    pool: Sequence[AdapterWeights],
    num_in: int,
    widths: Mapping[str, int],
    dtype: torch.dtype,
    *,
    is_packed: bool = True,
) -> tuple[LoraBank, Residency]:
    """Return a bank that holds the whole pool, with five spare rows that hold NaN."""
    linears = {name: nn.Linear(num_in, width, dtype=dtype) for name, width in widths.items()}
    bank = LoraBank(linears, sum(weights.max_rank for weights in pool) + 5, free_fill=float("nan"))
    residency = Residency(bank, is_packed=is_packed)
    digests = [weights.weights_digest for weights in pool]
    assert residency.try_pin(digests, {weights.weights_digest: bank.to_device_layout(weights) for weights in pool})
    residency.settle()
    return bank, residency


def assert_adds_as_the_loop(
    lora: Composition, bank: LoraBank, pool: Sequence[AdapterWeights], plans: Sequence[Plan], counts: Sequence[int]
) -> None:
    """Compare what `lora` adds to all modules, which read one input, with the loop: in one call and in one for each.

    Row b has plan b and `counts[b]` tokens.
    """
    by_digest = {weights.weights_digest: weights for weights in pool}
    of_token = [plan for plan, count in zip(plans, counts, strict=True) for _ in range(count)]
    dtype, num_in = next(iter(bank.modules.values())).bt.dtype, next(iter(bank.shapes.values()))[1]
    x = torch.randn(1, len(of_token), num_in).to(dtype)
    before = {name: torch.randn(1, len(of_token), width).to(dtype) for name, (width, _) in bank.shapes.items()}
    outputs = {name: y.clone() for name, y in before.items()}
    lora.add(x, [(outputs[name], module) for name, module in bank.modules.items()])
    for name, (width, _) in bank.shapes.items():
        lora.add(x, [(alone := before[name].clone(), bank.modules[name])])
        assert torch.equal(alone, outputs[name])
        added = [added_slowly(x[0, n], plan, by_digest, name, width) for n, plan in enumerate(of_token)]
        expected = before[name][0].double() + torch.stack(added)
        bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(outputs[name][0].double(), expected, atol=bound, rtol=0)
