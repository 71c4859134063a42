"""The engine's results equal the plain model with the composition merged into its weights, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from gpu_worker.model.base_model import BaseModel
from gpu_worker.native.loop import Engine
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.conformance.reference import Reference, Step
from tests.gpu_worker.engine_driver import Answer, MakeEngine, Shapes, ask, by_digest, greedy, run_together
from tests.gpu_worker.native.compiled_layers import jobs_of
from tests.tiny import FAMILIES, assert_equal_logits, linear_shapes, plan_of, random_adapter


def assert_follows(answer: Answer, expected: Sequence[Step]) -> None:
    assert answer.tokens == [step.token for step in expected]
    assert_equal_logits(answer.first_logits.log_softmax(-1), expected[0].logprobs.float())


def test_long_rows_are_equal_across_windows_and_length_groups(
    make_engine: MakeEngine, tiny_base: Callable[..., BaseModel], tiny_folders: Mapping[str, Path]
) -> None:
    weights = random_adapter(linear_shapes(tiny_base()), 6, size=0.1)
    adapters = {weights.weights_digest: weights}
    plan = plan_of("selection", (weights, 1.0))
    prompts = ["z" * 3, "ab" * 30, "abc" * 40]  # below, across and above the 64-token group; beyond the 12-token window
    jobs = [greedy(prompt, plan, i, num_new=20) for i, prompt in enumerate(prompts)]
    engine = make_engine(adapters, max_step_tokens=32)  # prompts arrive in chunks
    reference = Reference(tiny_folders["gemma3"])
    for prompt, answer in zip(prompts, run_together(engine, jobs), strict=True):
        assert_follows(answer, reference.greedy(prompt, plan, adapters, 20))


@pytest.mark.parametrize(
    ("family", "num_steps"), [(family, 2 if number % 2 else 5) for number, family in enumerate(FAMILIES)]
)
def test_a_lone_prompt_of_several_steps_equals_the_plain_model(
    family: str, num_steps: int, make_engine: MakeEngine, tiny_folders: Mapping[str, Path]
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
    assert_follows(answer, Reference(tiny_folders[family]).greedy(prompt, BASE_PLAN, {}, 8))
    assert engine.num_steps == num_steps + 7


def rows_of_head_products(engine: Engine) -> list[int]:
    """Record the number of rows of every later product with the output head."""
    rows: list[int] = []
    head = engine.base.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    return rows


def test_in_bfloat16_a_mixed_batch_stays_close_to_each_row_alone(make_engine: MakeEngine, shapes: Shapes) -> None:
    pool = [
        random_adapter(shapes, 1, rank=6, modules=lambda name: name.endswith(("q_proj", "v_proj"))),
        random_adapter(shapes, 2, rank_of=lambda name: 3 if "mlp" in name else 1, scaling=16 / 3**0.5),
    ]
    adapters, jobs = by_digest(*pool), jobs_of(pool)
    for job, answer in zip(jobs, run_together(make_engine(adapters, dtype="bfloat16"), jobs), strict=True):
        [alone] = run_together(make_engine(adapters, dtype="bfloat16"), [job])
        assert_equal_logits(answer.first_logits.bfloat16(), alone.first_logits.bfloat16())
