"""A decoder that embeds, calls its layers and normalises is computed in one call, with the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.quantization import quantize, replace_layer
from gpu_worker.native import compiled_decoder
from gpu_worker.native.attention.decode_attention import DecodeKernel
from gpu_worker.native.attention.kv_pages import HostKvCache
from gpu_worker.native.compiled_decoder import CompiledDecoder
from gpu_worker.native.compiled_layer import LayerKernel
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import ask, by_digest, compiled, greedy, only, run_together
from tests.gpu_worker.native.compiled_layers import NUM_LAYERS, NUM_NEW, MakeBf16, jobs_of, logits_of
from tests.tiny import FAMILIES, TinyFolders, tiny_config


@pytest.fixture
def whole_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tokens of the steps whose layers are computed in one call."""
    seen, compute = list[int](), LayerKernel.decoder

    def counted(kernel: LayerKernel, *tokens: Any) -> int:
        *_, layers, y = tokens
        assert len(layers) == NUM_LAYERS
        code = compute(kernel, *tokens)
        seen.extend([y.shape[1]] * (code == 0))
        return code

    monkeypatch.setattr(LayerKernel, "decoder", counted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_are_one_call(family: str, make_bf16: MakeBf16, whole_steps: list[int]) -> None:
    engine = make_bf16({}, family)
    whole_steps.clear()
    run_together(engine, [greedy("abc", num_new=5), greedy("defghi", num_new=5)])
    assert whole_steps == [11, 2, 2, 2, 2]


class Same(LlamaModel):
    """Computes the same as its base class."""


class Scaled(LlamaModel):
    """Multiplies the embedding itself."""

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return super().forward(**{**others, "inputs_embeds": self.embed_tokens(input_ids) * 2})


class Shifted(LlamaModel):
    """Counts positions from one, as OPT does."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, **others: Any) -> Any:
        return super().forward(input_ids, position_ids=position_ids + 1, **others)


class Doubled(LlamaModel):
    """Multiplies the last hidden states."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        output = super().forward(*arguments, **others)
        output.last_hidden_state = output.last_hidden_state * 2
        return output


class Reversed(LlamaModel):
    """Calls its layers from the last to the first."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        own = self.layers
        self.layers = nn.ModuleList(reversed(own))
        try:
            return super().forward(*arguments, **others)
        finally:
            self.layers = own


class Nervous(LlamaModel):
    """Changes what the second layer reads."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        second = self.layers[1]
        own = second.forward
        second.forward = lambda x, **of_layer: own(x * 2, **of_layer)
        try:
            return super().forward(*arguments, **others)
        finally:
            second.forward = own


@pytest.mark.parametrize("kind", [Same, Scaled, Shifted, Doubled, Reversed, Nervous])
def test_decoders_that_do_more_are_left_as_they_are(
    kind: type[LlamaModel], make_bf16: MakeBf16, tiny_folders: TinyFolders, pool: list[AdapterWeights]
) -> None:
    logits = []
    for compiles in (True, False):
        base = load_base_model(tiny_config(tiny_folders["llama"], dtype="bfloat16"))
        base.model.model.__class__ = kind
        engine = make_bf16(by_digest(*pool), "llama", base=base, compiles=compiles)
        assert isinstance(base.model.model.forward, CompiledDecoder) == (compiles and kind is Same)
        logits.append(logits_of(engine, jobs_of(pool)))
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))


class Stretched(LlamaRotaryEmbedding):
    """Divides the positions of a step that has a large one, as models do that read longer texts than in training."""

    known = 100  # more than the engine's own check of the model has

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return super().forward(x, position_ids / 2 if int(position_ids.max()) > self.known else position_ids)


@pytest.mark.parametrize(
    ("kind", "most"), [(LlamaRotaryEmbedding, 1 << 15), (LlamaRotaryEmbedding, 16), (Stretched, 64)]
)
def test_angles_are_those_of_the_model(
    kind: type[LlamaRotaryEmbedding],
    most: int,
    make_bf16: MakeBf16,
    tiny_folders: TinyFolders,
    pool: list[AdapterWeights],
    whole_steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are kept up to a position, if they do not depend on the other rows of a step."""
    monkeypatch.setattr(compiled_decoder, "_FEWEST_KEPT", 8)
    monkeypatch.setattr(compiled_decoder, "_MOST_KEPT", most)
    logits = []
    for compiles in (True, False):
        base = load_base_model(tiny_config(tiny_folders["llama"], dtype="bfloat16"))
        base.model.model.rotary_emb.__class__ = kind
        engine = make_bf16(by_digest(*pool), "llama", base=base, compiles=compiles)
        monkeypatch.setattr(Stretched, "known", 20)
        whole_steps.clear()
        logits.append(logits_of(engine, jobs_of(pool)))
        monkeypatch.setattr(Stretched, "known", 100)
        assert len(whole_steps) == (NUM_NEW - 1) * compiles
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))


@pytest.mark.parametrize(
    ("name", "num_calls"),
    [("embed_tokens", 5), ("rotary_emb", 10), ("norm", 5), ("layers.1", 5), ("layers.1.mlp.up_proj", 5)],
)
def test_a_hook_of_a_part_is_called(name: str, num_calls: int, make_bf16: MakeBf16, whole_steps: list[int]) -> None:
    """Gemma 3 computes two kinds of angles in each step."""
    engine, seen = make_bf16({}), list[int]()
    whole_steps.clear()
    part = engine.base.model.model.get_submodule(name)
    part.register_forward_hook(lambda _, arguments, __: seen.append(1))
    run_together(engine, [greedy("abc", num_new=5)])
    assert len(seen) == num_calls and whole_steps == []


def test_engines_of_one_process_do_not_share_their_steps(
    make_bf16: MakeBf16, pool: list[AdapterWeights], whole_steps: list[int]
) -> None:
    """Their steps are taken in turn, each engine with its own adapters and cache."""
    jobs = [greedy(prompt, only(weights), num_new=5) for prompt, weights in zip(("abcdef", "xyz"), pool, strict=True)]
    alone = [run_together(make_bf16(by_digest(*pool)), [job])[0].tokens for job in jobs]
    engines = [make_bf16(by_digest(*pool)) for _ in jobs]
    whole_steps.clear()
    answers = [ask(engine, job) for engine, job in zip(engines, jobs, strict=True)]
    while any(engine.has_work for engine in engines):
        for engine in engines:
            engine.loaded.wait(0.01)
            engine.step()
    assert sorted(whole_steps) == [*[1] * 8, 4, 7]
    assert [answer.tokens for answer in answers] == alone


def test_an_unknown_id_is_refused(make_bf16: MakeBf16) -> None:
    engine = make_bf16({})
    decoder, cache = engine.base.model.model, engine.kv_cache
    attention = cache.attention([Segment(cache.allocate(1, 1), 0, 1, 0)])
    for token in (-1, engine.base.model.config.vocab_size):
        engine._forward._context.fill(None, attention)
        with pytest.raises(IndexError, match="id is not below"), torch.inference_mode():
            decoder(
                input_ids=torch.tensor([[token]]),
                position_ids=attention.token_positions[None],
                use_cache=False,
                step=engine._forward._context,
            )


def test_layers_of_one_input_may_have_integers_of_several_kinds(
    make_bf16: MakeBf16, tiny_folders: TinyFolders, pool: list[AdapterWeights], whole_steps: list[int]
) -> None:
    """As those of a Q4_K_M file, where the values of some layers have more bits."""
    logits = []
    for compiles in (True, False):
        base = load_base_model(tiny_config(tiny_folders["gemma3"], dtype="bfloat16", quantization="int4"))
        plain = load_base_model(tiny_config(tiny_folders["gemma3"], dtype="bfloat16")).model
        for layer in range(NUM_LAYERS):
            for part in ("self_attn.v_proj", "mlp.gate_proj"):
                name = f"model.layers.{layer}.{part}"
                replace_layer(base.model, name, quantize(plain.get_submodule(name).weight.detach(), 8))
        logits.append(logits_of(make_bf16(by_digest(*pool), base=base, compiles=compiles), jobs_of(pool)))
    assert whole_steps and all(torch.equal(one, other) for one, other in zip(*logits, strict=True))


def test_several_caches_are_read_in_turn(make_bf16: MakeBf16, whole_steps: list[int]) -> None:
    """The layers of a long prompt read theirs one by one."""
    engine = make_bf16({})
    context, decoder = engine._forward._context, engine.base.model.model
    whole_steps.clear()
    outputs, caches = [], [engine.kv_cache, HostKvCache(engine.kv_cache.shape, compiled(DecodeKernel.load))]
    for cache, num_tokens in ((caches[0], 1), (caches[1], 20), (caches[0], 1), (caches[1], 1)):
        row = cache.allocate(num_tokens, 1)
        attention = cache.attention([Segment(row, 0, num_tokens, 0)])
        context.fill(None, attention)
        before = [keys.clone() for keys in cache.keys]
        with torch.inference_mode():
            positions = attention.token_positions[None]
            ids = torch.full((1, num_tokens), 5)
            output = decoder(input_ids=ids, position_ids=positions, use_cache=False, step=context)
            outputs.append(output[0][:, :1])
        assert not any(torch.equal(*keys) for keys in zip(before, cache.keys, strict=True)), "every layer wrote its key"
    assert whole_steps == [1, 1, 1]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[0], outputs[3])
