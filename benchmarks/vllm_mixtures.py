"""Compare mixtures inside vLLM with vLLM alone and with the native engine: `python -m benchmarks.vllm_mixtures`.

Run it with the Python of the environment that `make test-vllm` installs. Every round runs each case once on equal
prompts, so machine load is equal, and every ratio is one within a round. Rounds are saved as they end; the same command
runs those that are missing.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.engine_cases import (
    NUM_NEW,
    NUM_ROWS,
    Loaded,
    Prompt,
    Quick,
    console,
    plans,
    random_modules,
    shown,
    table_of,
)
from benchmarks.results_file import commit, machine, write_results
from benchmarks.vllm_process import MAX_LEN, Vllm
from gpu_worker.model.base_model import model_source
from lora_store import Strategy, write_peft_folder
from lora_store.location import DEFAULT_CACHE_DIR

NUM_ADAPTERS, NUM_STOCK, WARM_TOKENS = 32, 8, 4
STOCK, STOCK_LORA = "vLLM, no LoRA", "vLLM, 8 adapters, one a row"
SAVED = DEFAULT_CACHE_DIR / "benchmarks" / "vllm_mixtures.json"

Round = dict[str, float]
"""Tokens per second by case."""
Contender = Callable[[Sequence[Prompt], int], float]


@dataclass(frozen=True, slots=True)
class Case:
    """The plan of every row of a batch, for both of this project's engines."""

    strategy: Strategy
    num_active: int

    def on(self, engine: str) -> str:
        kinds = {"base": "base", "selection": f"selection {self.num_active}"}
        return f"{engine}, {kinds.get(self.strategy, f'mixture of 3 over {self.num_active}')}"


CASES = (Case("base", 0), Case("selection", 8), Case("mixture", 8), Case("mixture", 32))
BASE, SELECTION, MIXTURE_8, MIXTURE_32 = CASES
RATIOS = {
    "vllm_plans_base": (BASE.on("plans"), STOCK),
    "vllm_plans_selection_8": (SELECTION.on("plans"), STOCK),
    "vllm_plans_mixture_8": (MIXTURE_8.on("plans"), STOCK),
    "vllm_plans_mixture_32": (MIXTURE_32.on("plans"), STOCK),
    "vllm_stock_adapters": (STOCK_LORA, STOCK),
    "vllm_plans_mixture_8_over_stock_adapters": (MIXTURE_8.on("plans"), STOCK_LORA),
    "vllm_plans_mixture_8_over_native": (MIXTURE_8.on("plans"), MIXTURE_8.on("native")),
    "vllm_plans_mixture_32_over_native": (MIXTURE_32.on("plans"), MIXTURE_32.on("native")),
}
"""Ratios within a round: the median of each is one of the results."""


def native(loaded: Loaded, case: Case) -> Contender:
    return lambda rows, num_new: loaded.run(plans(case.strategy, case.num_active, len(rows)), rows, num_new)[0]


def in_vllm(vllm: Vllm, case: Case) -> Contender:
    return lambda rows, num_new: vllm(rows, num_new, strategy=case.strategy, num_active=case.num_active)


def measure(numbers: Sequence[int], num_new: int, python: Path, save: Callable[[int, Round], object]) -> None:
    """Start the native engine and three times vLLM, warm up, and run these rounds."""
    loaded = Loaded(NUM_ADAPTERS, max_model_len=MAX_LEN)
    source = model_source(loaded.config)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = [folder / str(number) for number in range(NUM_STOCK)]
        for number, path in enumerate(folders):
            write_peft_folder(path, random_modules(number, loaded.engine.bank.shapes), base_model=source)

        def started(adapters: Sequence[Path], num_with_plans: int = 0) -> Vllm:
            log = folder / f"{len(adapters)}-{num_with_plans}.log"
            console.print(f"starting vLLM with {len(adapters)} adapters of its own, {num_with_plans} of ours")
            return stack.enter_context(Vllm(python, source, adapters, log, num_with_plans=num_with_plans))

        stock, stock_lora, with_plans = started([]), started(folders), started([], NUM_ADAPTERS)
        contenders: dict[str, Contender] = {STOCK: stock, STOCK_LORA: stock_lora}
        contenders |= {case.on("plans"): in_vllm(with_plans, case) for case in CASES}
        contenders |= {case.on("native"): native(loaded, case) for case in CASES}
        for number in (0, *numbers):
            prompts = loaded.prompts(number, NUM_ROWS)
            length = num_new if number else WARM_TOKENS
            found = {name: run(prompts, length) for name, run in contenders.items()}
            console.print(f"round {number}: " + ", ".join(f"{name} {speed:.0f}" for name, speed in found.items()))
            if number:
                save(number, found)


class SavedRounds:
    """The rounds of one commit on one machine, in a file."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.rounds: dict[int, Round] = {}
        if saved.get("key") == key:
            self.rounds = {int(number): found for number, found in saved["rounds"].items()}

    def add(self, number: int, found: Round) -> None:
        self.rounds[number] = found
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"key": self._key, "rounds": self.rounds}), encoding="utf-8")


def figures_of(rounds: Sequence[Round]) -> dict[str, float]:
    """Return the median over rounds of each ratio within a round."""
    return {
        name: statistics.median(found[one] / found[over] for found in rounds) for name, (one, over) in RATIOS.items()
    }


def report(rounds: Sequence[Round]) -> str:
    table = table_of("case", "tokens/s", f"/ {STOCK}", "lowest", "highest")
    for name in rounds[0]:
        shares = [found[name] / found[STOCK] for found in rounds]
        speed = statistics.median(found[name] for found in rounds)
        cells = (statistics.median(shares), min(shares), max(shares))
        table.add_row(name, f"{speed:.0f}", *[f"{share:.2f}" for share in cells])
    return shown(table) + f"medians of {len(rounds)} rounds of {NUM_ROWS} rows\n"


def main(
    rounds: Annotated[int, typer.Option(help="rounds in all, after a warm-up")] = 5,
    vllm_python: Annotated[Path, typer.Option(help="the Python of an environment with vLLM")] = Path(sys.executable),
    quick: Quick = False,
) -> None:
    """Measure Gemma-3-270M in bfloat16: 32 prompts of 20 to 80 tokens, 64 new ones each, rank 8 in all modules."""
    if quick:
        found: list[Round] = []
        measure([1], WARM_TOKENS, vllm_python, lambda _, one: found.append(one))
        report(found)
        return
    saved = SavedRounds(SAVED, f"{commit()} {machine()}")
    missing = [number for number in range(1, rounds + 1) if number not in saved.rounds]
    if missing:
        measure(missing, NUM_NEW, vllm_python, saved.add)
    table = report(list(saved.rounds.values()))
    runs: list[Mapping[str, float]] = [{"round": number} | found for number, found in sorted(saved.rounds.items())]
    write_results("vllm_mixtures", figures=figures_of(list(saved.rounds.values())), table=table, runs=runs)


if __name__ == "__main__":
    typer.run(main)
