"""Every engine answers as the float64 reference does, for every kind of plan, alone and in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.front.request.request import Completion, SamplingParams
from lora_store.composition import compose
from lora_store.peft_files import write_peft_folder
from lora_store.plan import BASE_PLAN, Plan
from lora_store.strategies.registry import STRATEGIES
from lora_store.weights_blob import decode_weights, encode_weights
from tests.gpu_worker.conformance.driver import HostedEngine, MakeAdapter, assert_same, job, tokens_of
from tests.gpu_worker.conformance.reference import Reference, Step
from tests.lora_store.builders import read_folder
from tests.tiny import plan_of

PROMPTS = ("The parrot says", "x", "A prompt longer than one step of this engine, " * 3, "A prompt of two steps " * 4)
NUM_NEW = 8


def attention(name: str) -> bool:
    return "self_attn.q_proj" in name or "self_attn.v_proj" in name


def unequal_ranks(name: str) -> int:
    return 5 if "up_proj" in name else 1 if "q_proj" in name else 2


def plans_of(adapter: MakeAdapter) -> dict[str, Plan]:
    """Return one plan of every kind, over three adapters."""
    plain, partial, unequal = adapter(1), adapter(2, rank=3, modules=attention), adapter(3, rank_of=unequal_ranks)
    rank_stabilised = adapter(4, rank=4, scaling=6 / 4**0.5)
    return {
        "base": BASE_PLAN,
        "selection": plan_of("selection", (plain, 1.0)),
        "selection with a weight": plan_of("selection", (plain, -0.7)),
        "an adapter without most modules": plan_of("selection", (partial, 1.0)),
        "ranks that differ between modules": plan_of("selection", (unequal, 1.0)),
        "rank-stabilised scaling": plan_of("selection", (rank_stabilised, 1.0)),
        "mixture of two": plan_of("mixture", (plain, 0.5), (partial, 0.5)),
        "mixture of three": plan_of("mixture", (plain, 1 / 3), (partial, 0.4), (unequal, -0.25)),
        "mixture with a weight of zero": plan_of("mixture", (plain, 0.0), (partial, 1.0)),
        "fusion of one": plan_of("fusion", (plain, 1.0)),
        "fusion of three": plan_of("fusion", (plain, 0.5), (partial, 0.3), (unequal, 0.4)),
    } | {
        f"registered {name}": plan_of(name, (plain, 0.8), (unequal, 0.2))
        for name, strategy in STRATEGIES.items()
        if strategy.most_adapters > 1
    }


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_every_kind_of_plan_equals_the_reference(
    prompt: str, hosted: HostedEngine, adapter: MakeAdapter, reference: Reference, tolerance: float
) -> None:
    plans = plans_of(adapter)
    answers = assert_plans_follow(hosted, reference, plans, [prompt], tolerance)
    texts = {tuple(tokens_of(answer)) for answer in answers}
    assert len(texts) > len(plans) / 2, "the adapters should matter"


def assert_plans_follow(
    hosted: HostedEngine, reference: Reference, plans: Mapping[str, Plan], prompts: Sequence[str], tolerance: float
) -> list[Completion]:
    """Check that one batch of all plans and prompts answers as the reference, and return the answers."""
    asked = [(name, prompt) for name in plans for prompt in prompts]
    answers = hosted.answers(*[job(prompt, plans[name]) for name, prompt in asked])
    for (name, prompt), answer in zip(asked, answers, strict=True):
        steps = reference.greedy(prompt, plans[name], hosted.pool, NUM_NEW)
        assert_follows(f"{name}: {prompt}", answer, steps, reference, tolerance)
    return answers


def assert_follows(
    name: str, answer: Completion, steps: Sequence[Step], reference: Reference, tolerance: float
) -> None:
    """Check that the answer has the steps' tokens, and their log probabilities."""
    assert tokens_of(answer) == [reference.token_bytes(step.token) for step in steps], name
    for entry, step in zip(answer.logprobs, steps, strict=True):
        known = step.logprobs.topk(len(entry.top)).values
        found = torch.tensor([logprob for _, logprob in entry.top], dtype=torch.float64)
        assert float((found - known).abs().max()) <= tolerance, name
        assert abs(entry.logprob - float(step.logprobs[step.token])) <= tolerance, name


def test_a_mixture_equals_pefts_concatenation(
    hosted: HostedEngine, adapter: MakeAdapter, model_folder: Path, tmp_path: Path, tolerance: float
) -> None:
    parts = [(adapter(11), 0.7), (adapter(12, rank=2, modules=attention), -0.4), (adapter(13, rank=3), 0.5)]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    for number, (weights, _) in enumerate(parts):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_peft_folder(folder, weights.modules, base_model="tiny")
        if number == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="0")
        else:
            model.load_adapter(folder, adapter_name=str(number))
    names, weights_of = [str(number) for number in range(len(parts))], [weight for _, weight in parts]
    model.add_weighted_adapter(names, weights_of, "mixed", combination_type="cat")
    model.set_adapter("mixed")
    tokens = AutoTokenizer.from_pretrained(model_folder)(PROMPTS[0], return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = model.eval()(input_ids=tokens).logits[0, -1].log_softmax(-1)
    one_token = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=20)
    [answer] = hosted.answers(job(PROMPTS[0], plan_of("mixture", *parts), one_token))
    found = torch.tensor([logprob for _, logprob in answer.logprobs[0].top])
    torch.testing.assert_close(found, expected.topk(20).values, atol=tolerance, rtol=0)


@pytest.mark.parametrize("rank", [None, 9])
def test_a_composed_adapter_answers_as_the_mixture_in_peft_and_here(
    rank: int | None,
    hosted: HostedEngine,
    adapter: MakeAdapter,
    reference: Reference,
    model_folder: Path,
    tmp_path: Path,
    tolerance: float,
) -> None:
    """Of adapters of other ranks, scalings and modules. Rank 9 is the sum of their ranks, so it loses nothing."""
    stabilised = adapter(12, rank=2, modules=attention, scaling=6 / 2**0.5)
    parts = [(adapter(11), 0.7), (stabilised, -0.4), (adapter(13, rank=3), 0.5)]
    mixture = plan_of("mixture", *parts)
    composed, _ = compose([(weights.modules, weight) for weights, weight in parts], rank)
    write_peft_folder(tmp_path, composed, base_model="tiny")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, tmp_path, autocast_adapter_dtype=False).double().eval()
    tokens = reference.tokens_of(PROMPTS[0])
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    expected = reference.prompt_logprobs(tokens, mixture, hosted.pool)
    assert float((found - expected).abs().max()) < 1e-4
    digest, blob = encode_weights(read_folder(tmp_path).modules)
    stored = decode_weights(digest, blob)
    hosted.add(stored)
    [mixed], [one] = (hosted.answers(job(PROMPTS[0], plan)) for plan in (mixture, plan_of("selection", (stored, 1.0))))
    assert_same([mixed], [one], tolerance)


def test_the_same_prompt_under_other_plans_shares_no_computed_blocks(
    hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    """Repeated requests may use a prefix cache; its key must include the whole composition."""
    one, other = adapter(21), adapter(22)
    plans = [
        BASE_PLAN,
        plan_of("selection", (one, 1.0)),
        plan_of("selection", (one, 0.5)),
        plan_of("mixture", (one, 0.5), (other, 0.5)),
        plan_of("fusion", (one, 0.5), (other, 0.5)),
        plan_of("mixture", (one, 0.5), (other, 0.25)),
    ]
    prompt = "one long prompt that fills several blocks of a cache of keys and values " * 3
    first = [answer for plan in plans for answer in hosted.answers(job(prompt, plan))]
    again = hosted.answers(*[job(prompt, plan) for plan in plans])
    assert len({round(answer.logprobs[0].logprob, 4) for answer in first}) == len(plans)
    assert_same(again, first, tolerance)
