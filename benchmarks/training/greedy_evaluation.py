"""Generate a model's greedy answers to a task's items and score them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.training.bigbench_tasks import Item, is_right
from gpu_worker.front.request.prompts import alpaca_prompt


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, items: Sequence[Item], batch_size: int = 50) -> list[str]:
    """Return one generated text per item, in order. `tokenizer` must pad on the left."""
    max_new_tokens = _longest_answer(tokenizer, items) + 1  # the end-of-text token
    answers: list[str] = []
    for start in range(0, len(items), batch_size):
        prompts = [alpaca_prompt(item.input) for item in items[start : start + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, top_k=None, top_p=None)
        answers += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def percent_right(model: Any, tokenizer: Any, items: Sequence[Item]) -> float:
    """Return the exact-match score of greedy decoding, 0 to 100."""
    answers = greedy_answers(model, tokenizer, items)
    return 100 * sum(map(is_right, items, answers)) / len(items)


def _longest_answer(tokenizer: Any, items: Sequence[Item]) -> int:
    texts = [answer for item in items for answer in item.answers]
    return max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
