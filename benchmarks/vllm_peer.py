"""vLLM on the CPU as a process that answers batches for `benchmarks.peers`, run by the Python of its own venv.

Arguments: settings as JSON, and the file descriptor for answers. A batch is a line of JSON on stdin; so is its answer.
"""

import json
import os
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt, __version__
from vllm.lora.request import LoRARequest


def loaded(settings: dict[str, Any]) -> LLM:
    """Load vLLM with these `adapters` (folders, possibly none) of at most this `rank`, all active at once."""
    adapters = settings["adapters"]
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": settings["rank"]} if adapters else {}
    return LLM(
        settings["model"],
        dtype="bfloat16",
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["num_rows"],
        enable_prefix_caching=False,  # rows of earlier rounds must not be cached
        **lora,
    )


def main() -> None:
    settings = json.loads(sys.argv[1])
    llm = loaded(settings)
    requests = [LoRARequest(f"adapter-{n}", n + 1, folder) for n, folder in enumerate(settings["adapters"])]
    with os.fdopen(int(sys.argv[2]), "w") as answers:

        def answer(content: dict[str, Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        answer({"version": __version__})
        for line in sys.stdin:
            batch = json.loads(line)
            num_new = batch["num_new"]
            sampling = SamplingParams(max_tokens=num_new, min_tokens=num_new, temperature=0, ignore_eos=True)
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in batch["rows"]]
            chosen = [requests[row % len(requests)] for row in range(len(prompts))] if requests else None
            started = time.perf_counter()
            outputs = llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
            seconds = time.perf_counter() - started
            answer({"seconds": seconds, "num_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)})


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
