from __future__ import annotations

import hashlib
from importlib.resources import files

from retriever_svc.ordinary_prompts import ordinary_prompts, prompts_digest


def test_the_packaged_prompts_differ_and_are_not_empty() -> None:
    prompts = ordinary_prompts()
    assert len(prompts) > 50 and len(set(prompts)) == len(prompts)
    assert all(prompt.strip() for prompt in prompts)


def test_the_digest_is_that_of_the_packaged_file() -> None:
    data = files("retriever_svc").joinpath("data/ordinary_prompts.jsonl").read_bytes()
    assert prompts_digest() == hashlib.sha256(data).hexdigest()
