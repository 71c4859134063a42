"""Experts as vLLM arranges them compute each token's plan as a slow loop, and leave other tokens alone. Needs vLLM."""

from __future__ import annotations

from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts, X86CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from gpu_worker.bank.device_layout import DeviceModule
from gpu_worker.model.experts import ExpertMapping
from gpu_worker.vllm.expert_layers import ExpertLayer, ExpertShare, adapt_layers, unpack
from lora_store.adapter import Shapes

CONTAINER = "model.layers.1.mlp.experts"
GATE_UP, DOWN = f"{CONTAINER}.gate_up_proj", f"{CONTAINER}.down_proj"
EXPERTS, WIDTH, HIDDEN, PADDED, CHOSEN, TOKENS = 3, 64, 20, 32, 2, 12
SHAPES: Shapes = {GATE_UP: (2 * HIDDEN, WIDTH, EXPERTS), DOWN: (WIDTH, HIDDEN, EXPERTS)}


def method_of(experts_cls: type, backend: UnquantizedMoeBackend = UnquantizedMoeBackend.CPU) -> Any:
    method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    nn.Module.__init__(method)
    method.experts_cls, method.unquantized_backend, method.moe_kernel = experts_cls, backend, None
    return method


def layer_of(
    gate_up: Tensor, down: Tensor, experts_cls: type = CPUUnquantizedExperts, *, tp_rank: int = 0, tp_size: int = 1
) -> Any:
    """Return what is read of a layer of vLLM, with weights as its kernels for the CPU have them. Its outputs are 7."""
    size = gate_up.shape[1] // 2
    padding = (0, 0, 0, PADDED - size)
    both = torch.cat([nn.functional.pad(each, padding) for each in gate_up.split(size, dim=1)], dim=1)
    down = nn.functional.pad(down, (0, PADDED - size))
    isa = experts_cls.isa  # type: ignore[attr-defined]
    layer = nn.Module()
    members: dict[str, Any] = {
        "w13_weight": cpu_prepack_moe_weight(both.contiguous(), isa),
        "w2_weight": cpu_prepack_moe_weight(down.contiguous(), isa),
        "activation": MoEActivation.SILU,
        "apply_router_weight_on_input": False,
        "quant_method": method_of(experts_cls),
        "moe_config": SimpleNamespace(
            has_bias=False,
            swiglu_limit=None,
            intermediate_size_per_partition=size,
            moe_parallel_config=SimpleNamespace(tp_rank=tp_rank, tp_size=tp_size, use_ep=False),
        ),
        "forward_modular": lambda x, **_: torch.full_like(x, 7),
    }
    for name, value in members.items():
        setattr(layer, name, value)
    return layer


def weights(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) / 8).to(dtype), (torch.randn(EXPERTS, WIDTH, HIDDEN) / 4).to(dtype)


def adapter_of(rank: int, *names: str) -> dict[str, DeviceModule]:
    """Return random experts of an adapter, of both parameters without `names`."""
    found = {}
    for name in names or (GATE_UP, DOWN):
        num_out, num_in, num = SHAPES[name]
        found[name] = DeviceModule(torch.randn(num, rank, num_in) / 4, torch.randn(num, rank, num_out) / 4)
    return found


def make_step(modules: dict[str, DeviceModule], *of_token: float) -> ExpertMapping:
    """Return a step in which each token has one adapter with its weight."""
    return ExpertMapping([modules], torch.tensor([of_token]), torch.zeros(len(of_token), dtype=torch.bool))


def slow(
    x: Tensor, chosen: Tensor, shares: Tensor, base: tuple[Tensor, Tensor], plan: list[tuple[float, Any]]
) -> Tensor:
    """Return the output (H,) of one token: experts with the weighted deltas in their weights, in float64."""
    y = torch.zeros(WIDTH, dtype=torch.float64)
    for expert, share in zip(chosen.tolist(), shares.double(), strict=True):
        both, down = (each[expert].double() for each in base)
        for weight, modules in plan:
            for name, target in ((GATE_UP, both), (DOWN, down)):
                if name in modules:
                    a, bt = (each[expert].double() for each in (modules[name].a, modules[name].bt))
                    target += weight * bt.T @ a
        gate, up = (both @ x.double()).chunk(2)
        y += share * (down @ (nn.functional.silu(gate) * up))
    return y


@pytest.mark.parametrize(
    ("isa", "dtype"), [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)], ids=str
)
def test_a_weight_is_read_as_it_was_before_vllm_arranged_it(isa: str, dtype: torch.dtype) -> None:
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    weight = torch.randn(2, 96, 64).to(dtype)
    packed = cpu_prepack_moe_weight(weight, isa)
    assert not torch.equal(packed, weight)
    for expert in range(2):
        assert torch.equal(unpack(packed[expert], 1 if isa == "vec" else 2), weight[expert])


@pytest.mark.parametrize("seed", range(8))
def test_random_plans_equal_the_slow_loop_and_other_tokens_are_vllms(seed: int) -> None:
    """Tokens without a plan, of other adapters or behind the step's have vLLM's outputs, to the last bit."""
    torch.manual_seed(seed)
    base = weights()
    adapters = [adapter_of(3), adapter_of(1, GATE_UP), adapter_of(5, DOWN), {"model.layers.2.mlp.experts.down_proj": 0}]
    of_token = torch.randn(len(adapters), TOKENS) * (torch.rand(len(adapters), TOKENS) < 0.3)
    step = ExpertMapping(adapters, of_token, torch.zeros(TOKENS, dtype=torch.bool))  # type: ignore[arg-type]
    x = torch.randn(TOKENS + 3, WIDTH)
    chosen = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in x]).int()
    shares = torch.rand(len(x), CHOSEN)
    layer = ExpertLayer(0, layer_of(*base), CONTAINER)
    y = torch.full_like(x, 7)
    layer.adapt(y, x, shares, chosen, step)
    num_adapted = 0
    for token in range(len(x)):
        plan = [(float(of_token[s, token]), adapters[s]) for s in range(3) if token < TOKENS and of_token[s, token]]
        num_adapted += bool(plan)
        expected = (
            slow(x[token], chosen[token], shares[token], base, plan).float() if plan else torch.full((WIDTH,), 7.0)
        )
        torch.testing.assert_close(y[token], expected, atol=1e-4 if plan else 0, rtol=0)
    assert 0 < num_adapted < TOKENS


@pytest.mark.parametrize("activation", [MoEActivation.GELU, MoEActivation.GELU_TANH])
def test_the_activation_is_the_layers(activation: MoEActivation) -> None:
    base, modules = weights(), adapter_of(2)
    made = layer_of(*base)
    made.activation = activation
    layer = ExpertLayer(0, made, CONTAINER)
    x, chosen, shares = torch.randn(1, WIDTH), torch.tensor([[1]]), torch.ones(1, 1)
    y = torch.zeros(1, WIDTH)
    layer.adapt(y, x, shares, chosen, make_step(modules, 1.0))
    both, down = (base[n][1] + modules[name].bt[1].T @ modules[name].a[1] for n, name in enumerate((GATE_UP, DOWN)))
    gate, up = (both @ x[0]).chunk(2)
    approximate = "tanh" if activation == MoEActivation.GELU_TANH else "none"
    expected = down @ (nn.functional.gelu(gate, approximate=approximate) * up)
    torch.testing.assert_close(y[0], expected, atol=1e-4, rtol=0)


def test_the_parts_of_two_processes_add_up() -> None:
    """Each has half of the hidden values of every expert."""
    (gate_up, down), modules, size = weights(), adapter_of(3), HIDDEN // 2
    x, chosen, shares = torch.randn(4, WIDTH), torch.tensor([[0, 2]] * 4), torch.rand(4, 2)
    found = torch.zeros(4, WIDTH)
    ends = []
    for rank in range(2):
        own = slice(rank * size, (rank + 1) * size)
        gate, up = gate_up.split(HIDDEN, dim=1)
        made = layer_of(torch.cat([gate[:, own], up[:, own]], dim=1), down[..., own], tp_rank=rank, tp_size=2)
        layer = ExpertLayer(0, made, CONTAINER)
        ends.append(layer.ends)
        local = {name: layer.share.of(name, module) for name, module in modules.items()}
        y = torch.zeros(4, WIDTH)
        layer.adapt(y, x, shares, chosen, make_step(local, *[1.0] * 4))
        found += y
    expected = [slow(x[n], chosen[n], shares[n], (gate_up, down), [(1.0, modules)]) for n in range(4)]
    torch.testing.assert_close(found, torch.stack(expected).float(), atol=1e-4, rtol=0)
    assert {name: tuple(map(max, zip(*[each[name] for each in ends], strict=True))) for name in SHAPES} == SHAPES
    assert ExpertShare(slice(0, HIDDEN), HIDDEN).of(DOWN, modules[DOWN]) is modules[DOWN]


def model_with(**layers: Any) -> nn.Module:
    """Return a model with runners of experts, by number of the layer."""
    model: Any = nn.Module()
    model.layers = nn.ModuleDict()
    for number, layer in layers.items():
        runner = MoERunner.__new__(MoERunner)
        nn.Module.__init__(runner)
        runner.routed_experts = layer
        model.layers[number] = nn.ModuleDict({"block_sparse_moe": runner})
    return model


def test_layers_are_found_by_their_number(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM names some containers otherwise. A layer that several containers have is left out."""
    shapes = {name.replace(".1.", f".{n}."): shape for n in (0, 1, 2) for name, shape in SHAPES.items()}
    shapes |= {name.replace(".1.mlp", ".2.other"): shape for name, shape in SHAPES.items()}
    layers = {str(n): layer_of(*weights()) for n in (1, 2, 3)}
    [found] = adapt_layers(model_with(**layers), shapes)
    assert found.names == (GATE_UP, DOWN) and found.ends == SHAPES
    assert layers["1"].forward_modular == found.forward_modular
    assert layers["2"].forward_modular(torch.zeros(1)) == 7


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("quant_method", nn.Module(), "quantised"),
        ("moe_config.has_bias", True, "biases"),
        ("apply_router_weight_on_input", True, "weights on their inputs"),
        ("activation", MoEActivation.SWIGLUOAI, "their activation is swigluoai"),
        ("moe_config.swiglu_limit", 7.0, "activation"),
        ("moe_config.moe_parallel_config.use_ep", True, "different experts"),
        ("quant_method.unquantized_backend", UnquantizedMoeBackend.FLASHINFER_TRTLLM, "for FlashInfer TRTLLM"),
    ],
    ids=str,
)
def test_experts_that_are_computed_otherwise_are_named_in_the_log(
    path: str, value: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layer_of(*weights())
    *parents, name = path.split(".")
    setattr(reduce(getattr, parents, layer), name, value)
    assert not list(adapt_layers(model_with(**{"1": layer}), SHAPES))
    assert "adapters on the experts of layer 1 are refused" in caplog.text and reason in caplog.text


def test_weights_in_an_unknown_arrangement_are_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layer_of(*weights())
    monkeypatch.setattr(
        "gpu_worker.vllm.expert_layers.cpu_prepack_moe_weight",
        lambda weight, isa: cpu_prepack_moe_weight(weight, isa).flip(-1),
    )
    assert not list(adapt_layers(model_with(**{"1": layer}), SHAPES))
    assert "in an unknown way" in caplog.text


def test_weights_for_amx_are_read_in_pairs_of_inputs() -> None:
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    base = weights(torch.bfloat16)
    layer = ExpertLayer(0, layer_of(*base, X86CPUUnquantizedExperts), CONTAINER)
    for expert in range(EXPERTS):
        both, down = layer._weights(expert)
        assert torch.equal(both, base[0][expert]) and torch.equal(down, base[1][expert])
