"""The engine's results equal the plain model with the composition merged into its weights, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.dense_mapping import dense_mapping
from gpu_worker.model.grouped_mapping import grouped_mapping
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.step_context import Composition, StepContext
from gpu_worker.native.attention.kv_pages import HostKvCache
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import MakeEngine, ask, by_digest, greedy, kv_shape, run_together
from tests.gpu_worker.families import eager_answer, whole_model
from tests.tiny import FAMILIES, TinyFolders, assert_equal_logits, linear_shapes, plan_of, random_adapter, tiny_config

PROMPTS = ["a", "the quick brown fox", "0123456789" * 6, "x y", "lorem ipsum dolor sit amet " * 3]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lone_prompt_of_several_steps_equals_the_plain_model(
    family: str, make_engine: MakeEngine, tiny_folders: TinyFolders
) -> None:
    """The first steps have no logits: only the last chunk of the prompt yields a token."""
    num_steps = 3
    prompt = ("0123456789abcdef" * num_steps)[: 16 * num_steps - 5]  # 16 tokens per step; the last chunk is shorter
    engine = make_engine({}, family, max_step_tokens=16)
    head_rows = rows_of_head_products(engine)
    answer = ask(engine, greedy(prompt))
    for _ in range(num_steps - 1):
        engine.step()
    assert (answer.events, sum(head_rows)) == ([], 0)
    engine.run_until_idle()
    tokens = AutoTokenizer.from_pretrained(tiny_folders[family])(prompt).input_ids
    expected_logits, expected_tokens = eager_answer(whole_model(tiny_folders[family]), tokens, 8)
    assert_equal_logits(answer.first_logits, expected_logits)
    assert answer.tokens == expected_tokens
    assert engine.num_steps == num_steps + 7


def rows_of_head_products(engine: Engine) -> list[int]:
    """Record the number of rows of every later product with the output head."""
    rows: list[int] = []
    head = engine.base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    return rows


def test_in_bfloat16_a_mixed_batch_stays_close_to_each_row_alone(
    make_engine: MakeEngine, tiny_folders: TinyFolders
) -> None:
    base = load_base_model(tiny_config(tiny_folders["gemma3"], dtype="bfloat16"))
    pool = mixed_pool(linear_shapes(base))
    engine = make_engine(by_digest(*pool), base=base, prefix_cache=False)
    jobs = [greedy(PROMPTS[i % len(PROMPTS)], plan, i) for i, plan in enumerate(plans_over(pool))]
    for job, answer in zip(jobs, run_together(engine, jobs), strict=True):
        [alone] = run_together(engine, [job])
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
