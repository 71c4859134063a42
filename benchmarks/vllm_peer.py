"""vLLM on the CPU as a process that answers batches for other benchmarks, run by the Python of its own venv.

Arguments: settings as JSON, and the file descriptor for answers. A batch is a line of JSON on stdin; so is its answer.
The setting `engine` is "stock" for vLLM alone, or "plans" for this project's engine around it.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt, __version__
from vllm.lora.request import LoRARequest

Answer = Callable[[dict[str, Any]], tuple[float, int]]
"""Takes a batch, and returns (seconds, new tokens)."""


def stock(settings: dict[str, Any]) -> Answer:
    """Load vLLM with these `adapters` (folders, possibly none) of at most this `rank`, all active at once."""
    adapters = settings["adapters"]
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": settings["rank"]} if adapters else {}
    llm = LLM(
        settings["model"],
        dtype="bfloat16",
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["num_rows"],
        enable_prefix_caching=False,  # rows of earlier rounds must not be cached
        **lora,
    )
    requests = [LoRARequest(f"adapter-{n}", n + 1, folder) for n, folder in enumerate(adapters)]

    def answer(batch: dict[str, Any]) -> tuple[float, int]:
        num_new = batch["num_new"]
        sampling = SamplingParams(max_tokens=num_new, min_tokens=num_new, temperature=0, ignore_eos=True)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in batch["rows"]]
        chosen = [requests[row % len(requests)] for row in range(len(prompts))] if requests else None
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
        return time.perf_counter() - started, sum(len(output.outputs[0].token_ids) for output in outputs)

    return answer


def plans(settings: dict[str, Any]) -> Answer:
    """Start this project's engine with `num_adapters` random adapters. A batch has its `strategy` and `num_active`."""
    from benchmarks.engine_cases import adapters_of, sampling
    from benchmarks.engine_cases import plans as plans_of
    from gpu_worker.config import VllmWorkerConfig
    from gpu_worker.front.request.request import Completion, Job
    from gpu_worker.vllm.engine import VllmEngine
    from lora_store import AdapterWeights

    pool: dict[str, AdapterWeights] = {}

    def fetch(digest: str) -> Future[AdapterWeights]:
        fetched: Future[AdapterWeights] = Future()
        fetched.set_result(pool[digest])
        return fetched

    config = VllmWorkerConfig(
        base_model=settings["model"],
        bank_rank_rows=settings["rank"] * settings["num_adapters"],
        max_batch_size=settings["num_rows"],
        max_model_len=settings["max_model_len"],
        prefix_cache=False,  # as in the other engines
    )

    async def start() -> VllmEngine:
        return await VllmEngine.start(config, fetch)

    loop = asyncio.Runner()
    engine = loop.run(start())
    pool |= adapters_of(settings["num_adapters"], engine.module_shapes)

    def answer(batch: dict[str, Any]) -> tuple[float, int]:
        asked = plans_of(batch["strategy"], batch["num_active"], len(batch["texts"]))
        jobs = [
            Job("-", text, plan, sampling(batch["num_new"])) for text, plan in zip(batch["texts"], asked, strict=True)
        ]
        started = time.perf_counter()
        outcomes = loop.run(engine.generate(jobs))
        seconds = time.perf_counter() - started
        return seconds, sum(outcome.num_new_tokens for outcome in outcomes if isinstance(outcome, Completion))

    return answer


def main() -> None:
    settings = json.loads(sys.argv[1])
    answer = {"stock": stock, "plans": plans}[settings["engine"]](settings)
    with os.fdopen(int(sys.argv[2]), "w") as answers:

        def write(content: dict[str, Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        write({"version": __version__})
        for line in sys.stdin:
            seconds, num_tokens = answer(json.loads(line))
            write({"seconds": seconds, "num_tokens": num_tokens})


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
