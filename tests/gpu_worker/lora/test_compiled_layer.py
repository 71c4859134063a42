"""Compiled decoder layers give the answers of their parts, bit for bit, and leave alone what they cannot compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gpu_worker.config import DEFAULT_CACHE_DIR
from gpu_worker.engine import device_parts
from gpu_worker.engine.engine import Engine
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.lora import compiled_layer
from gpu_worker.lora.compiled_layer import CompiledLayer, LayerKernel, load_layer_kernel
from gpu_worker.model.base_model import BaseModel, load_base_model
from gpu_worker.model.packed_linear import load_linear_kernel
from gpu_worker.request.request import Job
from gpu_worker.step.attention_plan import Segment
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import MakeEngine, ask, by_digest, compiled, greedy, only, run_together
from tests.gpu_worker.families import EQUAL, save
from tests.soak import Scale
from tests.tiny import FAMILIES, plan_of, random_adapter, tiny_config

NUM_LAYERS = 3
MakeBf16 = Callable[..., Engine]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tokens of every call of the kernel."""
    seen, call = list[int](), LayerKernel.__call__

    def counted(kernel: LayerKernel, layer: int, step: int, cache: int, x: Tensor, y: Tensor) -> None:
        seen.append(x.shape[1])
        call(kernel, layer, step, cache, x, y)

    monkeypatch.setattr(LayerKernel, "__call__", counted)
    return seen


@pytest.fixture
def make_bf16(make_engine: MakeEngine, tiny_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> MakeBf16:
    """Return a factory of engines in bfloat16, whose layers are compiled on every processor, unless told otherwise."""
    kernel = compiled(load_linear_kernel)
    compiled(load_layer_kernel)
    monkeypatch.setattr(device_parts, "make_linear_kernel", lambda config: kernel)

    def make(adapters: Mapping[str, AdapterWeights], family: str = "gemma3", **changes: Any) -> Engine:
        base = changes.pop("base", None) or load_base_model(tiny_config(tiny_folders[family], dtype="bfloat16"))
        if not changes.pop("compiles", True):
            with monkeypatch.context() as patched:
                patched.setattr(device_parts, "compile_layers", lambda model, kernel: 0)
                return make_engine(adapters, family, base=base, dtype="bfloat16", **changes)
        return make_engine(adapters, family, base=base, dtype="bfloat16", **changes)

    return make


def jobs_of(pool: list[AdapterWeights]) -> list[Job]:
    """Return requests of every strategy, with prompts on both sides of the tiny models' window of 12 tokens."""
    one, other = pool
    parts = (one, 0.7), (other, 0.6)
    plans = [BASE_PLAN, only(one), only(other), plan_of("mixture", *parts), plan_of("fusion", *parts), BASE_PLAN]
    prompts = ["a", "the quick brown fox", "0123456789" * 3, "x y", "lorem ipsum", "what is it?"]
    return [greedy(prompt, plan, number, 12) for number, (prompt, plan) in enumerate(zip(prompts, plans, strict=True))]


def logits_of(engine: Engine, jobs: list[Job]) -> list[Tensor]:
    """Run the jobs together and return the logits of every step."""
    steps, compute = list[Tensor](), engine._forward.logits

    def recorded(*arguments: Any) -> Tensor:
        logits = compute(*arguments)
        steps.append(logits.clone())
        return logits

    engine._forward.logits = recorded  # type: ignore[method-assign]
    assert all(len(answer.tokens) == 12 for answer in run_together(engine, jobs))
    return steps


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_give_the_logits_of_their_parts(
    family: str, make_bf16: MakeBf16, pool: list[AdapterWeights], calls: list[int]
) -> None:
    engine = make_bf16(by_digest(*pool), family)
    calls.clear()  # the engine checks the model
    found = logits_of(engine, jobs_of(pool))
    num_calls = len(calls)
    expected = logits_of(make_bf16(by_digest(*pool), family, compiles=False), jobs_of(pool))
    assert len(calls) == num_calls, "the second engine has no compiled layer"
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"step {step}"
    num_prompt_steps = len(found) - num_calls // NUM_LAYERS
    assert num_calls % NUM_LAYERS == 0 and 0 < num_prompt_steps < len(found) / 2


def test_every_family_answers_alike_with_compiled_layers(
    tmp_path: Path, make_bf16: MakeBf16, calls: list[int], scale: Scale
) -> None:
    """Families that add, scale or order the parts in another way keep their own layers."""
    jobs = [greedy(prompt, num_new=8) for prompt in ("a", "the quick brown fox", "0123456789")]
    are_compiled = {"gemma", "qwen2", "seed_oss", "smollm3"}
    names = sorted(EQUAL, key=lambda name: (name not in are_compiled, name))
    names = names[: scale.pick("families with compiled layers", small=6, full=len(EQUAL))]
    were_compiled = set()
    for name in names:
        folder, answers = save(tmp_path / name, name, EQUAL[name]), []
        for compiles in (True, False):
            base = load_base_model(tiny_config(folder, dtype="bfloat16"))
            found = run_together(make_bf16({}, base=base, compiles=compiles), jobs)
            answers.append([(answer.tokens, answer.first_logits.tolist()) for answer in found])
            if calls:
                were_compiled.add(name)
            calls.clear()
        assert answers[0] == answers[1], name
    dense_layers_of_experts = {"glm4_moe"}
    assert are_compiled <= were_compiled <= are_compiled | dense_layers_of_experts


@pytest.mark.parametrize("parts", [("q_proj", "down_proj"), ("v_proj", "up_proj"), ("o_proj",)])
def test_adapters_of_few_modules(
    parts: tuple[str, ...], make_bf16: MakeBf16, shapes: dict[str, tuple[int, int]], calls: list[int]
) -> None:
    pool = [random_adapter(shapes, seed, rank=3, modules=lambda name: name.endswith(parts)) for seed in (1, 2)]
    found = logits_of(make_bf16(by_digest(*pool)), jobs_of(pool))
    assert calls
    expected = logits_of(make_bf16(by_digest(*pool), compiles=False), jobs_of(pool))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_modules_that_leave_the_bank_are_no_longer_added(
    make_bf16: MakeBf16, shapes: dict[str, tuple[int, int]], calls: list[int]
) -> None:
    """The bank's free rows hold NaN, which would reach the answer."""
    wide = random_adapter(shapes, 1, rank=3)
    narrow = random_adapter(shapes, 2, rank=4, modules=lambda name: name.endswith("q_proj"))
    engine = make_bf16(by_digest(wide, narrow), bank_rank_rows=4)
    run_together(engine, [greedy("abc", only(wide))])
    calls.clear()
    found = run_together(engine, [greedy("abc", only(narrow))])[0]
    assert calls
    alone = run_together(make_bf16(by_digest(narrow), compiles=False), [greedy("abc", only(narrow))])[0]
    assert found.tokens == alone.tokens


def test_a_row_that_is_not_finite_changes_no_other(
    make_bf16: MakeBf16, shapes: dict[str, tuple[int, int]], calls: list[int]
) -> None:
    good, bad = random_adapter(shapes, 1, rank=3), random_adapter(shapes, 2, rank=3, size=1e25)
    engine = make_bf16(by_digest(good, bad))
    wanted = [greedy("abc", only(good), 1), greedy("abc", BASE_PLAN, 2)]
    expected = [answer.tokens for answer in run_together(engine, wanted)]
    calls.clear()
    answers = run_together(engine, [*wanted, greedy("abc", only(bad), 3)])
    assert calls
    assert answers[2].error is not None, "the sums overflow"
    assert [answer.tokens for answer in answers[:2]] == expected


def test_steps_with_a_prompt_take_the_layers_own_way(
    make_bf16: MakeBf16, pool: list[AdapterWeights], calls: list[int]
) -> None:
    engine = make_bf16(by_digest(*pool))
    calls.clear()  # the engine checks the model
    ask(engine, greedy("a prompt", only(pool[0])))
    engine.step()
    assert calls == []
    engine.step()
    assert calls == [1] * NUM_LAYERS
    ask(engine, greedy("another", BASE_PLAN))
    engine.step()
    assert calls == [1] * NUM_LAYERS
    engine.step()
    assert calls == [1] * NUM_LAYERS + [2] * NUM_LAYERS


def test_guessed_tokens_are_compiled(make_bf16: MakeBf16, calls: list[int]) -> None:
    """A row's guesses are further tokens of the step."""
    job = greedy("abcabcabcabc" * 3, num_new=24)
    engine = make_bf16({}, prompt_lookup_tokens=7)
    calls.clear()
    found = run_together(engine, [job])[0]
    assert max(calls) > 1
    assert found.tokens == run_together(make_bf16({}, prompt_lookup_tokens=7, compiles=False), [job])[0].tokens


def test_dense_products_take_the_layers_own_way(
    make_bf16: MakeBf16, pool: list[AdapterWeights], calls: list[int]
) -> None:
    engine = make_bf16(by_digest(*pool), lora_products="torch")
    calls.clear()
    found = run_together(engine, [greedy("abc", only(pool[0]))])[0]
    assert calls == []
    alone = run_together(make_bf16(by_digest(*pool), compiles=False), [greedy("abc", only(pool[0]))])[0]
    assert found.first_logits.isfinite().all() and len(found.tokens) == len(alone.tokens)
    run_together(engine, [greedy("abc")])
    assert calls, "the base model needs no products"


def test_a_hook_inside_a_layer_is_run(make_bf16: MakeBf16, calls: list[int]) -> None:
    engine, seen = make_bf16({}), list[int]()
    layer = engine.base.model.model.layers[1]
    handle = layer.mlp.up_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(0))
    calls.clear()
    run_together(engine, [greedy("abc", num_new=3)])
    assert len(calls) == 2 * (NUM_LAYERS - 1), "of two decode steps"
    assert seen == [4, 0, 1, 0, 1, 0]
    handle.remove()
    run_together(engine, [greedy("abc", num_new=3)])
    assert len(calls) == 2 * (NUM_LAYERS - 1) + 2 * NUM_LAYERS
    assert seen[6:] == [0, 0, 0]


class Scaled(LlamaDecoderLayer):
    """Adds half of its attention, as Granite does."""

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)
        hidden_states = hidden_states + attended * 0.5
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Parallel(LlamaDecoderLayer):
    """Reads one input in both parts, as Cohere does."""

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


class Same(LlamaDecoderLayer):
    """Computes the same as its base class."""


@pytest.mark.parametrize(("kind", "num_compiled"), [(Same, NUM_LAYERS), (Scaled, 0), (Parallel, 0)])
def test_only_layers_with_the_kernels_order_are_compiled(
    kind: type[LlamaDecoderLayer],
    num_compiled: int,
    make_bf16: MakeBf16,
    tiny_folders: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base: BaseModel = load_base_model(tiny_config(tiny_folders["llama"], dtype="bfloat16"))
    for layer in base.model.model.layers:
        layer.__class__ = kind
    counts, compile_layers = list[int](), compiled_layer.compile_layers
    monkeypatch.setattr(device_parts, "compile_layers", lambda *parts: counts.append(compile_layers(*parts)))
    make_bf16({}, "llama", base=base)
    assert counts == [num_compiled]


def test_heads_that_the_cache_does_not_have_are_refused_as_without_the_kernel(
    make_bf16: MakeBf16, calls: list[int]
) -> None:
    engine = make_bf16({})
    calls.clear()
    ask(engine, greedy("abc"))
    engine.step()
    layer = next(layer for layer in engine.base.model.model.layers if isinstance(layer.forward, CompiledLayer))
    engine.kv_cache.keys[0] = engine.kv_cache.keys[0][:1]
    layer.forward._cache = None
    ask(engine, greedy("abc"))
    with pytest.raises(BaseModelUnsupported, match="key/value heads"):
        layer(torch.zeros(1, 1, 32).bfloat16(), **arguments_of(engine))
    assert calls == []


def arguments_of(engine: Engine) -> dict[str, Any]:
    """Return the arguments that the model passes to its first layer in a step of one decoded token."""
    step = engine._forward._context
    step.fill(None, engine.kv_cache.attention([Segment(0, 0, 1, 4)]))
    rotation = torch.ones(1, 1, 8).bfloat16(), torch.zeros(1, 1, 8).bfloat16()
    return {"position_embeddings": rotation, "attention_mask": None, "step": step}


@pytest.mark.parametrize("missing", ["decoder_layer", "grouped_lora", "decode_attention"])
def test_without_one_of_its_libraries_there_is_no_kernel(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(load_layer_kernel)
    load = compiled_layer.load_library
    monkeypatch.setattr(
        compiled_layer, "load_library", lambda name, folder: None if name == missing else load(name, folder)
    )
    assert load_layer_kernel(DEFAULT_CACHE_DIR) is None
