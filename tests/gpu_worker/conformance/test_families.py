"""Multimodal models answer as transformers does with the adapters in its weights.

Needs vLLM. The outcomes for every family are in docs/reference/supported-models.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from gpu_worker.errors import BaseModelUnsupported
from lora_store import AdapterRefused, check_folder
from lora_store.plan import BASE_PLAN
from lora_store.weights_blob import decode_weights, encode_weights
from tests.gpu_worker.conformance.driver import HostedEngine, Serve, job
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.families import NUM_NEW, TOLERANCE, assert_equal, save
from tests.tiny import plan_of, tiny_config


def whole(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def list_parameters(worker: Any) -> list[str]:
    return [name for name, _ in worker.model_runner.model.named_parameters()]


def test_a_text_adapter_of_a_multimodal_checkpoint_acts_under_every_name_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    """PEFT trained it on the whole model. A server that matches no name loads it, and answers as the base model."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # of a function that this test sends to the worker
    folder, saved = save(tmp_path / "base", "gemma3"), tmp_path / "adapter"
    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": r".*language_model\..*\w+_proj"}
    model = get_peft_model(whole(folder), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(saved)
    tokens = AutoTokenizer.from_pretrained(folder)("The parrot says").input_ids
    expected = []
    for each in (whole(folder), PeftModel.from_pretrained(whole(folder), saved).eval()):
        with torch.inference_mode():
            logprobs = each(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            found = each.generate(torch.tensor([tokens]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1)
        expected.append((logprobs, AutoTokenizer.from_pretrained(folder).decode(found[0, len(tokens) :])))
    theirs = load_file(saved / "adapter_model.safetensors")
    hosted = serve(folder, engine="vllm", max_model_len=96)
    [names] = hosted.run(hosted.engine._llm.collective_rpc(list_parameters))  # type: ignore[attr-defined]
    assert names and not any("vision" in name or "multi_modal" in name for name in names), "not in memory"
    assert_equal(hosted, folder)
    hosted.forget_all()
    for prefix in ("model.language_model.", "language_model.model.", "model."):
        spelled = {key.replace("model.language_model.", prefix): tensor for key, tensor in theirs.items()}
        save_file(spelled, saved / "adapter_model.safetensors")
        checked = check_folder(saved, accepts_base={str(folder)}, module_shapes=hosted.engine.module_shapes)
        assert len(checked.modules) == len(theirs) / 2
        weights = decode_weights(*encode_weights(checked.modules))
        hosted.add(weights)
        plans = BASE_PLAN, plan_of("selection", (weights, 1.0))
        answers = hosted.answers(*[job("The parrot says", plan) for plan in plans])
        for answer, (logprobs, text) in zip(answers, expected, strict=True):
            top = torch.tensor([logprob for _, logprob in answer.logprobs[0].top])
            torch.testing.assert_close(top, logprobs.topk(len(top)).values, atol=TOLERANCE, rtol=0)
            assert answer.text == text
        assert float((expected[0][0] - expected[1][0]).abs().max()) > 0.05, "the adapter should matter"
        hosted.forget_all()
    spelled = {key.replace("layers", "blocks"): tensor for key, tensor in theirs.items()}
    save_file(spelled, saved / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="is not a linear layer of the base model"):
        check_folder(saved, accepts_base={str(folder)}, module_shapes=hosted.engine.module_shapes)


def test_a_family_whose_window_vllm_reads_otherwise_is_refused_at_the_start(tmp_path: Path) -> None:
    config = tiny_config(save(tmp_path, "cohere2"), engine="vllm", max_model_len=96)
    with pytest.raises(BaseModelUnsupported, match=r"cohere2: for prompts of 28 tokens its log probabilities differ"):
        HostedEngine(ENGINES["vllm"], config)
