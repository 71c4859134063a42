"""Compare this engine with other software that serves adapters, on equal prompts: `python -m benchmarks.peers`.

With `--vllm-python` vLLM takes part: with adapters against all others, then without adapters against this engine's base
model. Every round runs each contender once, so machine load is equal. PEFT varies from run to run, so it runs twice and
the better run counts. With `--llama-python` or `--openvino-python` those are compared instead, at 1, 8 and 32 rows,
with weights of the same bits. There this engine also answers over HTTP, with as many streams as rows.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import gguf
import httpx
import peft
import transformers
import typer
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks import plots
from benchmarks.engine_cases import (
    NUM_NEW,
    NUM_ROWS,
    RANK,
    Loaded,
    Prompt,
    Prompts,
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
from benchmarks.http import POOL_NAMES, write_pool
from benchmarks.results_file import write_part, write_results
from benchmarks.vllm_process import Peer, Vllm
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig
from gpu_worker.config import PACKAGED_MODEL, WorkerConfig
from gpu_worker.model.base_model import model_source
from gpu_worker.model.packaged_model import assemble, packaged_folder
from lora_store import ModuleWeights, Strategy, write_peft_folder

NUM_ADAPTERS = 8
OURS: tuple[tuple[str, Strategy], ...] = (("base", "base"), ("selection 8", "selection"), ("mixture 8", "mixture"))
GENERATE, CONTINUOUS, PEFT = "transformers generate", "transformers continuous batching", "PEFT mixed batch, 8 adapters"
VLLM_BASE, VLLM_LORA = "vLLM-CPU base", "vLLM-CPU, 8 adapters"
WARM_TOKENS, MAX_LEN = 4, 512
COUNTS = (1, 8, 32)  # rows
OVER_HTTP = "ours over HTTP"
BASE_MODEL = {"model": "auto", "lora": {"plan": {"strategy": "base"}}}
BITS = ("bfloat16", "int8", "int4", "file")  # file: the integers of the packaged GGUF file
CPU_SCRIPT = Path(__file__).with_name("cpu_peer.py")

Contender = Callable[[Sequence[Prompt], int], float]
"""Takes rows and new tokens per row, and returns tokens per second."""
Round = dict[str, float]


def contenders_here(loaded: Loaded, folders: Sequence[Path]) -> dict[str, Contender]:
    """Load all contenders that run in this process."""
    contenders = {name: ours(loaded, strategy) for name, strategy in OURS}
    contenders[GENERATE] = generate(plain_model(loaded.config))
    contenders[CONTINUOUS] = continuous_batching(loaded.config)
    contenders[PEFT] = mixed_batch(loaded.config, folders)
    return contenders


def ours(loaded: Loaded, strategy: Strategy) -> Contender:
    def run(rows: Sequence[Prompt], num_new: int) -> float:
        asked = plans(strategy, NUM_ADAPTERS, len(rows))
        return loaded.run(asked, rows, num_new)[0]

    return run


def continuous_batching(config: WorkerConfig) -> Contender:
    """Return transformers' continuous batching. Its manager is kept between runs."""
    model = plain_model(config, attn_implementation="sdpa")  # transformers 5.24 replaces it by the paged one
    batching = ContinuousBatchingConfig(  # would be inferred from a GPU's memory
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
        assert num_made == len(rows) * num_new, f"{num_made} tokens were made for {len(rows)} rows"
        return num_made / seconds

    return run


def mixed_batch(config: WorkerConfig, folders: Sequence[Path]) -> Contender:
    """Return PEFT's batch, in which each row has its own adapter, by `generate`."""
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


class Bench:
    """Rounds with their own prompts. The first round of each set of contenders is a warm-up."""

    def __init__(self, prompts: Prompts, num_new: int) -> None:
        self._prompts, self._num_new = prompts, num_new

    def rounds(self, contenders: Mapping[str, Contender], numbers: Iterable[int]) -> list[Round]:
        self._round(contenders, 0, WARM_TOKENS)
        return [self._round(contenders, number, self._num_new) for number in numbers]

    def _round(self, contenders: Mapping[str, Contender], number: int, num_new: int) -> Round:
        prompts = self._prompts(number, NUM_ROWS)
        found = {name: run(prompts, num_new) for name, run in contenders.items()}
        gc.collect()
        console.print(f"round {number}: " + ", ".join(f"{name} {speed:.0f}" for name, speed in found.items()))
        return found


def measure(
    vllm_python: Path | None, rounds: int, minutes: float, num_new: int
) -> tuple[list[Round], list[Round], dict[str, str]]:
    """Return (rounds of all but vLLM's base model, rounds of vLLM's and this engine's base model, versions).

    Two vLLMs at once, next to the other contenders, would not fit in 24 GiB.
    """
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    loaded = Loaded(NUM_ADAPTERS, max_model_len=MAX_LEN)
    bench = Bench(loaded.prompts, num_new)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(number)) for number in range(NUM_ADAPTERS)]
        source = model_source(loaded.config)
        for number, folder in enumerate(folders):
            write_peft_folder(folder, random_modules(number, loaded.engine.bank.shapes), base_model=source)
        contenders = contenders_here(loaded, folders)
        if vllm_python is None:
            return bench.rounds(contenders, rounds_within(rounds, minutes)), [], versions
        console.print("starting vLLM with adapters")
        with Vllm(vllm_python, source, folders, Path(name, "vllm.log")) as vllm:
            found = bench.rounds(contenders | {VLLM_LORA: vllm}, rounds_within(rounds, minutes))
        console.print("starting vLLM without adapters")
        with Vllm(vllm_python, source, [], Path(name, "vllm.log")) as vllm:
            pair = {"base": contenders["base"], VLLM_BASE: vllm}
            return found, bench.rounds(pair, rounds_within(rounds, minutes)), versions | {"vllm": vllm.version}


def over_http(url: str, choices: Sequence[Mapping[str, Any]]) -> Contender:
    """Return this server as a contender: each row is one stream, with the fields of the next one of `choices`."""

    async def answer(client: httpx.AsyncClient, choice: Mapping[str, Any], prompt: Prompt, num_new: int) -> None:
        body = {"prompt": prompt.text, "max_tokens": num_new, "temperature": 0, "ignore_eos": True, **choice}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        last = b""
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for piece in response.aiter_bytes():
                last = (last + piece)[-2000:]
        assert response.status_code == 200 and f'"completion_tokens": {num_new}'.encode() in last, last

    async def answer_all(rows: Sequence[Prompt], num_new: int) -> float:
        limits = httpx.Limits(max_connections=len(rows))
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            started = time.perf_counter()
            await asyncio.gather(
                *[answer(client, choices[number % len(choices)], prompt, num_new) for number, prompt in enumerate(rows)]
            )
            return len(rows) * num_new / (time.perf_counter() - started)

    return lambda rows, num_new: asyncio.run(answer_all(rows, num_new))


def write_gguf_adapter(path: Path, modules: Mapping[str, ModuleWeights]) -> str:
    """Write an adapter of Gemma 3 in llama.cpp's format, and return its path."""
    writer, names = gguf.GGUFWriter(path, "gemma3"), gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 64)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", RANK)
    for module, weights in modules.items():
        for suffix, tensor in (("lora_a", weights.lora_a), ("lora_b", weights.lora_b)):
            writer.add_tensor(f"{names.get_name(module)}.weight.{suffix}", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def measure_bits(bits: str, pythons: Mapping[str, Path], rounds: int, minutes: float, num_new: int) -> list[Round]:
    """Return rounds of this engine and of the peers, by number of rows, without and with 8 adapters."""
    folder, rounding = str(packaged_folder(WorkerConfig().cache_dir)), "none" if bits == "bfloat16" else bits
    options = {"base_model": folder, "quantization": rounding} if bits != "file" else {"quantization": "int8"}
    loaded = Loaded(NUM_ADAPTERS, max_model_len=MAX_LEN, **options)
    contenders: dict[str, Contender] = {"ours": ours(loaded, "base"), "ours, 8 adapters": ours(loaded, "selection")}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_pool(scratch / "pool", loaded, folder)
        base = {"base_model": options.get("base_model", PACKAGED_MODEL)}
        worker = {"quantization": options["quantization"], "prefix_cache": False}
        config = AppConfig(store_uri=f"{scratch}/store", preload=(scratch / "pool",), **base, worker=worker)
        server = stack.enter_context(Server(config, port=0))
        server.prepare(console.print)
        url = server.start()
        server.wait_ready(timeout_s=300)
        contenders |= {
            OVER_HTTP: over_http(url, [BASE_MODEL]),
            f"{OVER_HTTP}, 8 adapters": over_http(url, [{"model": name} for name in POOL_NAMES]),
        }
        assemble(scratch / "model.gguf")
        adapters = [random_modules(number, loaded.engine.bank.shapes) for number in range(NUM_ADAPTERS)]
        files = [write_gguf_adapter(scratch / f"{number}.gguf", each) for number, each in enumerate(adapters)]
        for number, modules in enumerate(adapters):
            write_peft_folder(scratch / str(number), modules, base_model=folder)
        folders = [str(scratch / str(number)) for number in range(NUM_ADAPTERS)]
        sources = {"llama": (str(scratch / "model.gguf"), files), "openvino": (folder, folders)}
        for name in pythons.keys() - ({"openvino"} if bits == "file" else set()):
            model, own = sources[name]
            settings = {"engine": name, "bits": bits, "scratch": str(scratch), "model": model, "adapters": own}
            peer = stack.enter_context(Peer(pythons[name], CPU_SCRIPT, scratch / f"{name}.log", **settings))
            who = f"{name} {peer.version}"
            contenders |= {who: peer, f"{who}, 8 adapters": partial(peer, num_active=NUM_ADAPTERS)}
        found: list[Round] = []
        for number in (0, *rounds_within(rounds, minutes)):
            prompts, length = loaded.prompts(number, NUM_ROWS), num_new if number else WARM_TOKENS
            cases = product(COUNTS, contenders.items())
            found.append({f"{bits} x{n}: {name}": run(prompts[:n], length) for n, (name, run) in cases})
    return found[1:]


def report_bits(found: Sequence[Round]) -> tuple[str, dict[str, float]]:
    """Return the table, and this engine's speed over that of each peer in the same case."""
    heads = "tokens/s", "ours / it", "ours over HTTP / it"
    table, figures = table_of("weights, rows, who", *heads), dict[str, float]()
    for name in found[0]:
        case, adapters = name.split(": ")[0], ", 8 adapters" if ", 8 adapters" in name else ""
        if not name.startswith(f"{case}: ours"):
            figures[name] = ratio(found, f"{case}: ours{adapters}", name)
            figures[f"{name}, ours over HTTP"] = ratio(found, f"{case}: {OVER_HTTP}{adapters}", name)
        speed = statistics.median(round_[name] for round_ in found)
        ratios = [f"{figures[key]:.2f}" for key in (name, f"{name}, ours over HTTP") if key in figures]
        table.add_row(name, f"{speed:.0f}", *ratios)
    return shown(table), figures


def ratio(found: Sequence[Round], name: str, over: str) -> float:
    """Return the median over rounds of a ratio within a round."""
    return statistics.median(round_[name] / round_[over] for round_ in found)


def figures_of(found: Sequence[Round], base_found: Sequence[Round]) -> dict[str, float]:
    figures = {
        "selection_over_peft": ratio(found, "selection 8", PEFT),
        "mixture8_over_peft": ratio(found, "mixture 8", PEFT),
        "mixture8_over_continuous_batching": ratio(found, "mixture 8", CONTINUOUS),
    }
    if base_found:
        figures["mixture8_over_vllm_cpu"] = ratio(found, "mixture 8", VLLM_LORA)
        figures["selection_over_vllm_cpu"] = ratio(found, "selection 8", VLLM_LORA)
        figures["base_over_vllm_cpu_base"] = ratio(base_found, "base", VLLM_BASE)
    return figures


def report(found: Sequence[Round], base_found: Sequence[Round], versions: Mapping[str, str]) -> str:
    table = table_of("who", "tokens/s", "best round", "mixture 8 / it", "base / it")
    for name in found[0]:
        speeds = [round_[name] for round_ in found]
        ratios = [f"{ratio(found, ours_, name):.2f}" for ours_ in ("mixture 8", "base")]
        table.add_row(name, f"{statistics.median(speeds):.0f}", f"{max(speeds):.0f}", *ratios)
    for name in base_found[0] if base_found else ():
        speeds = [round_[name] for round_ in base_found]
        cells = f"{statistics.median(speeds):.0f}", f"{max(speeds):.0f}", "", f"{ratio(base_found, 'base', name):.2f}"
        table.add_row(f"{name}, rounds of two", *cells)
    return shown(table) + ", ".join(f"{name} {version}" for name, version in versions.items()) + "\n"


def main(
    vllm_python: Annotated[Path | None, typer.Option(help="the Python of a virtual environment with vllm-cpu")] = None,
    llama_python: Annotated[Path | None, typer.Option(help="the Python of one with llama-cpp-python")] = None,
    openvino_python: Annotated[
        Path | None, typer.Option(help="the Python of one with openvino-genai, optimum-intel and transformers<5")
    ] = None,
    rounds: Annotated[int, typer.Option(help="rounds after the warm-up round")] = 3,
    minutes: Annotated[float, typer.Option(help="start no round that would end later")] = 2.5,
    quick: Quick = False,
) -> None:
    """Measure Gemma-3-270M in bfloat16: 32 prompts of 20 to 80 tokens, 64 new ones each, rank 8 in all modules."""
    counts = (1, 1.0, WARM_TOKENS) if quick else (rounds, minutes, NUM_NEW)
    others = {"llama": llama_python, "openvino": openvino_python}
    if pythons := {name: python for name, python in others.items() if python is not None}:
        for bits in BITS:
            rounds_of_bits = measure_bits(bits, pythons, *counts)
            table, figures = report_bits(rounds_of_bits)
            if not quick:
                parts = {"figures": figures, "table": table, "runs": rounds_of_bits}
                write_part("peers_by_bits", bits, **parts, keeps_other_processors=True)
        return
    found, base_found, versions = measure(vllm_python, *counts)
    table = report(found, base_found, versions)
    if quick:
        return
    figures = figures_of(found, base_found)
    write_results(
        "peers", figures=figures, table=table, runs=[versions, *found, *base_found], keeps_other_processors=True
    )
    medians = {name: statistics.median(round_[name] for round_ in found) for name in found[0]}
    medians |= {VLLM_BASE: statistics.median(round_[VLLM_BASE] for round_ in base_found)} if base_found else {}
    plots.bars("peers/plot", medians, f"tokens/s, {NUM_ROWS} rows")


if __name__ == "__main__":
    typer.run(main)
