"""Replace the base model's linear layers by LoraLinear."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from gpu_worker.bank.bank import LoraBank
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.embedding import LookupEmbedding, QuantizedRows, is_tied, look_up
from gpu_worker.model.experts import expert_shapes, fused_experts
from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.output_head import OutputHead
from gpu_worker.model.packed_linear import KernelLinear, LinearKernel, NarrowLinear, packed
from gpu_worker.model.quantization import QuantizedLinear
from gpu_worker.model.routers import as_linears, routers
from gpu_worker.model.step_context import StepContext
from lora_store.adapter import Shapes


def target_linears(model: nn.Module, output_head: nn.Module | None) -> dict[str, nn.Linear]:
    """Return every linear layer an adapter may target, by module path: all except the output head.

    Subclasses with their own `forward`, such as Phi-3.5-MoE's router, are excluded.
    Raises: BaseModelUnsupported if there is none.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward in (nn.Linear.forward, QuantizedLinear.forward, NarrowLinear.forward)
        and module is not output_head
    }
    if not linears:
        raise BaseModelUnsupported("the base model has no linear layer that an adapter could target")
    return linears


@dataclass(frozen=True, slots=True)
class Adaptable:
    """The modules of a model that adapters may change. `linears` has the routers too, described as linear layers."""

    linears: dict[str, nn.Linear]
    routers: dict[str, nn.Module]
    experts: dict[str, nn.Module]

    @classmethod
    def of(cls, model: PreTrainedModel, output_head: nn.Module | None = None) -> Adaptable:
        """Find the modules. `output_head`: of a model that is only a decoder."""
        experts = fused_experts(model)
        found = routers(model, experts)
        linears = target_linears(model, output_head or model.get_output_embeddings())
        return cls(linears | as_linears(found), found, experts)

    def within(self, name: str) -> Adaptable:
        """Return the modules under the names that they have in a model that holds theirs under this name."""
        return Adaptable(
            {f"{name}.{path}": linear for path, linear in self.linears.items()},
            {f"{name}.{path}": router for path, router in self.routers.items()},
            {f"{name}.{path}": experts for path, experts in self.experts.items()},
        )

    @property
    def shapes(self) -> Shapes:
        linears = {name: (linear.out_features, linear.in_features) for name, linear in self.linears.items()}
        return {**linears, **expert_shapes(self.experts)}


def inject(
    model: PreTrainedModel, bank: LoraBank, step: StepContext, linear_kernel: LinearKernel | None = None
) -> None:
    """Replace every module of `bank` in `model`, in place. Pack the base weights where that is faster.

    The embedding of a tied model is then looked up in the packed output head.
    """
    for name, module_bank in bank.modules.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, leaf)
        if not isinstance(linear, nn.Linear):
            continue  # a router
        setattr(parent, leaf, LoraLinear(packed(linear, linear_kernel), module_bank, step))
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        was_tied, whole = is_tied(model), packed(head, linear_kernel)
        is_on_cpu = next(iter(bank.modules.values())).bt.device.type == "cpu"
        model.set_output_embeddings(OutputHead(whole, step) if is_on_cpu else whole)
        if was_tied and isinstance(whole, KernelLinear):
            look_up(model, whole)
    embedding = model.get_input_embeddings()
    rows = embedding.source if isinstance(embedding, LookupEmbedding) else None
    if isinstance(rows, QuantizedRows) and linear_kernel is not None:
        look_up(model, KernelLinear(linear_kernel, rows.quantized, None))
