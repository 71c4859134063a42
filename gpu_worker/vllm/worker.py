"""vLLM's worker with plans: the class that `worker_cls` names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.models import supports_lora
from vllm.platforms import current_platform

from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.vllm.language_model import FORMAT, register_loader
from gpu_worker.vllm.plan_layers import PlanLayers, StepTables
from gpu_worker.vllm.processes import end_with
from gpu_worker.vllm.sampler import PlanSampler
from gpu_worker.vllm.settings import FRONT_PID, PluginSettings, check_vllm

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VllmWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker

MAX_SCORED_TOKENS = 32  # tokens of a prompt whose logits are in memory together
Scores = dict[str, Any]
"""Log probabilities of complete prompts by request."""


class PlanWorker(VllmWorker):  # type: ignore[misc]
    """Stock, but for what the model runner builds as its LoRA manager, and for log probabilities.

    The methods below answer `collective_rpc`.
    """

    plan_layers: PlanLayers
    _lora_config: Any

    def load_model(self, **kwargs: Any) -> None:
        check_vllm()
        end_with(int(os.environ[FRONT_PID]))
        if self.vllm_config.load_config.load_format == FORMAT:
            register_loader()
        runner = self.model_runner
        if not callable(getattr(runner, "load_lora_model", None)) or self.use_v2_model_runner:
            raise RuntimeError(f"{type(runner).__name__} has no load_lora_model; set VLLM_USE_V2_MODEL_RUNNER=0")
        runner.load_lora_model = self._load_plan_layers  # the runner calls it once, after loading the base model
        runner.sampler = PlanSampler(runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel)
        runner._get_prompt_logprobs_dict = partial(score_prompts, runner, runner._get_prompt_logprobs_dict)
        # Layers of experts would choose kernels for adapters of experts, which the CPU lacks and a GPU has slower.
        self._lora_config, self.vllm_config.lora_config = self.vllm_config.lora_config, None
        super().load_model(**kwargs)

    def _load_plan_layers(self, model: nn.Module, vllm_config: Any, device: torch.device) -> nn.Module:
        vllm_config.lora_config = self._lora_config
        if not supports_lora(model):
            raise ValueError(f"{type(model).__name__} does not support LoRA in vLLM")
        settings = PluginSettings.of(vllm_config.additional_config)
        is_cpu = device.type == "cpu"
        if is_cpu:
            complete_routers(model)
        tiles: StepTables | None = None
        if not is_cpu and settings.use_kernel:
            from gpu_worker.vllm.tiled_plans import TiledPlans  # imports Triton, which a CPU does not need

            scheduler = vllm_config.scheduler_config
            tiles = TiledPlans(
                most_tokens=scheduler.max_num_batched_tokens,
                most_plans=scheduler.max_num_seqs,
                num_rows=settings.num_rank_rows,
                device=device,
            )
        self.plan_layers = PlanLayers(
            model,
            vllm_config.lora_config,
            modules=settings.modules,
            outputs=settings.outputs,
            num_rows=settings.num_rank_rows,
            device=device,
            kernel=LoraKernel.load(Path(settings.cache_dir)) if is_cpu and settings.use_kernel else None,
            tiles=tiles,
            experts=settings.experts,
            expert_bytes=settings.expert_bytes,
            free_fill=settings.free_fill,
        )
        self.model_runner.lora_manager = self.plan_layers
        return model

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample as vLLM does, and keep the log probabilities from before the grammars' masks."""
        runner, state = self.model_runner, self.model_runner.execute_model_state
        if grammar_output is not None and state is not None and runner.input_batch.num_logprobs:
            runner.sampler.before_masks = runner.sampler.compute_logprobs(state.logits)
        return super().sample_tokens(grammar_output)

    def change_bank(self, changes: Sequence[Sequence[Any]]) -> dict[str, str]:
        """See `PlanLayers.change`."""
        return self.plan_layers.change(changes)

    def describe_bank(self) -> dict[str, Any]:
        """Return the ends (out, in) of this process's share of each module, the bank's bytes, the resident digests."""
        layers = self.plan_layers
        return {
            "ends": {name: list(ends) for name, ends in layers.ends.items()},
            "num_bytes": layers.bank.num_bytes,
            "resident": sorted(layers.residency.resident),
            "has_kernel": layers.has_kernel,
        }


def score_prompts(
    runner: Any, score: Callable[..., Scores], hidden: Tensor, num_scheduled_tokens: Mapping[str, int]
) -> Scores:
    """Score the prompts of a step a few tokens at a time: the logits of a whole step have no room in any memory plan.

    `score`: the runner's function, which scores `num_scheduled_tokens` of each request, from its computed ones on.
    """
    found: Scores = {}
    names = [name for name in runner.num_prompt_logprobs if name in num_scheduled_tokens]  # the same in each process
    for name in names:
        request, num_tokens = runner.requests[name], num_scheduled_tokens[name]
        num_computed = request.num_computed_tokens
        for done in range(0, num_tokens, MAX_SCORED_TOKENS):
            request.num_computed_tokens = num_computed + done
            found |= score(hidden[done:], {name: min(num_tokens - done, MAX_SCORED_TOKENS)})
        request.num_computed_tokens = num_computed
    return found


def complete_routers(model: nn.Module) -> None:
    """Let vLLM's choice of experts for the CPU score by sigmoid, and heed the bias of the choice.

    It does so for groups of experts only, so all experts become one group.
    """
    for module in model.modules():
        router = getattr(module, "router", None)
        if not isinstance(router, CPURouter) or router.use_grouped_topk or router.custom_routing_function is not None:
            continue
        if router.scoring_func == "sigmoid" or (
            router.scoring_func == "softmax" and router.e_score_correction_bias is not None
        ):
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1
