"""llama.cpp or OpenVINO GenAI as a process that answers batches, run by the Python of a venv of its own.

Arguments and answers are those of `vllm_peer`; the setting `engine` is "llama" or "openvino". Neither computes rows of
different adapters in one batch, so the rows of each adapter are a batch of their own.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Sequence[int]]
Generate = Callable[[Rows, int, int | None], int]
"""Takes prompts, new tokens per row, and the number of their adapter; returns new tokens."""
FILE_TYPES = {"bfloat16": 32, "int8": 7, "int4": 2}  # llama.cpp's numbers of BF16, Q8_0 and Q4_0
WEIGHTS = {"bfloat16": "fp16", "int8": "int8", "int4": "int4"}  # OpenVINO computes in bfloat16 where it is faster
MOST_TOKENS = 4096  # a batch has at most so many


def llama(settings: dict[str, Any]) -> tuple[Generate, str]:
    """Load the GGUF file `model`, rounded to `bits` unless that is "file", and `adapters`, which are GGUF files."""
    import llama_cpp as lib
    import numpy as np

    path = settings["model"]
    if settings["bits"] != "file":
        rounding = lib.llama_model_quantize_default_params()
        rounding.ftype, rounding.allow_requantize = FILE_TYPES[settings["bits"]], True
        source, path = path, f"{settings['scratch']}/{settings['bits']}.gguf"
        assert lib.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(rounding)) == 0
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max = settings["num_rows"] * settings["max_model_len"], settings["num_rows"]
    params.n_batch, params.n_threads, params.n_threads_batch = MOST_TOKENS, os.cpu_count(), os.cpu_count()
    context = lib.llama_init_from_model(model, params)
    adapters = [lib.llama_adapter_lora_init(model, each.encode()) for each in settings["adapters"]]
    num_ids = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(MOST_TOKENS, 0, 1)

    def use(adapter: int | None) -> None:
        chosen = [] if adapter is None else [adapters[adapter]]
        if hasattr(lib, "llama_set_adapters_lora"):  # newer versions
            pointers = (ctypes.c_void_p * 1)(*[ctypes.cast(each, ctypes.c_void_p) for each in chosen])
            pointers = ctypes.cast(pointers, lib.llama_set_adapters_lora.argtypes[1])
            assert lib.llama_set_adapters_lora(context, pointers, len(chosen), (ctypes.c_float * 1)(1.0)) == 0
        else:
            lib.llama_clear_adapter_lora(context)
            assert all(lib.llama_set_adapter_lora(context, each, 1.0) == 0 for each in chosen)

    def step(rows: Rows, starts: Sequence[int]) -> list[int]:
        """Compute the tokens of each row, which start at a position, and return the likeliest next ones."""
        places = [(row, start + n, token) for row, start in enumerate(starts) for n, token in enumerate(rows[row])]
        last = [number for number, (row, *_) in enumerate(places) if [*places, (-1,)][number + 1][0] != row]
        batch.n_tokens = len(places)
        for number, (row, position, token) in enumerate(places):
            batch.token[number], batch.pos[number], batch.n_seq_id[number] = token, position, 1
            batch.seq_id[number][0], batch.logits[number] = row, number in last
        assert lib.llama_decode(context, batch) == 0
        logits = (lib.llama_get_logits_ith(context, number) for number in last)
        return [int(np.ctypeslib.as_array(each, shape=(num_ids,)).argmax()) for each in logits]

    def generate(rows: Rows, num_new: int, adapter: int | None) -> int:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        use(adapter)
        tokens = step(rows, [0] * len(rows))
        for number in range(num_new - 1):
            tokens = step([[token] for token in tokens], [len(row) + number for row in rows])
        return num_new * len(rows)

    return generate, lib.__version__


def openvino(settings: dict[str, Any]) -> tuple[Generate, str]:
    """Convert the folder `model` to `bits` by optimum-intel, and load it and `adapters`, which are folders of PEFT."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    folder = f"{settings['scratch']}/openvino-{settings['bits']}"
    options = "--task", "text-generation-with-past", "--weight-format", WEIGHTS[settings["bits"]], folder
    export = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", settings["model"]]
    subprocess.run([*export, *options], check=True)
    adapters = [genai.Adapter(f"{each}/adapter_model.safetensors") for each in settings["adapters"]]
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = 1, settings["num_rows"], False
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", {"adapters": genai.AdapterConfig(adapters)})

    def generate(rows: Rows, num_new: int, adapter: int | None) -> int:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens, config.ignore_eos = num_new, num_new, True
        config.adapters = genai.AdapterConfig([] if adapter is None else [adapters[adapter]])
        results = pipeline.generate([ov.Tensor(np.array([row], np.int64)) for row in rows], [config] * len(rows))
        return sum(len(result.m_generation_ids[0]) for result in results)

    return generate, genai.__version__


def main() -> None:
    settings = json.loads(sys.argv[1])
    generate, version = {"llama": llama, "openvino": openvino}[settings["engine"]](settings)
    with os.fdopen(int(sys.argv[2]), "w") as answers:
        print(json.dumps({"version": version}), file=answers, flush=True)
        for line in sys.stdin:
            batch = json.loads(line)
            by_adapter: dict[int | None, list[list[int]]] = {}
            for number, ids in enumerate(batch["rows"]):
                adapter = number % batch["num_active"] if batch["num_active"] else None
                by_adapter.setdefault(adapter, []).append(ids)
            started = time.perf_counter()
            made = sum(generate(rows, batch["num_new"], adapter) for adapter, rows in by_adapter.items())
            answer = {"seconds": time.perf_counter() - started, "num_tokens": made}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
