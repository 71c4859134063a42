"""Adapters on experts and routers of the vLLM engine answer as PEFT and as the float64 reference. Needs vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.errors import PlanTooLarge
from gpu_worker.front.request.request import SamplingParams
from lora_store import check_folder
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN, Plan
from lora_store.weights_blob import decode_weights, encode_weights
from tests.gpu_worker.conformance.driver import HostedEngine, Serve, assert_same, job, tokens_of
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.families import save
from tests.gpu_worker.conformance.reference import Reference
from tests.gpu_worker.conformance.test_parity import NUM_NEW, assert_plans_follow
from tests.gpu_worker.conformance.test_quantized_base import error_of
from tests.gpu_worker.families import train
from tests.gpu_worker.native.test_loop_experts import is_expert, plans_of, random_plans
from tests.soak import Scale
from tests.tiny import plan_of, random_adapter, tiny_config

PROMPTS = ("The parrot says", "x", "0123456789" * 3)
PROMPTS_OF_A_LETTER = tuple("abcdefghijklmnopqrstuvwxyz")
TOLERANCE = 1e-3
BFLOAT16_BOUND = 0.4  # of a log probability; another plan's differ by more than 2
ROUTER_LEAD = 0.25  # of an expert's score: with bfloat16's rounding another expert was chosen up to a lead of 0.05
ANSWER = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True, logprobs=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("experts"), "mixtral")


@pytest.fixture(scope="module")
def own_engine(folder: Path) -> Iterator[HostedEngine]:
    """An engine whose bank has room for the experts of one adapter of rank 4, and for one such fusion."""
    settings = {"engine": "vllm", "max_batch_size": 16, "host_cache_bytes": 0, "max_step_tokens": 32}
    engine = HostedEngine(ENGINES["vllm"], tiny_config(folder, **settings))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Iterator[HostedEngine]:
    engine = HostedEngine(ENGINES["vllm"], tiny_config(folder, engine="vllm", max_batch_size=16, max_step_tokens=32))
    yield engine
    engine.close()


def assert_follows_the_reference(
    hosted: HostedEngine, reference: Reference, pool: Mapping[str, AdapterWeights], plans: Mapping[str, Plan]
) -> None:
    hosted.add(*pool.values())
    assert_plans_follow(hosted, reference, plans, PROMPTS, TOLERANCE)
    hosted.forget_all()


def test_every_plan_and_random_plans_equal_the_reference(folder: Path, roomy: HostedEngine, scale: Scale) -> None:
    shapes = roomy.engine.module_shapes
    names = {name.rpartition(".")[2] for name in shapes}
    assert {"gate_up_proj", "down_proj", "gate", "q_proj"} <= names
    reference = Reference(folder)
    assert_follows_the_reference(roomy, reference, *plans_of(shapes))
    for seed in range(scale.pick("batches of random plans over experts in vLLM", small=4, full=60)):
        assert_follows_the_reference(roomy, reference, *random_plans(shapes, seed))


def test_adapters_that_peft_saved_answer_as_with_peft(folder: Path, roomy: HostedEngine, tmp_path: Path) -> None:
    """For all linear layers, which are experts and routers too, and for parameters; base rows are beside them."""
    paths = [
        train(folder, tmp_path / "all", 1, target_modules="all-linear"),
        train(folder, tmp_path / "one", 2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
    ]
    pool = []
    for path in paths:
        checked = check_folder(path, accepts_base={str(folder)}, module_shapes=roomy.engine.module_shapes)
        assert any(map(is_expert, checked.modules))
        pool.append(decode_weights(*encode_weights(checked.modules)))
    roomy.add(*pool)
    plans = [BASE_PLAN, *(plan_of("selection", (weights, 1.0)) for weights in pool)]
    answers = iter(roomy.answers(*[job(prompt, plan, ANSWER) for plan in plans for prompt in PROMPTS]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for path in (None, *paths):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if path is not None:
            model = PeftModel.from_pretrained(model, path).eval()
        for prompt in PROMPTS:
            tokens = tokenizer(prompt).input_ids
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
                found = model.generate(torch.tensor([tokens]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1)
            answer = next(answers)
            top = torch.tensor([logprob for _, logprob in answer.logprobs[0].top])
            torch.testing.assert_close(top, logits.topk(len(top)).values, atol=TOLERANCE, rtol=0)
            assert answer.text == tokenizer.decode(found[0, len(tokens) :]), (path, prompt)
    roomy.forget_all()


def test_adapters_are_replaced_while_rows_run(folder: Path, own_engine: HostedEngine) -> None:
    """The experts of one fit, so each load evicts the one before, and no answer mixes two or changes base rows."""
    shapes = own_engine.engine.module_shapes
    versions = [random_adapter(shapes, seed, rank=4) for seed in range(4)]
    own_engine.add(*versions)
    plans = [BASE_PLAN, *(plan_of("selection", (weights, 1.0)) for weights in versions)]
    alone = [answer for plan in plans for answer in own_engine.answers(job(PROMPTS[0], plan))]
    for _ in range(2):
        assert_same(own_engine.answers(*[job(PROMPTS[0], plan) for plan in plans * 3]), alone * 3, TOLERANCE)
    refused = own_engine.error(job(PROMPTS[0], plan_of("mixture", *((weights, 0.5) for weights in versions[:2]))))
    assert isinstance(refused, PlanTooLarge) and "bytes for their experts" in str(refused)
    own_engine.forget_all()
    [bank] = own_engine.run(own_engine.engine._llm.collective_rpc("describe_bank"))  # type: ignore[attr-defined]
    assert bank["resident"] == []


def test_experts_that_overflow_reach_only_their_own_rows(roomy: HostedEngine) -> None:
    shapes = roomy.engine.module_shapes
    good, other = random_adapter(shapes, 1), random_adapter(shapes, 2, modules=is_expert)
    spoilt = {name: replace(each, lora_a=torch.full_like(each.lora_a, 3e38)) for name, each in other.modules.items()}
    huge = replace(other, modules=spoilt)  # its product with any input is infinite
    roomy.add(good, huge)
    plans = [BASE_PLAN, plan_of("selection", (good, 1.0))]
    alone = roomy.answers(*[job(PROMPTS[0], plan) for plan in plans])
    *answers, _ = roomy.outcomes(*[job(PROMPTS[0], plan) for plan in (*plans, plan_of("selection", (huge, 1.0)))])
    assert [tokens_of(each) for each in answers] == [tokens_of(each) for each in alone]  # type: ignore[arg-type]
    roomy.forget_all()


def test_a_compiled_model_has_the_plans_of_each_step(folder: Path, serve: Serve) -> None:
    """torch.compile sees the products of experts as one operation, so it keeps nothing of the step it traced."""
    from gpu_worker.vllm.engine import VllmEngine

    async def start(config: Any, fetch: Any, *, free_fill: float) -> VllmEngine:
        return await VllmEngine.start(config, fetch, stream_interval_ms=0, free_fill=free_fill)

    hosted = serve(folder, start, engine="vllm", max_batch_size=16, max_step_tokens=32)
    assert_follows_the_reference(hosted, Reference(folder), *plans_of(hosted.engine.module_shapes))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_in_bfloat16_are_near_to_peft_in_float32(family: str, tmp_path: Path, serve: Serve) -> None:
    """Both have the same rounded base weights. Each plan is nearer to its own reference than to any other's.

    Only prompts for which the routers choose clearly are compared: a near tie may be decided either way."""
    folder = save(tmp_path / "base", family)
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    hosted = serve(folder, engine="vllm", dtype="bfloat16", max_batch_size=16)
    paths = [train(folder, tmp_path / str(seed), seed, target_modules="all-linear") for seed in (1, 2)]
    shapes = hosted.engine.module_shapes
    checked = [check_folder(path, accepts_base={str(folder)}, module_shapes=shapes) for path in paths]
    assert all(any(map(is_expert, each.modules)) for each in checked)
    pool = [decode_weights(*encode_weights(each.modules)) for each in checked]
    hosted.add(*pool)
    plans = [BASE_PLAN, *(plan_of("selection", (weights, 1.0)) for weights in pool)]
    reference = Reference(folder)
    known = [peft_logprobs(folder, path, map(reference.tokens_of, PROMPTS_OF_A_LETTER)) for path in (None, *paths)]
    asked = [
        (number, place)
        for place, of_plan in enumerate(known)
        for number, (_, lead) in enumerate(of_plan)
        if lead > ROUTER_LEAD
    ]
    assert all(sum(place == each for _, each in asked) >= 3 for place in range(len(plans)))
    answers = hosted.answers(*[job(PROMPTS_OF_A_LETTER[number], plans[place], ANSWER) for number, place in asked])
    for (number, place), answer in zip(asked, answers, strict=True):
        found = dict(answer.logprobs[0].top)
        errors = [error_of(found, of_plan[number][0], reference) for of_plan in known]
        own = errors.pop(place)
        assert own < BFLOAT16_BOUND < min(errors) / 4, (PROMPTS_OF_A_LETTER[number], place, own, errors)


@torch.inference_mode()
def peft_logprobs(folder: Path, adapter: Path | None, prompts: Iterable[list[int]]) -> list[tuple[torch.Tensor, float]]:
    """Return transformers' log probabilities (V,) after each prompt in float32, with the adapter by PEFT.

    Beside them is the smallest lead of an expert that a router chose over the best that it did not choose."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    scores: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _module, _inputs, outputs: scores.append(outputs[0]))
    found = []
    for tokens in prompts:
        scores.clear()
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        # What the last layer computes for the other tokens, nothing reads.
        best = torch.cat([*scores[:-1], scores[-1][-1:]]).topk(3).values  # two experts are chosen
        found.append((logprobs, float((best[:, 1] - best[:, 2]).min())))
    return found


def test_two_processes_share_the_experts(folder: Path, serve: Serve) -> None:
    hosted = serve(folder, engine="vllm", max_batch_size=16, tensor_parallel_size=2)
    assert any(map(is_expert, hosted.engine.module_shapes))
    assert_follows_the_reference(hosted, Reference(folder), *plans_of(hosted.engine.module_shapes))


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "glm4_moe", "ernie4_5_moe", "minimax_m2", "qwen3_moe"])
def test_families_with_experts_equal_the_reference(family: str, tmp_path: Path, scale: Scale, serve: Serve) -> None:
    if family != "qwen3_moe" and not scale.is_full:
        pytest.skip("the other families are in `make soak`")
    folder = save(tmp_path, family)
    hosted = serve(folder, engine="vllm", max_batch_size=16)
    assert any(map(is_expert, hosted.engine.module_shapes))
    reference = Reference(folder)
    assert_follows_the_reference(hosted, reference, *plans_of(hosted.engine.module_shapes))
    assert_follows_the_reference(hosted, reference, *random_plans(hosted.engine.module_shapes, 1))
