"""The config of a checkpoint's language model, and the multimodal families whose text part is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.text_part import MULTIMODAL, text_config
from tests.gpu_worker import families

REFUSED = ("aya_vision", "cohere2_vision", "gemma3n", "gemma4", "llama4", "paligemma", "qwen2_5_omni", "qwen3_5")


def multimodal(model_type: str, text_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, text_config={"model_type": text_type}, **settings)


def test_every_family_that_is_served_is_compared_with_transformers() -> None:
    assert {model_type for model_type, _, _ in families.MULTIMODAL.values()} == MULTIMODAL


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_multimodal_families_are_refused_in_one_sentence(model_type: str) -> None:
    with pytest.raises(BaseModelUnsupported, match=f"^{model_type} is a multimodal model whose text part") as refusal:
        text_config(AutoConfig.for_model(model_type))
    assert ". " not in str(refusal.value)


def test_a_text_part_that_the_whole_model_computes_otherwise_is_refused() -> None:
    """transformers' LLaVA-NeXT leaves out the scaling of Granite's logits."""
    with pytest.raises(BaseModelUnsupported, match=r"text part \(granite\)"):
        text_config(multimodal("llava_next", "granite"))


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_whole_model_decides_on_the_tie_the_end_and_the_quantisation(is_tied: bool) -> None:
    settings = {"tie_word_embeddings": is_tied, "eos_token_id": [1, 7], "quantization_config": {"quant_method": "fp8"}}
    found = text_config(multimodal("mistral3", "mistral", **settings))
    assert (found.model_type, found.tie_word_embeddings, found.eos_token_id) == ("mistral", is_tied, [1, 7])
    assert found.quantization_config == {"quant_method": "fp8"}


@pytest.mark.parametrize(("model_type", "family"), [("qwen2_vl", "qwen2"), ("qwen3_vl", "qwen3")])
def test_positions_of_images_are_left_out(model_type: str, family: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2]}
    config = AutoConfig.for_model(model_type, text_config={"model_type": f"{model_type}_text", "rope_parameters": rope})
    found = text_config(config)
    assert found.model_type == family
    assert found.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
