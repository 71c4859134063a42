"""Compare the vLLM engine with transformers for tiny random models of every family, and write what was seen.

Run in .venv-vllm: `python -m tests.gpu_worker.conformance.run_families [FAMILY …]`. Formats of quantised weights count
as families, such as `quantised:int4`. The results are those of docs/reference/supported-models.md, and a run replaces
those of its own families only. With `--build` no engine starts: vLLM's class of the model is built, and the modules are
compared. With `--files` it lists vLLM's files of models that take LoRA adapters, with the families of each.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from benchmarks.results_file import write_part, write_results
from gpu_worker.errors import GpuWorkerError
from gpu_worker.model.checkpoint import auto_class
from tests.gpu_worker.conformance.driver import HostedEngine
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.families import (
    ARCHITECTURES,
    FAMILIES,
    IN_BFLOAT16,
    MISTRAL,
    assert_equal,
    config_of,
    save,
)
from tests.gpu_worker.conformance.reference import Reference
from tests.gpu_worker.conformance.test_quantized_base import FORMATS, assert_within, write_folders
from tests.tiny import gemma3_with_wide_heads, tiny_config

STUDY, QUANTISED = "families", "quantised:"
FILES, OTHER_CLASSES = "vllm_model_files", "transformers"
PATIENCE_S = 300
BFLOAT16_BOUND = 0.5  # of a log probability; of Qwen 3.5 without adapters transformers' own bfloat16 differs by 0.2
EQUAL, BUILT, DIFFERS, REFUSED, FAILS = "equal", "not compared", "differs", "refused", "fails"


def compare(family: str, folder: Path) -> dict[str, Any]:
    """Start the engine with a model of the family, and compare its answers."""
    form = FORMATS.get(family.removeprefix(QUANTISED))
    served, floats = (folder, folder) if form is None else (folder / "quantized", folder / "floats")
    if not folder.exists():
        if form is None:
            save(folder, family)
        else:
            torch.manual_seed(0)
            save(folder / "model", "gemma3_text", gemma3_with_wide_heads())
            write_folders(form, folder / "model", folder)
    if (folder / MISTRAL).exists():
        served = folder / MISTRAL
    bound = form.bound if form is not None else BFLOAT16_BOUND if family in IN_BFLOAT16 else None
    dtype = "float32" if bound is None else "bfloat16"
    settings = {"max_model_len": 96, "dtype": dtype}
    try:
        hosted = HostedEngine(ENGINES["vllm"], tiny_config(served, engine="vllm", **settings))
    except GpuWorkerError as exc:
        return {"outcome": REFUSED, "reason": str(exc)}
    try:
        if bound is None:
            furthest = assert_equal(hosted, floats)
        else:
            furthest = max(assert_within(bound, hosted, Reference(floats)))
    except AssertionError as exc:
        return {"outcome": DIFFERS, "reason": str(exc)[:300]}
    modules = sorted({name.rpartition(".")[2] for name in hosted.engine.module_shapes})
    has_experts = any(len(shape) > 2 for shape in hosted.engine.module_shapes.values())
    result = {"outcome": EQUAL, "dtype": dtype, "furthest": round(furthest, 7), "modules": modules}
    return result | ({"experts": True} if has_experts else {})


def build(family: str, folder: Path) -> dict[str, Any]:
    """Build vLLM's class of the model, without weights, and wrap the layers that adapters may target."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    from gpu_worker.vllm.engine_args import build_config
    from gpu_worker.vllm.front_model import load_front_model, narrowed
    from gpu_worker.vllm.plan_layers import PlanLayers
    from gpu_worker.vllm.settings import PluginSettings

    if not folder.exists():
        save(folder, family)
    config = tiny_config(folder, engine="vllm", max_model_len=96)
    try:
        model = load_front_model(config)
        vllm_config = build_config(config, model, free_fill=0.0, is_compiled=False)
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        plugin = PluginSettings.of(vllm_config.additional_config)
        with set_current_vllm_config(vllm_config):
            layers = PlanLayers(
                initialize_model(vllm_config),
                lora_config,
                modules=plugin.modules,
                outputs=plugin.outputs,
                num_rows=8,
                device=torch.device("cpu"),
                kernel=None,
            )
        found = narrowed(model, [layers.ends])
    except GpuWorkerError as exc:
        return {"outcome": REFUSED, "reason": str(exc)}
    except Exception as exc:
        return {"outcome": FAILS, "reason": f"{type(exc).__name__}: {exc}"[:300]}
    return {"outcome": BUILT, "modules": sorted({name.rpartition(".")[2] for name in found.shapes})}


def build_all(families: Sequence[str], models: Path) -> None:
    """Build the families' models one after the other, and write what was seen."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    from gpu_worker.vllm import plan_layers

    plan_layers._register = lambda **_: None  # a process can register its operation for one model only
    with TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        for family in families:
            write(family, {"family": family, "engine": "vllm", **build(family, models / family)})


def list_files() -> None:
    """Write which of vLLM's files have models that generate text and take LoRA adapters, and the families of each."""
    from vllm.model_executor.models import registry, supports_lora

    groups = registry._TEXT_GENERATION_MODELS, registry._MULTIMODAL_MODELS, registry._TRANSFORMERS_SUPPORTED_MODELS
    rows: dict[str, dict[str, Any]] = {}
    file_of = {}
    for architecture in sorted({*groups[0], *groups[1], *groups[2]}):
        registered = registry.ModelRegistry.models[architecture]
        file = file_of[architecture] = registered.module_name.removeprefix("vllm.model_executor.models.")
        try:
            takes_lora = supports_lora(registered.load_model_cls())
        except Exception as exc:  # it needs a package or a device that is not here
            print(f"{architecture} cannot be imported: {exc}", file=sys.stderr)
            takes_lora = False
        if takes_lora:
            spec = importlib.util.find_spec(registered.module_name)
            names_interface = "SupportsLoRA" in Path(spec.origin).read_text() if spec and spec.origin else False
            row = rows.setdefault(file, {"file": file, "names_interface": names_interface, "families": []})
            row.setdefault("architectures", []).append(architecture)
    for family in FAMILIES:
        config = config_of(family)
        with torch.device("meta"):
            default = type(auto_class(config).from_config(config)).__name__
        named = ARCHITECTURES.get(family, ARCHITECTURES.get(family.partition(" ")[0], default))
        file = file_of.get(named, OTHER_CLASSES)
        if file in rows:
            rows[file]["families"].append(family)
    found = sorted(rows.values(), key=lambda row: str(row["file"]))
    table = "\n".join(f"{row['file']}  {', '.join(row['families'])}" for row in found)
    write_results(FILES, figures={}, table=table, runs=found)


def write(family: str, row: dict[str, Any]) -> None:
    """Print what was seen of a family, and keep it in the results."""
    line = "  ".join(str(value) for key, value in row.items() if key != "modules")
    print(line, flush=True)
    write_part(STUDY, family, figures={}, table=line, runs=[row])


@dataclass(frozen=True, slots=True)
class Run:
    """A forked process that compares one family. It shares the modules that this process has imported."""

    family: str
    pid: int
    folder: Path
    began: float

    @classmethod
    def start(cls, family: str, models: Path, folder: Path) -> Run:
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                result = compare(family, models / family)
            except BaseException as exc:
                result = {"outcome": FAILS, "reason": f"{type(exc).__name__}: {exc}"[:300]}
            (folder / "result").write_text(json.dumps(result))
            os._exit(0)
        return cls(family, pid, folder, time.monotonic())

    def has_ended(self) -> bool:
        return os.waitpid(self.pid, os.WNOHANG)[0] != 0 or time.monotonic() > self.began + PATIENCE_S

    def end(self) -> dict[str, Any]:
        """Kill all that the process has started, and return what it has seen."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        result = {"outcome": FAILS, "reason": f"it did not end within {PATIENCE_S} s"}
        if (self.folder / "result").exists():
            result = json.loads((self.folder / "result").read_text())
        if result["outcome"] != EQUAL:
            log = (self.folder / "log").read_text().splitlines()
            errors = [line for line in log if line.startswith("(Worker") and " ERROR " in line] or log
            print(f"--- {self.family}", *errors[-25:], sep="\n", file=sys.stderr)
        return {"family": self.family, "engine": "vllm", **result}


def run_all(families: Sequence[str], models: Path, folder: Path, at_once: int, last_start: float) -> None:
    """Compare the families, so many at a time, and write each one's result as it ends."""
    waiting, running = [*families], list[Run]()
    while running or (waiting and time.monotonic() < last_start):
        while waiting and len(running) < at_once and time.monotonic() < last_start:
            running.append(Run.start(waiting[0], models, folder / waiting.pop(0)))
        time.sleep(0.2)
        for run in [run for run in running if run.has_ended()]:
            running.remove(run)
            write(run.family, run.end())
    if waiting:
        print("not started:", *waiting)


@click.command(help=__doc__)
@click.argument("families", nargs=-1)
@click.option("--models", type=click.Path(path_type=Path), help="Folder for the tiny models, which are kept there.")
@click.option("--at-once", default=1, help="Families that run at a time.")
@click.option("--seconds", default=float("inf"), help="Start none after this time.")
@click.option("--build", "is_build", is_flag=True, help="Build vLLM's class only, and start no engine.")
@click.option("--files", "is_list", is_flag=True, help="List vLLM's model files, and start no engine.")
def main(
    families: tuple[str, ...], models: Path | None, at_once: int, seconds: float, is_build: bool, is_list: bool
) -> None:
    last_start = time.monotonic() + seconds
    torch.set_num_threads(1)  # a forked process would wait for the threads of its parent
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]  # vLLM would import itself anew
    registry = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda function: function()
    with TemporaryDirectory() as folder:
        names = families or [*FAMILIES, *(QUANTISED + name for name in FORMATS)]
        models = models or Path(folder) / "models"
        if is_list:
            list_files()
        elif is_build:
            build_all([name for name in names if name in FAMILIES], models)
        else:
            run_all(names, models, Path(folder), at_once, last_start)


if __name__ == "__main__":
    main()
