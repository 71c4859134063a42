"""Validate every kind of adapter that stock PEFT saves: `python -m benchmarks.paper.stages.kinds`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import typer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.workspace import PAPER_RESULTS
from gpu_worker.model.inject import target_linears
from lora_store import AdapterRefused, check_folder

BASE = "small"
_SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_QV = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}

KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=6, lora_alpha=12, **_QV),
    "LoRA, rsLoRA scaling": lambda: peft.LoraConfig(r=6, use_rslora=True, **_QV),
    "LoRA, ranks and scalings by module": lambda: peft.LoraConfig(
        r=4, rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 32}, **_QV
    ),
    "LoRA, initialised by OLoRA": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", **_QV),
    "LoRA, DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **_QV),
    "LoRA, with biases": lambda: peft.LoraConfig(r=4, bias="all", **_QV),
    "LoRA, with a whole module": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **_QV),
    "LoRA, on the embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, **_QV),
    "LoHa": lambda: peft.LoHaConfig(**_QV),
    "LoKr": lambda: peft.LoKrConfig(**_QV),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, **_QV),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **_QV),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def gemma(hidden_size: int = 32) -> Any:
    config = Gemma3TextConfig(**_SHAPE | {"hidden_size": hidden_size}, **_HEADS, head_dim=8, query_pre_attn_scalar=8)
    return Gemma3ForCausalLM(config)


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE, **_HEADS))


def answers() -> dict[str, list[str]]:
    """Return, by kind, why validation refuses it, or "" if it is admitted. Weights are random."""
    torch.manual_seed(0)
    found = {kind: reasons_of(gemma(), config()) for kind, config in KINDS.items()}
    found["LoRA, of a wider model of the family"] = reasons_of(gemma(48), KINDS["LoRA"]())
    found["LoRA, of another architecture"] = reasons_of(llama(), KINDS["LoRA"](), base="another")
    return found


def reasons_of(model: Any, config: Any, base: str = BASE) -> list[str]:
    """Return the problems that a pool over the small Gemma reports for an adapter of `model`."""
    linears = target_linears(gemma(), gemma().get_output_embeddings())
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    adapted = peft.get_peft_model(model, config)
    for own in adapted.peft_config.values():
        own.base_model_name_or_path = base
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    with tempfile.TemporaryDirectory() as scratch:
        adapted.save_pretrained(scratch, save_embedding_layers=False)
        try:
            check_folder(Path(scratch), accepts_base=[BASE], module_shapes=shapes)
        except AdapterRefused as exc:
            return list(exc.reasons)
    return []


def section(found: dict[str, list[str]]) -> str:
    """Return the report's section."""
    rows = [[kind, "refused" if why else "admitted", why[0] if why else ""] for kind, why in found.items()]
    words = (
        f"Each kind as PEFT {peft.__version__} saves it, validated by a pool over a Gemma model; the first reason.\n"
    )
    return "\n".join(["## Adapters of other kinds\n", words, table(["kind", "admission", "reason"], rows)])


def main() -> None:
    """Validate every kind, and write the section."""
    (PAPER_RESULTS / "kinds.md").write_text(section(answers()), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
