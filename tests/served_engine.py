"""The engine of the servers that the end-to-end tests start: `ENGINE=vllm make test-e2e` chooses vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import byte_tokenizer, gemma3_with_wide_heads, save_talkative

ENGINE = os.environ.get("ENGINE", "native")
HEAD_DIM = 32 if ENGINE == "vllm" else 8  # vLLM's attention supports no smaller heads on the CPU
# The worker's settings that depend on the engine. vLLM would compile each model for a minute.
WORKER: Mapping[str, Any] = {"engine": ENGINE} | ({"enforce_eager": True} if ENGINE == "vllm" else {})
START_S = 600.0  # the longest start of a test's application

needs_own_process = pytest.mark.skipif(ENGINE != "vllm", reason="the native engine has no process of its own")


def save_served_model(tiny_folders: Mapping[str, Path], target: Path) -> Path:
    """Save a tiny model that the engine can serve, and that always chooses tokens with text."""
    if ENGINE == "native":
        return save_talkative(tiny_folders["gemma3"], target)
    torch.manual_seed(0)
    folder = target / "wide"
    model = gemma3_with_wide_heads()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight  # tied to the head
        embeddings /= 8  # otherwise the model repeats the last token, and different plans give equal answers
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return save_talkative(folder, target / "talkative")
