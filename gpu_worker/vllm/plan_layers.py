"""The adapters of one vLLM worker process: the bank, the wrapped layers, and the plans of the step.

`PlanLayers` takes the place of vLLM's LoRA manager. vLLM finds each token's plan by the id of its LoRARequest, whose
path is the plan.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from vllm.lora.utils import (
    from_layer,
    get_supported_lora_modules,
    is_supported_lora_module,
    process_packed_modules_mapping,
    replace_submodule,
)
from vllm.model_executor.layers.attention import MLAAttention

from gpu_worker.bank.bank import LoraBank, ModuleBank
from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule
from gpu_worker.bank.residency import Residency
from gpu_worker.errors import PlanTooLarge
from gpu_worker.model.experts import ExpertMapping, expert_mapping
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.mapping import composition
from gpu_worker.model.step_context import Composition
from gpu_worker.vllm.expert_layers import adapt_layers
from gpu_worker.vllm.packing import unpacked
from gpu_worker.vllm.plan_path import is_plan_path, parse_path
from lora_store.adapter import Shapes
from lora_store.plan import BASE_PLAN, Plan

logger = logging.getLogger(__name__)

_NAMESPACE = "loraretriever"
_ROUTER = re.compile(r"\.router(\.gate)?$")  # transformers' name of a layer that vLLM names `gate`
_PARAMETERS = {
    "add_plans": "Tensor(a!) y, Tensor x, int place",
    "adapt_experts": "Tensor(a!) y, Tensor x, Tensor shares, Tensor chosen, int place",
}


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a module that one process computes, where several share the model: all of it without.

    A layer is divided either by outputs, where each process has its columns of B transposed and all of A; or by inputs,
    where it has its columns of A and all of B. The latter add up their outputs, adapters included.
    """

    inputs: slice
    outputs: slice

    def of(self, module: DeviceModule) -> DeviceModule:
        """Return views of the module's tensors."""
        return DeviceModule(module.a[:, self.inputs], module.bt[:, self.outputs])


class StepTables(Composition, Protocol):
    """A composition that is used for every step, and filled with the step's plans before it."""

    def fill(self, plans: Sequence[Plan], num_tokens: Sequence[int], residency: Residency) -> None: ...
    def warm_up(self, bank: LoraBank) -> None: ...


class PlanLinear:
    """Adds the plans of a step to the output of one vLLM layer, whose slices read the same input.

    `banks`: of each slice, in the order of the output's columns; None for a slice that no adapter may target.
    """

    def __init__(self, place: int, slices: Sequence[tuple[ModuleBank | None, int]]) -> None:
        self.place = place
        ends = np.cumsum([width for _, width in slices]).tolist()
        starts = [end - width for end, (_, width) in zip(ends, slices, strict=True)]
        self._banks = [
            (bank, slice(start, end))
            for (bank, _), start, end in zip(slices, starts, ends, strict=True)
            if bank is not None
        ]

    def add_lora_linear(self, y: Tensor, x: Tensor, *_: object, **__: object) -> None:
        """Called by vLLM's layer, within compiled graphs too."""
        torch.ops.loraretriever.add_plans(y, x, self.place)

    def add(self, y: Tensor, x: Tensor, step: Composition, num_tokens: int | None) -> None:
        """Add to y (N', O). Only the first N tokens are the step's; a padded step has more rows.

        `num_tokens`: None if the composition knows them itself. A graph then replays its launches for later steps, so
        they depend on nothing of this one.
        """
        x = x[:num_tokens]
        used = [each for each in self._banks if num_tokens is None or each[0].is_used]
        y = y[:num_tokens]
        added = y if y.dtype == x.dtype else torch.zeros_like(y, dtype=x.dtype)  # routers may compute in float32
        for inputs in {id(bank.inputs): bank.inputs for bank, _ in used}.values():
            step.add(x, [(added[:, columns], bank) for bank, columns in used if bank.inputs is inputs])
        if added is not y:
            y += added


class PlanLayers:
    """The adapters and plans of one worker process. All methods run on the thread that steps the model."""

    def __init__(
        self,
        model: nn.Module,
        lora_config: Any,
        *,
        modules: Mapping[str, str],
        outputs: Mapping[str, int],
        num_rows: int,
        device: torch.device,
        kernel: LoraKernel | None,
        tiles: StepTables | None = None,
        experts: Shapes | None = None,
        expert_bytes: int = 0,
        free_fill: float = 0.0,
    ) -> None:
        """Wrap the layers that adapters may target.

        `modules`: the names of these layers in adapters, each with its path in transformers' model. `outputs`: how
        many each has. `experts`: the shapes of fused experts, `expert_bytes`: see Residency. `kernel`: for the products
        on the CPU. `tiles`: those on a GPU. Without both, torch computes them.
        Raises: ValueError if vLLM's model has none of the modules.
        """
        self._device, self._kernel, self._tiles = device, kernel, tiles
        layers = list(_wrapped(model, lora_config, device, modules, outputs))
        linears: dict[str, nn.Linear] = {}
        self._shares: dict[str, Share] = {}
        widths: list[list[int]] = []
        for path, layer, names, of_names in layers:
            widths.append(of_names)
            for name, linear, share in _locals(path, layer, names, of_names):
                if name is not None:
                    linears[name], self._shares[name] = linear, share
        if not linears:
            raise ValueError(
                f"vLLM's {type(model).__name__} has no layer that an adapter of the base model could target"
            )
        self._experts = list(adapt_layers(model, experts or {}))
        self._layer_of = {name: layer for layer in self._experts for name in layer.names}
        self.bank = LoraBank(linears, num_rows, free_fill=free_fill, device=device)
        self.residency = Residency(self.bank, expert_bytes=expert_bytes)
        self._linears: list[PlanLinear] = []
        for (_, layer, names, _), of_layer in zip(layers, widths, strict=True):
            banks = [None if name is None else self.bank.modules[name] for name in names]
            self._linears.append(PlanLinear(len(self._linears), list(zip(banks, of_layer, strict=True))))
            layer.set_mapping(self._linears[-1])
            layer.lora_a_stacked = layer.lora_b_stacked = ()  # vLLM's own, which nothing reads now
        self._step: Composition | None = None
        self._expert_step: ExpertMapping | None = None
        self._num_tokens: int | None = None
        self._plans: dict[str, Plan] = {}
        self._last: object = None
        self._library = _register(add_plans=self._add, adapt_experts=self._adapt)
        if tiles is not None:
            tiles.warm_up(self.bank)

    @property
    def has_kernel(self) -> bool:
        return self._kernel is not None

    @property
    def ends(self) -> Shapes:
        """Return the ends (out, in) of this process's share of each module: its whole shape where no other has one.

        Of fused experts also their number.
        """
        ends = {name: (share.outputs.stop, share.inputs.stop) for name, share in self._shares.items()}
        return {**ends, **{name: end for layer in self._experts for name, end in layer.ends.items()}}

    def change(self, changes: Iterable[Sequence[Any]]) -> dict[str, str]:
        """Apply ("put", digest, dtype, modules, values) and ("drop", digest), in order, between two steps.

        Return the reason for each adapter that the bank cannot hold, by digest. It is left out, and may be dropped.
        """
        unfit: dict[str, str] = {}
        for kind, digest, *values in changes:
            if kind == "drop":
                self._drop(digest)
            elif (problem := self._put(unpacked(digest, *values, device=self._device))) is not None:
                unfit[digest] = problem
        self.residency.settle()
        self._last = None
        return unfit

    def _drop(self, digest: str) -> None:
        if digest in self.residency:  # otherwise it was unfit
            self.residency.unpin([digest])
            self.residency.evict(digest)

    def _put(self, adapter: DeviceAdapter) -> str | None:
        """Pin this process's part of the adapter, or return the reason why the bank cannot hold it."""
        unknown = [name for name in adapter.modules if name not in self._shares]
        unknown += [name for name in adapter.experts if name not in self._layer_of]
        if unknown:
            return f"the base model has no module {unknown[0]!r} in vLLM"
        local = {name: self._shares[name].of(module) for name, module in adapter.modules.items()}
        for name, module in local.items():
            if (module.bt.shape[1], module.a.shape[1]) != self.bank.shapes[name]:
                return f"{name} has another shape in vLLM's base model"
        experts = {name: self._layer_of[name].share.of(name, module) for name, module in adapter.experts.items()}
        digest = adapter.weights_digest
        try:
            has_room = self.residency.try_pin([digest], {digest: DeviceAdapter(digest, local, experts=experts)})
        except PlanTooLarge as exc:
            return str(exc)
        return None if has_room else "the bank has no room for it"

    # The methods below are those that vLLM's model runner calls.

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any) -> None:
        """Prepare the step: `mapping` has the request id of each token, 0 for the base model."""
        paths = {request.lora_int_id: request.lora_path for request in requests if is_plan_path(request.lora_path)}
        state = mapping.index_mapping, paths
        if state == self._last:
            return  # the same rows decode again
        self._plans = {path: self._plans.get(path) or parse_path(path) for path in paths.values()}
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        starts = np.flatnonzero(np.diff(ids, prepend=-1))
        num_tokens = np.diff(starts, append=len(ids)).tolist()
        plans = [self._plans[paths[plan_id]] if plan_id in paths else BASE_PLAN for plan_id in ids[starts].tolist()]
        self._last = state
        self._expert_step = expert_mapping(plans, num_tokens, self.residency, self._device) if self._experts else None
        if self._tiles is None:
            self._step = composition(plans, num_tokens, self.residency, self.bank.dtype, self._kernel, self._device)
            self._num_tokens = len(ids)
            return
        self._tiles.fill(plans, num_tokens, self.residency)
        self._step = self._tiles if ids.any() else None  # a warm-up's requests have no plans, and their launches count

    def add_adapter(self, request: Any) -> bool:
        return True  # a plan's adapters are in the bank before its request arrives

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        return True  # the warm-up steps compute the base model

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def remove_all_adapters(self) -> None:
        """Forget the warm-up's requests. Adapters of the bank leave by `change` only."""
        self._step, self._expert_step, self._last = None, None, None

    def supports_tower_connector_lora(self) -> bool:
        return False

    def _add(self, y: Tensor, x: Tensor, place: int) -> None:
        if self._step is not None:
            self._linears[place].add(y, x, self._step, self._num_tokens)

    def _adapt(self, y: Tensor, x: Tensor, shares: Tensor, chosen: Tensor, place: int) -> None:
        if self._expert_step is not None:
            self._experts[place].adapt(y, x, shares, chosen, self._expert_step)


def _wrapped(
    model: nn.Module,
    lora_config: Any,
    device: torch.device,
    modules: Mapping[str, str],
    outputs: Mapping[str, int],
) -> Iterator[tuple[str, Any, list[str | None], list[int]]]:
    """Replace every linear layer that computes some of the modules by vLLM's layer with a hook for adapters.

    Yield (path, layer, the module of each slice of its output, None for a slice that no adapter may target, the widths
    of these slices). Every other layer stays as it is.
    """
    packed = process_packed_modules_mapping(model)
    supported = get_supported_lora_modules(model)
    embeddings: Any = model.embedding_modules  # names of the embedding and the head, which take no adapters
    module_at = _modules_by_path(model, modules)
    places: dict[nn.Module, list[str]] = {}  # a module that computes with a layer may hold it under another path
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    # Latent attention multiplies with the weight of this layer, and does not call it.
    absorbed = {module.kv_b_proj for module in places if isinstance(module, MLAAttention)}
    for base_layer, its_paths in places.items():
        for path in its_paths:
            paths = _slice_paths(path, packed, module_at)
            names = [module_at.get(slice_path) for slice_path in paths]
            if any(names):
                break
        else:
            continue
        if base_layer in absorbed or path.rpartition(".")[2] in embeddings:
            continue
        if not is_supported_lora_module(path, base_layer, supported):
            continue
        with _placeholder_weight(base_layer, device):
            layer: Any = from_layer(
                base_layer, 1, lora_config, [path.rpartition(".")[2] for path in paths], model.config
            )
        widths = None if layer is base_layer else _widths(layer, [outputs.get(name or "") for name in names])
        if widths is None:
            logger.warning("vLLM has no LoRA layer for %s (%s)", path, type(base_layer).__name__)
            continue
        for place in its_paths:
            replace_submodule(model, place, layer)
        yield path, layer, names, widths


def _widths(layer: Any, outputs: Sequence[int | None]) -> list[int] | None:
    """Return the widths of the slices that modules with so many outputs have; None if they are not vLLM's slices.

    A module may cover several of vLLM's slices, as `in_proj` of a state-space layer does.
    """
    widths = [b.shape[-2] for b in layer.lora_b_stacked]
    if len(widths) == len(outputs):
        return widths
    known = [num_out for num_out in outputs if num_out is not None]
    if layer.tp_size > 1 or len(known) < len(outputs) or sum(known) != sum(widths):
        return None
    return known if {*np.cumsum(known)} <= {*np.cumsum(widths)} else None


def _modules_by_path(model: nn.Module, modules: Mapping[str, str]) -> dict[str, str]:
    """Return the modules by their paths in vLLM's model, which names some parts otherwise than transformers does."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    parents = {path for path, _ in model.named_modules()}
    found = {}
    for name, path in modules.items():
        paths = [path, name, f"language_model.{name}"]
        paths += [each.replace(".mlp.", ".block_sparse_moe.") for each in paths]  # of routers, as in transformers 4
        paths = [each for path in paths if (each := _ROUTER.sub(".gate", path)) in parents] + paths
        if mapper is not None:
            paths = [mapper.get_rename_mapper().map_name(each) for each in paths] + paths
        found[next((each for each in paths if each.rpartition(".")[0] in parents), paths[0])] = name
    return found


def _slice_paths(path: str, packed: Mapping[str, list[str]], module_at: Mapping[str, str]) -> list[str]:
    """Return the paths of the slices of a layer's output, such as those of q_proj, k_proj and v_proj.

    A layer that is one module for adapters is one slice, whatever parts vLLM's model names for it.
    """
    parent, _, leaf = path.rpartition(".")
    if path in module_at:
        return [path]
    return [f"{parent}.{name}" for name in packed.get(leaf, [leaf])]


@contextmanager
def _placeholder_weight(module: Any, device: torch.device) -> Iterator[None]:
    """Give the layer an empty weight within the block, if its own is None.

    vLLM reads the layer's device from its weight. vLLM's CPU kernel for 8-bit integers sets the weight to None.
    """
    if getattr(module, "weight", module) is not None:
        yield
        return
    module.weight = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
    try:
        yield
    finally:
        module.weight = None


def _locals(
    path: str, layer: Any, names: Sequence[str | None], widths: Sequence[int]
) -> Iterator[tuple[str | None, nn.Linear, Share]]:
    """Yield, for each slice, a layer without memory that has this process's shape, and its share of the module."""
    base = layer.base_layer
    if layer.tp_size > 1 and len(names) == 1 and hasattr(base, "output_sizes"):
        raise ValueError(
            f"{path} has several parts that one adapter module covers, which vLLM divides unevenly; use"
            " tensor_parallel_size 1"
        )
    a = layer.lora_a_stacked[0]
    for number, (name, num_out) in enumerate(zip(names, widths, strict=True)):
        num_in = a.shape[-1]
        first_in = layer.tp_rank * num_in if num_in < base.input_size else 0
        first_out = 0
        if len(names) > 1:
            first_out = layer.output_ids[number] * num_out  # counts the process's own heads, which several may share
        elif num_out < base.output_size:
            first_out = layer.tp_rank * num_out
        linear = nn.Linear(num_in, num_out, bias=False, dtype=a.dtype, device="meta")
        yield name, linear, Share(slice(first_in, first_in + num_in), slice(first_out, first_out + num_out))


def _register(**operations: Any) -> Any:
    """Register the products as opaque operations, which torch.compile leaves alone. Keep the returned object."""
    library: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, function in operations.items():
        library.define(f"{name}({_PARAMETERS[name]}) -> ()")
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", lambda *_: None, lib=library)
    return library
