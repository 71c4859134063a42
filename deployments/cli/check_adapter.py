"""Check adapter folders without a server, for `loraretriever publish --dry-run`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from pydantic import ValidationError
from rich.table import Table

from deployments.cli.adapter_publisher import samples_from
from deployments.cli.options import name_options
from deployments.cli.output import counted, err, fail, out, print_json, say, show_error, show_warning
from deployments.config.loading import load_config
from deployments.config.served_model import ServedModels
from deployments.json_types import JsonObject
from deployments.publishing.adapter_folders import CONFIG_FILE, adapter_folders
from gpu_worker.config import NativeWorkerConfig, VllmWorkerConfig
from gpu_worker.errors import GpuWorkerError
from lora_store import AdapterRefused, Label, Limits, check_folder
from lora_store.peft_config import read_base_model
from lora_store.peft_files import TEMPLATE_FILE
from lora_store.sample_files import SAMPLES_FILE, count_samples

_ENOUGH_SAMPLES = 20  # more improve routing little


def check_adapters(
    folders: Sequence[Path],
    config: Path | None,
    parity: bool,
    *,
    fields: JsonObject,
    samples: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print whether the adapters at `folders` can be published, or every reason why not. Exit with 1 if one cannot.

    These are the ones that `publish` finds there. `fields`: as a request to publish has them. `samples`: a training
    file whose samples come instead of the folder's. `parity`: also compare the log probabilities with those of PEFT.
    `as_json`: print an object for scripts.
    """
    label = _make_label(fields)
    found = []
    for folder in folders:
        found += (own := adapter_folders(folder))
        if not own:
            fail(folder_problem(folder))
    if parity and len(found) > 1:
        fail("--parity compares one adapter: give its folder")
    try:
        settings = load_config(config)
        limits = settings.admission.limits
        with TemporaryDirectory() as made:
            if samples is not None:
                Path(made, SAMPLES_FILE).write_bytes(samples_from(samples))
            outcomes = [
                _outcome(
                    adapter.path.resolve(),
                    label if "name" in fields else replace(label, name=adapter.name),
                    settings.served_models,
                    limits,
                    samples_folder=adapter.path if samples is None else Path(made),
                    has_samples=not fields.keys() & {"samples", "ttl_s"},
                )
                for adapter in found
            ]
    except (ValueError, OSError) as exc:
        fail(exc)
    if parity and outcomes[0]["is_fit"]:
        folder = found[0].path.resolve()
        model = settings.served_models.made_for(label.base_model or read_base_model(folder, limits))
        outcomes = [_add_parity(outcomes[0], folder, settings.by_model[model.name].worker_config(), limits)]
    if as_json:
        print_json({"data": outcomes})
    else:
        _print_outcomes(outcomes)
    if not all(outcome["is_fit"] for outcome in outcomes):
        raise typer.Exit(1)
    if parity:
        _check_parity(outcomes[0]["parity"], as_json=as_json)


def folder_problem(folder: Path) -> str:
    """Return why `folder` has no adapter."""
    if not folder.exists():
        return f"{folder}: no such folder"
    if not folder.is_dir():
        return f"{folder}: is a file; give the folder that contains it"
    return f"{folder}: no adapter here, {CONFIG_FILE} is missing"


def _make_label(fields: JsonObject) -> Label:
    """Return the label of a request to publish with these fields. Exit if a server would refuse the request."""
    if not fields:
        return Label("")
    from deployments.api import error_table  # it imports Ray, which takes seconds
    from deployments.api.adapters import AdapterLabel

    try:
        item = AdapterLabel.model_validate(fields).item(files={})
    except ValidationError as exc:
        fail(name_options(str(error_table.validation_error(exc))))
    return Label(
        item.name or "",
        tags=item.tags or (),
        template=item.template,
        base_model=item.base_model,
        contract=item.contract,
    )


def _outcome(
    folder: Path, label: Label, models: ServedModels, limits: Limits, *, samples_folder: Path, has_samples: bool
) -> JsonObject:
    """Return what the check of one folder finds. `has_samples`: whether it is published with any. Raises: OSError."""
    model = models.made_for(label.base_model or read_base_model(folder, limits))
    # Without one, the base model's need not be read.
    has_template = label.template is not None or (folder / TEMPLATE_FILE).exists()
    try:
        admitted = check_folder(
            folder,
            label,
            accepts_base=models.accepted_names,
            module_shapes=None,
            templates=model.known_templates if has_template else None,
            read_contract=partial(_read_contract, context=model.max_model_len),
            limits=limits,
            samples_folder=samples_folder,
        )
    except AdapterRefused as exc:
        return _refusal(label.name, exc)
    file = samples_folder / SAMPLES_FILE
    return {
        "name": label.name,
        "is_fit": True,
        "num_modules": len(admitted.pairs),
        "num_samples": len(admitted.samples) if has_samples else 0,
        "num_lines": count_samples(file.read_bytes()) if has_samples and file.is_file() else 0,
        "warnings": list(admitted.warnings),
    }


def _refusal(name: str, error: AdapterRefused) -> JsonObject:
    return {"name": name, "is_fit": False, "reasons": list(error.reasons)}


def _read_contract(name: str, data: bytes, context: int) -> tuple[str, tuple[str, ...]]:
    from deployments.publishing.contract_files import read_contract  # it imports Ray, which takes seconds

    return read_contract(name, data, context)


def _print_outcomes(outcomes: Sequence[JsonObject]) -> None:
    """Print the outcome for each folder that is fit, each reason with the adapters that it concerns, and counts."""
    refused: dict[str, list[str]] = {}  # names by reason
    for outcome in outcomes:
        if outcome["is_fit"]:
            say(f"{outcome['name']}: {_summary(outcome)}")
        for warning in outcome.get("warnings", ()):
            show_warning(f"warning: {outcome['name']}: {warning}")
        for reason in outcome.get("reasons", ()):
            refused.setdefault(reason, []).append(outcome["name"])
    for reason, names in refused.items():
        show_error(f"{', '.join(names)}: refused: {reason}" if len(outcomes) > 1 else f"refused: {reason}")
    if len(outcomes) > 1:
        num_fit = sum(outcome["is_fit"] for outcome in outcomes)
        err.print(f"{num_fit} fit to publish, {len(outcomes) - num_fit} refused", highlight=False)


def _summary(outcome: JsonObject) -> str:
    num_samples, num_lines = outcome["num_samples"], outcome["num_lines"]
    parts = [counted(outcome["num_modules"], "module"), counted(num_samples, "sample")]
    if num_lines > num_samples:
        parts[-1] += f" of {num_lines}, spread over the file"
    hint = ""
    if not num_samples:
        hint = ", but auto cannot find it: add lora_samples.jsonl or description.txt"
    elif num_samples < _ENOUGH_SAMPLES:
        hint = f"; auto finds it more reliably with {_ENOUGH_SAMPLES} samples"
    return f"{', '.join(parts)}, fit to publish{hint}"


def _add_parity(
    outcome: JsonObject, folder: Path, config: NativeWorkerConfig | VllmWorkerConfig, limits: Limits
) -> JsonObject:
    """Return the outcome with the differences from PEFT, None for one that is no number. Exit if there are none."""
    from deployments.cli.peft_parity import parity_with_peft  # transformers takes seconds to import

    try:
        with err.status("loading the base model twice"):
            differences = parity_with_peft(folder, config, limits)
    except AdapterRefused as exc:  # the shapes of the base model's layers were not known before
        return _refusal(outcome["name"], exc)
    except GpuWorkerError as exc:
        fail(exc)
    numbers = {strategy: value if math.isfinite(value) else None for strategy, value in differences.items()}
    return outcome | {"parity": numbers}


def _check_parity(differences: Mapping[str, float | None], *, as_json: bool) -> None:
    """Print the differences from PEFT as a table, unless `as_json`. Exit with 1 if one is too large."""
    from deployments.cli.peft_parity import TOLERANCE

    title = f"log probabilities compared with PEFT in float32, at most {TOLERANCE:g}"
    table = Table("strategy", "largest difference", title=title)
    for strategy, difference in differences.items():
        table.add_row(strategy, "not a number" if difference is None else f"{difference:.1e}")
    if not as_json:
        out.print(table)
    failed = [name for name, difference in differences.items() if difference is None or difference > TOLERANCE]
    if failed:
        fail(f"{', '.join(failed)} differ from PEFT by more than {TOLERANCE:g}")
