"""Compiled decoder layers give the answers of their parts, bit for bit, and leave alone what they cannot compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import BaseModel, load_base_model
from gpu_worker.native import compiled_layer, device_parts
from gpu_worker.native.compiled_layer import load_layer_kernel
from lora_store.adapter import AdapterWeights
from lora_store.location import DEFAULT_CACHE_DIR
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import Shapes, ask, by_digest, compiled, greedy, only, run_together
from tests.gpu_worker.families import EQUAL, save
from tests.gpu_worker.native.compiled_layers import NUM_LAYERS, NUM_NEW, MakeBf16, assert_as_parts, jobs_of, logits_of
from tests.gpu_worker.native.one_step import OneStep
from tests.soak import Scale
from tests.tiny import FAMILIES, SHAPE, TinyFolders, byte_tokenizer, linear_shapes, plan_of, random_adapter, tiny_config


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_give_the_logits_of_their_parts(
    family: str,
    num_threads: int,
    make_bf16: MakeBf16,
    pool: list[AdapterWeights],
    calls: list[int],
    halves: list[tuple[str, int]],
) -> None:
    torch.set_num_threads(num_threads)
    engine = make_bf16(by_digest(*pool), family)
    calls.clear()  # the engine checks the model
    halves.clear()
    found = logits_of(engine, jobs_of(pool))
    num_calls, num_halves = len(calls), len(halves)
    expected = logits_of(make_bf16(by_digest(*pool), family, compiles=False), jobs_of(pool))
    assert (len(calls), len(halves)) == (num_calls, num_halves), "the second engine has no compiled layer"
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"step {step}"
    assert num_calls % NUM_LAYERS == 0 and num_calls + num_halves / 2 == len(found) * NUM_LAYERS
    assert 0 < num_halves / 2 < num_calls


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


def save_gemma3(folder: Path, **settings: Any) -> Path:
    """Save a new model with these settings and a tokenizer."""
    Gemma3ForCausalLM(Gemma3TextConfig(**{**SHAPE, "head_dim": 8, "sliding_window": 12, **settings})).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("mlp_width", "head_dim"), [(16, 8), (160, 8), (48, 16)])
def test_layers_whose_widths_differ(
    mlp_width: int, head_dim: int, tmp_path: Path, make_bf16: MakeBf16, calls: list[int]
) -> None:
    """The widest part of the scratch memory is in the attention or in the MLP."""
    save_gemma3(tmp_path, intermediate_size=mlp_width, head_dim=head_dim)
    shapes = linear_shapes(load_base_model(tiny_config(tmp_path)))
    pool = [random_adapter(shapes, seed, rank=3) for seed in (1, 2)]
    assert_as_parts(make_bf16, pool, jobs_of(pool), base=tmp_path)
    assert calls


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_one_thread_attends_for_a_single_row_of_one_head(
    num_threads: int, tmp_path: Path, make_bf16: MakeBf16, calls: list[int]
) -> None:
    """The others fetch the weights of the projection meanwhile, with and without an adapter of it."""
    save_gemma3(tmp_path, num_key_value_heads=1)
    pool = [random_adapter(linear_shapes(load_base_model(tiny_config(tmp_path))), 1, rank=3)]
    torch.set_num_threads(num_threads)
    for plan in (BASE_PLAN, only(pool[0])):
        jobs = [greedy("the quick brown fox", plan, num_new=8)]
        assert_as_parts(make_bf16, pool, jobs, base=tmp_path, shares_cores=False)
    assert 1 in calls and torch.get_num_threads() == num_threads


@pytest.mark.parametrize("num_threads", [1, 2])
def test_many_rows_are_prepared_by_a_team(
    num_threads: int, tmp_path: Path, make_bf16: MakeBf16, calls: list[int]
) -> None:
    """They have more than 32 768 values, up to which one thread prepares a product."""
    save_gemma3(tmp_path, hidden_size=256, initializer_range=0.05)
    torch.set_num_threads(num_threads)
    jobs = [greedy(f"{number}", request_id=number, num_new=3) for number in range(129)]
    assert_as_parts(make_bf16, [], jobs, base=tmp_path, max_batch_size=129, max_step_tokens=256, shares_cores=False)
    assert 129 in calls and torch.get_num_threads() == num_threads


@pytest.mark.parametrize("parts", [("q_proj", "down_proj"), ("v_proj", "up_proj"), ("o_proj",)])
def test_adapters_of_few_modules(parts: tuple[str, ...], make_bf16: MakeBf16, shapes: Shapes, calls: list[int]) -> None:
    pool = [random_adapter(shapes, seed, rank=3, modules=lambda name: name.endswith(parts)) for seed in (1, 2)]
    assert_as_parts(make_bf16, pool, jobs_of(pool))
    assert calls


def test_modules_without_an_adapter_are_not_added(make_bf16: MakeBf16, shapes: Shapes, calls: list[int]) -> None:
    """Of adapters in the bank that lack a module, the zeros in its place are not read: here they are NaN."""
    wide = random_adapter(shapes, 1, rank=3)
    narrow = random_adapter(shapes, 2, rank=4, modules=lambda name: name.endswith("q_proj"))
    engine = make_bf16(by_digest(wide, narrow), bank_rank_rows=4)
    run_together(engine, [greedy("abc", only(wide))])
    calls.clear()
    answer = ask(engine, greedy("abc", only(narrow)))
    engine.step()
    for name, bank in engine.bank.modules.items():
        if not name.endswith("q_proj"):
            bank.all_bt.fill_(torch.nan)
    engine.run_until_idle()
    assert calls
    alone = run_together(make_bf16(by_digest(narrow), compiles=False), [greedy("abc", only(narrow))])[0]
    assert answer.tokens == alone.tokens


def test_a_row_that_is_not_finite_changes_no_other(make_bf16: MakeBf16, shapes: Shapes, calls: list[int]) -> None:
    good, bad = random_adapter(shapes, 1, rank=3), random_adapter(shapes, 2, rank=3, size=1e25)
    engine = make_bf16(by_digest(good, bad))
    wanted = [greedy("abc", only(good), 1), greedy("abc", BASE_PLAN, 2)]
    expected = [answer.tokens for answer in run_together(engine, wanted)]
    calls.clear()
    answers = run_together(engine, [*wanted, greedy("abc", only(bad), 3)])
    assert calls
    assert answers[2].error is not None, "the sums overflow"
    assert [answer.tokens for answer in answers[:2]] == expected


def test_steps_with_a_prompt_call_the_layer_in_two_parts(
    make_bf16: MakeBf16, pool: list[AdapterWeights], calls: list[int], halves: list[tuple[str, int]]
) -> None:
    engine = make_bf16(by_digest(*pool))
    calls.clear()  # the engine checks the model
    halves.clear()
    ask(engine, greedy("a prompt", only(pool[0])))
    engine.step()
    assert calls == [] and halves == [("before", 9), ("after", 9)] * NUM_LAYERS
    engine.step()
    assert calls == [1] * NUM_LAYERS
    ask(engine, greedy("one more", BASE_PLAN))
    halves.clear()
    engine.step()
    assert calls == [1] * NUM_LAYERS and halves == [("before", 10), ("after", 10)] * NUM_LAYERS
    engine.step()
    assert calls == [1] * NUM_LAYERS + [2] * NUM_LAYERS and len(halves) == 2 * NUM_LAYERS
    engine.run_until_idle()
    calls.clear()
    halves.clear()
    ask(engine, greedy("a short", num_new=2))
    engine.step()
    assert calls == [8] * NUM_LAYERS and halves == [], "a short prompt takes one call for each layer"


def test_a_long_prompt_has_the_logits_of_its_parts(
    tmp_path: Path, make_bf16: MakeBf16, halves: list[tuple[str, int]]
) -> None:
    """Several threads add to the hidden states of so many tokens, whose last vector is not whole."""
    width, num_tokens = 72, 489
    assert width * num_tokens > 32 * 1024, "one thread would add them"
    Gemma3ForCausalLM(Gemma3TextConfig(**{**SHAPE, "hidden_size": width, "head_dim": 8})).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = tiny_config(tmp_path, dtype="bfloat16")
    sizes = {"max_model_len": 512, "kv_tokens": 512, "max_step_tokens": 512, "max_chunk_tokens": 512}
    pool = [random_adapter(linear_shapes(load_base_model(config)), seed, rank=3) for seed in (1, 2)]
    job = greedy("abcdefg " * 61, plan_of("mixture", (pool[0], 0.7), (pool[1], 0.6)), num_new=NUM_NEW)
    assert_as_parts(make_bf16, pool, [job], base=tmp_path, **sizes)
    assert halves.count(("after", num_tokens)) == NUM_LAYERS


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


@pytest.mark.parametrize("hook", [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook])
def test_a_hook_inside_a_layer_is_run(hook: Callable[..., Any], make_bf16: MakeBf16, calls: list[int]) -> None:
    engine, seen = make_bf16({}), list[int]()
    layer = engine.base.model.model.layers[1]
    handle = hook(layer.mlp.up_proj, lambda module, inputs, *output: seen.append(inputs[0].shape[1]))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(0))
    calls.clear()
    run_together(engine, [greedy("abc", num_new=3)])
    assert len(calls) == 3 * (NUM_LAYERS - 1), "of three steps"
    assert seen == [4, 0, 1, 0, 1, 0]
    handle.remove()
    run_together(engine, [greedy("abc", num_new=3)])
    assert len(calls) == 3 * (NUM_LAYERS - 1) + 3 * NUM_LAYERS
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


class Needy(LlamaDecoderLayer):
    """Needs an argument that every model passes to its layers."""

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        assert others["position_ids"] is not None
        return super().forward(hidden_states, **others)


class Same(LlamaDecoderLayer):
    """Computes the same as its base class."""


@pytest.mark.parametrize(("kind", "num_compiled"), [(Same, NUM_LAYERS), (Scaled, 0), (Parallel, 0), (Needy, 0)])
def test_only_layers_with_the_kernels_order_are_compiled(
    kind: type[LlamaDecoderLayer],
    num_compiled: int,
    make_bf16: MakeBf16,
    tiny_folders: TinyFolders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base: BaseModel = load_base_model(tiny_config(tiny_folders["llama"], dtype="bfloat16"))
    for layer in base.model.model.layers:
        layer.__class__ = kind
    counts, compile_layers = list[int](), compiled_layer.compile_layers
    monkeypatch.setattr(device_parts, "compile_layers", lambda *parts: counts.append(compile_layers(*parts)))
    make_bf16({}, "llama", base=base)
    assert counts == [num_compiled]


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("gemma3", "int8"),
        ("gemma3", "int4"),
        ("llama", "int8"),
        ("llama", "int4"),
        ("qwen2", "int4"),
        ("qwen3", "int8"),
    ],
)
def test_layers_with_integer_weights_are_compiled(
    family: str, quantization: str, make_bf16: MakeBf16, tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts must agree with the model's own in bfloat16, so both must round each product in the same place."""
    base = load_base_model(tiny_config(tiny_folders[family], dtype="bfloat16", quantization=quantization))
    counts, compile_layers = list[int](), compiled_layer.compile_layers
    monkeypatch.setattr(device_parts, "compile_layers", lambda *parts: counts.append(compile_layers(*parts)))
    make_bf16({}, family, base=base)
    assert counts == [NUM_LAYERS]


def test_arguments_that_the_kernel_cannot_read_are_left_to_the_layer(make_bf16: MakeBf16, calls: list[int]) -> None:
    one = OneStep(make_bf16({}))
    calls.clear()
    assert torch.equal(one(), one(own=True))
    assert calls == [1]
    spread = one.x.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(one(x=spread), one()) and calls == [1, 1]
    exact = tuple(part.float() for part in one.angles)
    strided = tuple(part.repeat_interleave(2, dim=-1)[..., ::2] for part in one.angles)
    calls.clear()
    assert torch.equal(one(position_embeddings=strided), one(own=True))
    assert not torch.equal(one(position_embeddings=exact), one(own=True)), "another rounding"
    assert torch.equal(one(position_ids=torch.zeros(1, 1), use_cache=False, cache=None), one(own=True))
    assert calls == [1], "the last call has no option"
    for refused in (
        {"attention_mask": torch.zeros(1, 1, 1, 5)},
        {"is_causal": False},
        {"softcap": 3.0},
        {"x": one.x.float()},
        {"x": one.x.repeat(2, 1, 1)},
        {"x": one.x.repeat(1, 2, 1)},
    ):
        with pytest.raises((BaseModelUnsupported, AssertionError)):
            one(**refused)
    assert calls == [1]


def test_layers_with_other_angles_have_another_step(make_bf16: MakeBf16, calls: list[int]) -> None:
    """Two calls in one step, as of two layers of one kind."""
    one = OneStep(make_bf16({}, "llama"))
    other = OneStep.__new__(OneStep)
    other.__dict__.update(vars(one), layer=one.layer, angles=one.angles[::-1])
    first = one()
    one._engine._forward._context._attended.clear()
    second = other(is_new=False)
    assert torch.equal(first, one(own=True)) and torch.equal(second, other(own=True))
    assert not torch.equal(first, second)


def test_a_layer_that_attends_twice_in_a_step_is_refused(make_bf16: MakeBf16) -> None:
    one = OneStep(make_bf16({}))
    one()
    with pytest.raises(BaseModelUnsupported, match="more than once in layer 0"):
        one(is_new=False)


def test_heads_that_the_cache_does_not_have_are_refused_as_in_the_layers_own_way(
    make_bf16: MakeBf16, calls: list[int]
) -> None:
    engine = make_bf16({})
    one = OneStep(engine)
    calls.clear()
    one()
    engine.kv_cache.keys[0] = engine.kv_cache.keys[0][:1]
    with pytest.raises(BaseModelUnsupported, match="key/value heads"):
        one()
    assert calls == [1]


def test_a_window_that_the_cache_does_not_keep_is_refused(make_bf16: MakeBf16, calls: list[int]) -> None:
    engine = make_bf16({})
    one = OneStep(engine)
    calls.clear()
    context = engine._forward._context
    attention = engine.kv_cache.attention([Segment(0, 0, 1, 4)])
    pages = replace(attention.groups[0].pages, window=5)
    groups = [replace(attention.groups[0], pages=pages), *attention.groups[1:]]
    context.fill(None, replace(attention, groups=groups))
    with pytest.raises(BaseModelUnsupported, match="a window of 5"):
        one(is_new=False)
    assert calls == []


@pytest.mark.parametrize("missing", ["decoder_layer", "grouped_lora", "decode_attention"])
def test_without_one_of_its_libraries_there_is_no_kernel(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(load_layer_kernel)
    load = compiled_layer.load_library
    monkeypatch.setattr(
        compiled_layer, "load_library", lambda name, folder: None if name == missing else load(name, folder)
    )
    assert load_layer_kernel(DEFAULT_CACHE_DIR) is None
