"""The answers of a base model and of adapters in one batch, compared with PEFT's over transformers' whole model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer

from gpu_worker.model.base_model import load_base_model
from gpu_worker.model.inject import Adaptable
from lora_store import check_folder
from lora_store.weights_blob import decode_weights, encode_weights
from tests.gpu_worker.engine_driver import MakeEngine, by_digest, greedy, only, run_together
from tests.gpu_worker.families import eager_answer, whole_model
from tests.tiny import assert_equal_logits, tiny_config

PROMPTS = ["The parrot says", "x", "0123456789" * 3]
NUM_NEW = 5


def assert_answers_as_peft(
    folder: Path, adapters: Sequence[Path], make_engine: MakeEngine, prompts: Sequence[str] = PROMPTS
) -> int:
    """Compare base rows and rows of every adapter, all in one batch, and return how many were compared."""
    base = load_base_model(tiny_config(folder))
    assert not any("visi" in name or "visual" in name for name, _ in base.model.named_parameters()), "not in memory"
    shapes = Adaptable.of(base.model).shapes
    pool = [
        decode_weights(*encode_weights(check_folder(path, accepts_base={str(folder)}, module_shapes=shapes).modules))
        for path in adapters
    ]
    plans = [None, *map(only, pool)]
    jobs = [greedy(p, *([] if plan is None else [plan]), num_new=NUM_NEW) for plan in plans for p in prompts]
    answers = iter(run_together(make_engine(by_digest(*pool), base=base, max_step_tokens=16), jobs))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = {}
    for path in (None, *adapters):
        model = whole_model(folder)
        if path is not None:
            model = PeftModel.from_pretrained(model, path).eval()
        for prompt in prompts:
            answer, (first, tokens) = next(answers), eager_answer(model, tokenizer(prompt).input_ids, NUM_NEW)
            assert_equal_logits(answer.first_logits, first)
            assert answer.tokens == tokens, (folder.name, path, prompt)
            plain.setdefault(prompt, first)
            assert path is None or float((first - plain[prompt]).abs().max()) > 0.01, "the adapter should matter"
    return len(jobs)
