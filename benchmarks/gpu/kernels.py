"""The products of plans on a GPU without an engine: checked against a loop over rows, and timed. Needs Triton.

On the CPU Triton's interpreter computes them, if `TRITON_INTERPRET` is 1 before this file is imported.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.engine_cases import plan_of, plans
from benchmarks.gpu.checks import Check, outcome
from benchmarks.gpu.speed import Measured, Sizes, bandwidth
from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.model.dense_mapping import dense_mapping
from gpu_worker.model.step_context import Composition
from gpu_worker.vllm.tiled_plans import TiledPlans
from lora_store import BASE_PLAN, STRATEGIES, AdapterRef, AdapterWeights, ModuleWeights, Plan

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # relative to the largest value
_ROUNDS = 20
_SMALL = {"q_proj": (70, 300), "k_proj": (33, 300), "down_proj": (130, 64)}  # (out, in)
_RANKS = (4, 1, 7, 18, 8)


@dataclass(frozen=True)
class Bank:
    """A full bank with its residency and the adapters in it. Free rows are NaN."""

    bank: LoraBank
    residency: Residency
    pool: list[AdapterWeights]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls, shapes: dict[str, tuple[int, int]], ranks: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> Bank:
        """Make a bank for modules of these (out, in), with one random adapter of each rank, named by its number."""
        linears = {name: nn.Linear(i, o, dtype=dtype, device="meta") for name, (o, i) in shapes.items()}
        bank = LoraBank(linears, sum(ranks) + 5, free_fill=float("nan"), device=device)
        draws = torch.Generator().manual_seed(0)
        pool = []
        for number, rank in enumerate(ranks):
            modules = {
                name: ModuleWeights(
                    (torch.randn(rank, i, generator=draws) / i**0.5).to(dtype),
                    torch.randn(o, rank, generator=draws).to(dtype),
                    0.5,
                )
                for name, (o, i) in shapes.items()
            }
            pool.append(AdapterWeights(str(number), modules))
        residency = Residency(bank)
        loaded = {weights.weights_digest: bank.to_device_layout(weights) for weights in pool}
        assert residency.try_pin(list(loaded), loaded)
        residency.settle()
        return cls(bank, residency, pool, device, dtype)

    def tiles(self, most_tokens: int, most_plans: int) -> TiledPlans:
        sizes = {"most_tokens": most_tokens, "most_plans": most_plans, "num_rows": self.bank.num_rows}
        return TiledPlans(**sizes, device=self.device)

    def inputs(self, num_tokens: int) -> dict[str, Tensor]:
        """Return a random input for each module; modules that read the same input share it."""
        by_bank: dict[int, Tensor] = {}
        for name, module in self.bank.modules.items():
            if id(module.inputs) not in by_bank:
                x = torch.randn(num_tokens, self.bank.shapes[name][1], device=self.device)
                by_bank[id(module.inputs)] = x.to(self.dtype)
        return {name: by_bank[id(module.inputs)] for name, module in self.bank.modules.items()}

    def outputs(self, num_tokens: int) -> dict[str, Tensor]:
        shapes = self.bank.shapes.items()
        return {name: torch.zeros(num_tokens, o, dtype=self.dtype, device=self.device) for name, (o, _) in shapes}

    def add(self, step: Composition, xs: dict[str, Tensor], ys: dict[str, Tensor]) -> None:
        for name, module in self.bank.modules.items():
            step.add(xs[name], [(ys[name], module)])


def run_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Yield the result of each check: launched directly, and on a GPU replayed from a graph that has no plans."""
    bank = Bank.of(_SMALL, _RANKS, device, dtype)
    for name, counts in (("single tokens", [1] * 8), ("prompts and tokens", [1, 18, 1, 40, 2, 1, 1, 33])):
        yield from _checks_of(bank, name, counts)


def _checks_of(bank: Bank, name: str, counts: Sequence[int]) -> Iterator[Check]:
    steps = [_drawn(bank.pool, len(counts), seed) for seed in range(2)]
    tiles, xs, ys = bank.tiles(sum(counts), len(counts)), bank.inputs(sum(counts)), bank.outputs(sum(counts))
    computations: dict[str, Callable[[], object]] = {"products": lambda: bank.add(tiles, xs, ys)}
    if bank.device.type == "cuda":
        tiles.fill([BASE_PLAN], [sum(counts)], bank.residency)
        computations["a graph"] = captured(computations["products"]).replay
    for what, compute in computations.items():
        worst = 0.0
        for asked in steps:
            tiles.fill(asked, counts, bank.residency)
            for y in ys.values():
                y.zero_()
            compute()
            worst = max(worst, _furthest(bank, xs, ys, asked, counts))
        yield outcome(f"{what} of {name}", worst <= TOLERANCE[bank.dtype], f"{worst:.1e}")


def run_speed(
    device: torch.device, shapes: dict[str, tuple[int, int]], num_layers: int, sizes: Sizes
) -> Iterator[Measured]:
    """Yield the microseconds of a layer's products in a decode step, next to those of the layer's own products.

    `shapes`: (out, in) of the modules of one layer. Each of `num_layers` has tensors of its own, so that no cache holds
    them. `floor_us`: reading the used rank rows once. On a GPU all are replayed from graphs.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    of_all = {f"layers.{layer}.{name}": shape for layer in range(num_layers) for name, shape in shapes.items()}
    bank = Bank.of(of_all, [sizes.rank] * max(sizes.active), device, dtype)
    weights = {name: torch.randn(o, i, device=device).to(dtype) for name, (o, i) in of_all.items()}
    row_bytes = sum(o + i for o, i in shapes.values()) * dtype.itemsize
    bytes_per_s = bandwidth(device.type)
    tiles = bank.tiles(max(sizes.batches), max(sizes.batches))
    for num_rows in sizes.batches:
        xs, ys = bank.inputs(num_rows), bank.outputs(num_rows)
        linears_us = (
            seconds_of(lambda xs=xs: [xs[name] @ w.T for name, w in weights.items()], device) / num_layers * 1e6
        )
        for active in sizes.active:
            asked = plans("mixture", active, num_rows)
            tiles.fill(asked, [1] * num_rows, bank.residency)
            dense = dense_mapping(asked, [1] * num_rows, bank.residency, dtype, device)
            found = {
                name: seconds_of(lambda step=step, xs=xs, ys=ys: bank.add(step, xs, ys), device) / num_layers * 1e6
                for name, step in (("tiles_us", tiles), ("dense_us", dense))
            }
            num_used = len({adapter.weights_digest for plan in asked for adapter in plan.adapters}) * sizes.rank
            floor = {"linears_us": linears_us, "floor_us": num_used * row_bytes / bytes_per_s * 1e6}
            yield {"what": f"products of mixture {active} x{num_rows}"} | found | floor


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return the graph of the launches, after two runs that compile them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a run; on a GPU of a replay of its graph."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    graph = captured(run)
    found = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def _furthest(
    bank: Bank, xs: dict[str, Tensor], ys: dict[str, Tensor], asked: Sequence[Plan], counts: Sequence[int]
) -> float:
    """Return the largest difference of ys from the loop, relative to the largest value; infinite if one is NaN."""
    worst = 0.0
    for name, y in ys.items():
        parts = zip(xs[name].split(list(counts)), asked, strict=True)
        expected = torch.cat([_added(x, plan, bank.pool, name) for x, plan in parts])
        distance = (y.double().cpu() - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(distance.nan_to_num(nan=float("inf"))))
    return worst


def _added(x: Tensor, plan: Plan, pool: Sequence[AdapterWeights], name: str) -> Tensor:
    """Return the plan's addition (N, out) for x (N, in), from the definition, in float64 on the CPU."""
    x = x.double().cpu()
    parts = [(adapter.weight, pool[int(adapter.weights_digest)].modules[name]) for adapter in plan.adapters]
    total = torch.zeros(len(x), pool[0].modules[name].lora_b.shape[0], dtype=torch.float64)
    inner = [m * (x @ module.lora_a.double().T) for m, module in parts]
    if plan.strategy == "fusion":
        rank = max(h.shape[1] for h in inner)
        summed = torch.stack([nn.functional.pad(h, (0, rank - h.shape[1])) for h in inner]).sum(0)
        inner = [m * summed[:, : module.rank] for m, module in parts]
    for h, (_, module) in zip(inner, parts, strict=True):
        total += h @ module.lora_b.double().T * module.scaling
    return total


def _drawn(pool: Sequence[AdapterWeights], count: int, seed: int) -> list[Plan]:
    """Return plans of every kind over the pool, in random order."""
    draw = random.Random(seed)
    named = [(AdapterRef("gpu", w.weights_digest, w.weights_digest), w.weights_digest) for w in pool]
    found = [BASE_PLAN, plan_of("selection", named[:1]), plan_of("fusion", named), plan_of("mixture", named)]
    several = [name for name, strategy in STRATEGIES.items() if strategy.most_adapters > 1]
    while len(found) < count:
        found.append(plan_of(draw.choice(several), draw.sample(named, draw.randint(1, 4))))
    draw.shuffle(found)
    return found
