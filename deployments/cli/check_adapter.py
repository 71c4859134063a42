"""Run `loraretriever check`. This module is apart from `serve`, because Ray takes seconds to import."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from deployments.cli.client import out, print_json, show_error
from deployments.config.app import AppConfig
from deployments.config.loading import load_config
from deployments.publishing.adapter_folders import adapter_folders
from lora_store import AdapterRefused, CheckedFolder, check_folder
from lora_store.peft_files import TEMPLATE_FILE
from lora_store.sample_files import SAMPLES_FILE, sample_lines

_ENOUGH_SAMPLES = 20  # more improve routing little


def check_adapter(folder: Path, config: Path | None, parity: bool, *, as_json: bool = False) -> int:
    """Print whether the folder can be published, or every reason why not. Return the exit code.

    `parity`: also compare the logits with those of PEFT. `as_json`: print an object for scripts.
    """
    if problem := folder_problem(folder):
        return _fail(problem)
    try:
        settings = load_config(config)
        has_template = (folder / TEMPLATE_FILE).exists()  # without one, the base model's need not be read
        admitted = check_folder(
            folder.resolve(),
            accepts_base=settings.accepted_bases,
            module_shapes=None,
            templates=settings.known_templates if has_template else None,
            limits=settings.admission,
        )
    except AdapterRefused as exc:
        if as_json:
            print_json({"name": folder.resolve().name, "is_fit": False, "reasons": list(exc.reasons)})
            return 1
        return _fail("\n".join(f"refused: {reason}" for reason in exc.reasons))
    except (ValueError, OSError) as exc:
        return _fail(str(exc))
    if as_json:
        counted = {"num_modules": len(admitted.modules), "num_samples": len(admitted.samples)}
        print_json({"name": folder.resolve().name, "is_fit": True, **counted})
        return 0
    out.print(f"{folder.resolve().name}: {_summary(admitted, _num_lines(folder))}", markup=False, highlight=False)
    return _check_parity(folder.resolve(), settings) if parity else 0


def folder_problem(folder: Path) -> str | None:
    """Return why `folder` cannot be an adapter folder, or None."""
    if not folder.exists():
        return f"{folder}: no such folder"
    if not folder.is_dir():
        return f"{folder}: is a file; give the folder that contains it"
    found = adapter_folders(folder)
    if [item.path for item in found] == [folder]:
        return None
    hint = f"; found adapters in {', '.join(str(item.path.relative_to(folder)) for item in found)}" if found else ""
    return f"{folder}: no adapter here, adapter_config.json is missing{hint}"


def _num_lines(folder: Path) -> int:
    """Return the number of samples that were written for the adapter."""
    file = folder / SAMPLES_FILE
    return len(sample_lines(file.read_bytes())) if file.is_file() else 0


def _summary(admitted: CheckedFolder, num_lines: int) -> str:
    num_samples = len(admitted.samples)
    parts = [f"{len(admitted.pairs)} modules", f"{num_samples} {'sample' if num_samples == 1 else 'samples'}"]
    if num_lines > num_samples:
        parts[-1] += f" of {num_lines}, spread over the file"
    hint = ""
    if not num_samples:
        hint = ", but auto cannot find it: add lora_samples.jsonl or description.txt"
    elif num_samples < _ENOUGH_SAMPLES:
        hint = f"; auto finds it more reliably with {_ENOUGH_SAMPLES} samples"
    return f"{', '.join(parts)}, fit to publish{hint}"


def _check_parity(folder: Path, settings: AppConfig) -> int:
    from deployments.cli.peft_parity import TOLERANCE, parity_with_peft  # transformers takes seconds to import

    with out.status("loading the base model twice"):
        differences = parity_with_peft(folder, settings.worker_config())
    table = Table("strategy", "largest logit difference", title=f"compared with PEFT in float32, at most {TOLERANCE:g}")
    for strategy, difference in differences.items():
        table.add_row(strategy, f"{difference:.1e}")
    out.print(table)
    failed = [strategy for strategy, difference in differences.items() if not difference <= TOLERANCE]
    return _fail(f"{', '.join(failed)} differ from PEFT by more than {TOLERANCE:g}") if failed else 0


def _fail(message: str) -> int:
    """Print an error and return the exit code 1."""
    show_error(message)
    return 1
