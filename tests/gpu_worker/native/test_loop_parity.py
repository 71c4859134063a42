"""The engine's results equal the plain model with the composition merged into its weights, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.dense_mapping import dense_mapping
from gpu_worker.model.grouped_mapping import grouped_mapping
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.step_context import Composition, StepContext
from gpu_worker.native.attention.kv_pages import HostKvCache
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import MakeEngine, Shapes, ask, greedy, kv_shape, run_together
from tests.tiny import FAMILIES, assert_equal_logits, linear_shapes, plan_of, random_adapter

PROMPTS = ["a", "the quick brown fox", "0123456789" * 6, "x y", "lorem ipsum dolor sit amet " * 3]


def merged_delta(plan: Plan, adapters: Mapping[str, AdapterWeights], name: str, shape: tuple[int, int]) -> Tensor:
    """Return the weight change of a plan for one module, computed in full."""
    num_out, num_in = shape
    rank = max(adapters[row.weights_digest].max_rank for row in plan.adapters)
    sum_of_products = torch.zeros(num_out, num_in)
    sum_a, sum_b = torch.zeros(rank, num_in), torch.zeros(num_out, rank)
    for row in plan.adapters:
        module = adapters[row.weights_digest].modules.get(name)
        if module is None:
            continue
        scaled_b = module.lora_b * module.scaling
        sum_of_products += row.weight * scaled_b @ module.lora_a
        sum_a[: module.rank] += row.weight * module.lora_a
        sum_b[:, : module.rank] += row.weight * scaled_b
    return sum_b @ sum_a if plan.strategy == "fusion" else sum_of_products


def reference(
    folder: Path, prompt: str, plan: Plan, adapters: Mapping[str, AdapterWeights], num_new: int
) -> tuple[Tensor, list[int]]:
    """Return logits after the prompt and the greedy continuation: transformers in float64, weights merged, alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        for name, module in model.named_modules():
            if plan.adapters and isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight += merged_delta(plan, adapters, name, tuple(module.weight.shape))
        tokens = tokenizer(prompt).input_ids
        first: Tensor | None = None
        new: list[int] = []
        for _ in range(num_new):
            logits = model(torch.tensor([tokens + new]), use_cache=False).logits[0, -1]
            first = logits if first is None else first
            new.append(int(logits.argmax()))
    assert first is not None
    return first.float(), new


def mixed_pool(shapes: Mapping[str, tuple[int, int]]) -> list[AdapterWeights]:
    """Return adapters of unequal ranks, scalings and target modules, one with a rank pattern."""
    return [
        random_adapter(shapes, 0, rank=4),
        random_adapter(shapes, 1, rank=2, scaling=0.7),
        random_adapter(shapes, 2, rank=6, modules=lambda name: name.endswith(("q_proj", "v_proj"))),
        random_adapter(shapes, 3, rank_of=lambda name: 3 if "mlp" in name else 1, scaling=16 / 3**0.5),
    ]


def plans_over(pool: Sequence[AdapterWeights]) -> list[Plan]:
    a, b, c, d = pool
    third = 1 / 3
    return [
        BASE_PLAN,
        plan_of("selection", (a, 1.0)),
        plan_of("selection", (c, -0.5)),
        plan_of("mixture", (a, third), (b, third), (c, third)),
        plan_of("fusion", (a, 0.5), (b, 0.5)),
        plan_of("fusion", (b, third), (c, third), (d, third)),
        plan_of("mixture", (d, 0.8), (a, 0.2)),
        plan_of("fusion", (d, 1.0)),
    ]


def test_long_rows_are_equal_across_windows_and_length_groups(
    make_engine: MakeEngine, tiny_base: Callable[..., BaseModel], tiny_folders: Mapping[str, Path]
) -> None:
    weights = random_adapter(linear_shapes(tiny_base()), 6, size=0.1)
    adapters = {weights.weights_digest: weights}
    plan = plan_of("selection", (weights, 1.0))
    prompts = ["z" * 3, "ab" * 30, "abc" * 40]  # below, across and above the 64-token group; beyond the 12-token window
    jobs = [greedy(prompt, plan, i, num_new=20) for i, prompt in enumerate(prompts)]
    engine = make_engine(adapters, max_step_tokens=32)  # prompts arrive in chunks
    for prompt, answer in zip(prompts, run_together(engine, jobs), strict=True):
        expected_logits, expected_tokens = reference(tiny_folders["gemma3"], prompt, plan, adapters, 20)
        assert_equal_logits(answer.first_logits, expected_logits)
        assert answer.tokens == expected_tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_steps", [2, 5])
def test_a_lone_prompt_of_several_steps_equals_the_plain_model(
    num_steps: int, family: str, make_engine: MakeEngine, tiny_folders: Mapping[str, Path]
) -> None:
    """The first steps have no logits: only the last chunk of the prompt yields a token."""
    prompt = ("0123456789abcdef" * num_steps)[: 16 * num_steps - 5]  # 16 tokens per step; the last chunk is shorter
    engine = make_engine({}, family, max_step_tokens=16)
    head_rows = rows_of_head_products(engine)
    answer = ask(engine, greedy(prompt))
    for _ in range(num_steps - 1):
        engine.step()
    assert (answer.events, sum(head_rows)) == ([], 0)
    engine.run_until_idle()
    expected_logits, expected_tokens = reference(tiny_folders[family], prompt, BASE_PLAN, {}, 8)
    assert_equal_logits(answer.first_logits, expected_logits)
    assert answer.tokens == expected_tokens
    assert engine.num_steps == num_steps + 7


def rows_of_head_products(engine: Engine) -> list[int]:
    """Record the number of rows of every later product with the output head."""
    rows: list[int] = []
    head = engine.base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    return rows


def test_in_bfloat16_a_mixed_batch_stays_close_to_each_row_alone(make_engine: MakeEngine, shapes: Shapes) -> None:
    def engine_over(adapters: Mapping[str, AdapterWeights]) -> Engine:
        return make_engine(adapters, dtype="bfloat16")

    pool = mixed_pool(shapes)
    adapters = {weights.weights_digest: weights for weights in pool}
    jobs = [greedy(PROMPTS[i % len(PROMPTS)], plan, i) for i, plan in enumerate(plans_over(pool))]
    together = run_together(engine_over(adapters), jobs)
    for job, answer in zip(jobs, together, strict=True):
        [alone] = run_together(engine_over(adapters), [job])
        assert_equal_logits(answer.first_logits.bfloat16(), alone.first_logits.bfloat16())


def einsum_mixture(x: Tensor, lora_a: Tensor, lora_b: Tensor, mapping: Tensor) -> Tensor:
    """Return the paper's literal contraction. Dims: b rows, l tokens, p adapters, r rank, d in, o out."""
    h = torch.einsum("bld,prd->blpr", x, lora_a)
    outputs = torch.einsum("blpr,por->blpo", h, lora_b)
    return torch.einsum("blpo,bp->blo", outputs, mapping)


def einsum_fusion(x: Tensor, lora_a: Tensor, lora_b: Tensor, mapping: Tensor) -> Tensor:
    fused_a = torch.einsum("bp,prd->brd", mapping, lora_a)
    fused_b = torch.einsum("bp,por->bor", mapping, lora_b)
    return torch.einsum("blr,bor->blo", torch.einsum("bld,brd->blr", x, fused_a), fused_b)


@pytest.mark.parametrize("strategy", ["mixture", "fusion"])
@pytest.mark.parametrize("popularity", ["same", "distinct", "skewed"])
@pytest.mark.parametrize("by", ["dense", "grouped"])
def test_lora_linear_equals_the_papers_einsum(strategy: str, popularity: str, by: str, lora_kernel: LoraKernel) -> None:
    torch.manual_seed(0)
    num_rows, num_tokens, num_adapters, rank, num_in, num_out = 6, 5, 6, 4, 16, 24
    linear = torch.nn.Linear(num_in, num_out)
    bank = LoraBank({"m": linear}, num_adapters * rank + 7, free_fill=float("nan"))
    residency = Residency(bank)
    lora_a, lora_b = torch.randn(num_adapters, rank, num_in), torch.randn(num_adapters, num_out, rank)
    pool = [AdapterWeights(str(s), {"m": ModuleWeights(lora_a[s], lora_b[s], 1.0)}) for s in range(num_adapters)]
    chosen = {
        "same": [[0, 1, 2]] * num_rows,
        "distinct": [[s] for s in range(num_rows)],
        "skewed": [[0], [0, 1], [0, 1, 2, 3, 4, 5], [0], [5], [0, 3]],
    }[popularity]
    plans = [plan_of(strategy, *[(pool[s], 1 / len(row)) for s in row]) for row in chosen]  # type: ignore[arg-type]
    used = sorted({s for row in chosen for s in row})
    assert residency.try_pin([str(s) for s in used], {str(s): bank.to_device_layout(pool[s]) for s in used})
    residency.settle()
    mapping = torch.zeros(num_rows, num_adapters)
    for b, row in enumerate(chosen):
        mapping[b, row] = 1 / len(row)
    step = StepContext()
    segments = [Segment(b, b * num_tokens, num_tokens, 0) for b in range(num_rows)]
    counts = [num_tokens] * num_rows
    lora: Composition
    if by == "dense":
        lora = dense_mapping(plans, counts, residency, torch.float32, torch.device("cpu"))
    else:
        lora = grouped_mapping(plans, counts, residency, lora_kernel)
    step.fill(lora, HostKvCache(kv_shape(num_rows=num_rows, max_len=num_tokens)).attention(segments))
    x = torch.randn(num_rows, num_tokens, num_in)
    slow = einsum_mixture if strategy == "mixture" else einsum_fusion
    with torch.inference_mode():
        expected = linear(x) + slow(x, lora_a, lora_b, mapping)
        found = LoraLinear(linear, bank.modules["m"], step)(x.flatten(0, 1)[None])
    torch.testing.assert_close(found[0].view_as(expected), expected, atol=1e-4, rtol=1e-4)
