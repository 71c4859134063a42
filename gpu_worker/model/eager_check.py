"""Compare an engine's logits with those of transformers' own code: what both engines' checks at start share.

A random adapter on every linear layer shows whether adapters have an effect at all. In half precisions rounding decides
ties, so a share of the tokens may differ: the more, the more differ in transformers' own model under other rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule
from gpu_worker.model.experts import expert_shapes
from gpu_worker.model.quantization import QuantizedLinear
from lora_store.adapter import AdapterRef
from lora_store.plan import Plan, PlannedAdapter

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]
TEXTS = (
    "The capital of France is Paris, and the capital of",
    "Once upon a time there was a small red fox that lived",
    "In 1969 two people walked on the moon for the first time",
    "Water boils at 100 degrees, but high in the mountains it",
)
MOST_TOKENS = 8  # per short prompt
RANK = 4
_MEASURED_ROWS = 64  # of each weight; their standard deviation sets the size of the random adapter
_ADAPTER_SHARE = 0.05  # relative to the weights' deviation; shifts logits by a fifth of the largest
DIGEST = "model-check"
ADAPTER_PLAN = Plan("selection", (PlannedAdapter(AdapterRef("check", "check", DIGEST), DIGEST, 1.0),))
_FLOAT32_BOUND = 1e-4  # maximum difference, relative to the largest logit if that is above 1
_HALF_BOUND = 0.05  # maximum difference, relative to the largest logit
_HALF_SHARE = 0.5  # share of tokens that may exceed it; a wrong engine exceeds it for nearly all
MOST_HALF_SHARE = 0.9  # upper limit of that share without an adapter, however unstable the model is
_JITTER = 2**-8  # relative size of the last bit in bfloat16
DECODE_STEPS = 3
PLAIN, ADAPTED = "without an adapter", "with an adapter"  # names of the rows in error messages


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of a row's logits from the eager ones. `beyond` (T,): tokens that exceed the bound."""

    beyond: Tensor
    furthest: float
    largest: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor) -> Difference:
        """Compare found and expected (T, V), which have the same dtype: float32 or a half precision."""
        is_exact = expected.dtype == torch.float32
        found, expected = found.float(), expected.float()
        difference, largest = (found - expected).abs().amax(-1), expected.abs().amax(-1)
        bound = _FLOAT32_BOUND * largest.clamp(min=1) if is_exact else _HALF_BOUND * largest
        beyond = ~(difference <= bound)  # NaN is beyond too
        return cls(beyond, float(difference.max()), float(largest.max()))


@dataclass(frozen=True, slots=True)
class EagerLogits:
    """The eager model's logits (P, T, V), and its logits with different rounding."""

    logits: Tensor
    jittered: Tensor

    @property
    def allowed(self) -> float:
        """Return the share of the engine's tokens that may differ from the eager ones."""
        if self.logits.dtype == torch.float32:
            return 0.0
        return _HALF_SHARE + 2 * float(Difference.of(self.jittered, self.logits).beyond.float().mean())


def check_prompts(tokenizer: Any, num_ids: int, most_tokens: int, texts: Sequence[str] = TEXTS) -> list[list[int]]:
    """Return prompts of equal length. Ids outside the model's `num_ids` embeddings are mapped to valid ones."""
    ids = [[token % num_ids for token in tokenizer(text).input_ids] for text in texts]
    length = min(most_tokens, *map(len, ids))
    return [tokens[:length] for tokens in ids]


def check_adapter(linears: Mapping[str, nn.Linear], rank: int) -> DeviceAdapter:
    """Make a random adapter for every linear layer, whose effect exceeds the bound while its rounding does not."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, linear in linears.items():
        weight = _first_rows(linear)
        spread = _ADAPTER_SHARE * float(weight.float().std()) / rank**0.5  # for the products of a and bt
        a = torch.randn(rank, linear.in_features, generator=generator)
        bt = torch.randn(rank, linear.out_features, generator=generator) * spread
        modules[name] = DeviceModule(a.to(weight.dtype), bt.to(weight.dtype))
    return DeviceAdapter(DIGEST, modules)


def check_experts(experts: Mapping[str, nn.Module], rank: int) -> dict[str, DeviceModule]:
    """Make random weights for all fused experts, of the same size as `check_adapter` makes them."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, (num_out, num_in, num) in expert_shapes(experts).items():
        weight = experts[name.rpartition(".")[0]].get_parameter(name.rpartition(".")[2]).detach()
        spread = _ADAPTER_SHARE * float(weight[0, :_MEASURED_ROWS].float().std()) / rank**0.5
        a = torch.randn(num, rank, num_in, generator=generator)
        bt = torch.randn(num, rank, num_out, generator=generator) * spread
        found[name] = DeviceModule(a.to(weight.dtype), bt.to(weight.dtype))
    return found


def _first_rows(linear: nn.Linear) -> Tensor:
    """Return the weights of the first outputs, without those of all others if they are integers."""
    if isinstance(linear, QuantizedLinear):
        return linear.rows(torch.arange(min(_MEASURED_ROWS, linear.out_features)))
    return linear.weight[:_MEASURED_ROWS].detach()


@contextmanager
def changed_weights(modules: Mapping[str, nn.Module], adapter: DeviceAdapter) -> Iterator[None]:
    """Within the block let experts and routers compute with the adapter in their weights, one module at a time."""
    handles: list[RemovableHandle] = []
    for path, module in modules.items():
        handles += _changed_while_computing(path, module, adapter)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _changed_while_computing(
    path: str, module: nn.Module, adapter: DeviceAdapter
) -> tuple[RemovableHandle, RemovableHandle]:
    parameters = dict(module.named_parameters(recurse=False))
    added_to = {name: adapter.experts.get(f"{path}.{name}") for name in parameters} | {
        "weight": adapter.modules.get(path)
    }
    own = {name: (weight, added) for name, weight in parameters.items() if (added := added_to[name]) is not None}

    def change(*_: object) -> None:
        for name, (weight, added) in own.items():
            delta = added.bt.to(weight.device).float().mT @ added.a.to(weight.device).float()
            changed = (weight.float() + delta).to(weight.dtype)
            setattr(module, name, nn.Parameter(changed, requires_grad=False))

    def restore(*_: object) -> None:
        for name in own:
            setattr(module, name, parameters[name])

    return module.register_forward_pre_hook(change), module.register_forward_hook(restore, always_call=True)


@contextmanager
def hooked(linears: Mapping[str, nn.Linear], make_hook: Callable[[str], Hook]) -> Iterator[None]:
    """Change the outputs of the linear layers within the block."""
    handles = [linear.register_forward_hook(make_hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adding(adapter: DeviceAdapter) -> Callable[[str], Hook]:
    """Return hooks that add the adapter to the outputs of its modules."""

    def make_hook(name: str) -> Hook:
        module = adapter.modules[name]
        return lambda _, inputs, output: (
            output + (inputs[0] @ module.a.to(output.device).T) @ module.bt.to(output.device)
        )

    return make_hook


def jittering() -> Callable[[str], Hook]:
    """Return hooks that change every value by about one rounding error."""
    generator = torch.Generator().manual_seed(0)

    def jitter(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output * (1 + _JITTER * noise)

    return lambda name: jitter
