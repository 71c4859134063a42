"""What a folder must be before it is stored as an adapter. Every refusal is named, and all of them are told at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lora_store.adapter import LOCAL_TENANT, ModuleWeights, Sample, is_valid_name
from lora_store.bounded_files import Limits, read_tensors
from lora_store.errors import AdapterRefused, FileRefused
from lora_store.peft_config import PeftConfig, read_config
from lora_store.peft_files import PICKLE_FILE, WEIGHTS_FILE, Side, pair_modules, pairs_of, split_key
from lora_store.records import VISIBILITIES, Visibility
from lora_store.sample_files import read_description, read_samples

TEMPLATES = ("alpaca", "chat")
MAX_TAGS = 32
_CHECKED_NUMBERS = 1 << 20  # at once

Shapes = Mapping[str, tuple[int, int]]
Pairs = Mapping[str, dict[Side, Tensor]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Label:
    """What the publisher says about an adapter beside its folder."""

    name: str
    tenant: str = LOCAL_TENANT
    tags: tuple[str, ...] = ()
    template: str | None = None
    visibility: Visibility = "public"

    def problems(self) -> Iterator[str]:
        """What is wrong with it, named."""
        for what, value in [("name", self.name), ("tenant", self.tenant), *(("tag", tag) for tag in self.tags)]:
            if not is_valid_name(value):
                yield f"{what} {value[:100]!r} must be 1 to 64 of A-Z a-z 0-9 . _ - and not 'auto', '.' or '..'"
        if len(self.tags) > MAX_TAGS:
            yield f"has {len(self.tags)} tags, at most {MAX_TAGS}"
        if self.template is not None and self.template not in TEMPLATES:
            yield f"template must be one of {', '.join(TEMPLATES)}, got {self.template[:100]!r}"
        if self.visibility not in VISIBILITIES:
            yield f"visibility must be one of {', '.join(VISIBILITIES)}, got {self.visibility!r}"


@dataclass(frozen=True, slots=True)
class Admitted:
    """What passed. A folder with a description and no samples has the description as its one sample."""

    modules: dict[str, ModuleWeights]
    samples: tuple[Sample, ...]
    base_model: str


def check_folder(
    folder: Path,
    label: Label | None = None,
    *,
    accepts_base: Collection[str],
    module_shapes: Shapes | None,
    limits: Limits | None = None,
) -> Admitted:
    """The folder's adapter. `module_shapes`: (out, in) of each linear layer an adapter may change, None = not checked.

    Raises: AdapterRefused, with every reason found.
    """
    label, limits = label or Label(folder.name), limits or Limits()
    reasons = [*label.problems(), *_folder_problems(folder, limits)]
    config = _attempt(reasons, lambda: read_config(folder, limits))
    tensors = _attempt(reasons, lambda: read_tensors(folder / WEIGHTS_FILE, limits))
    samples = _attempt(reasons, lambda: read_samples(folder, limits))
    description = _attempt(reasons, lambda: read_description(folder, limits))
    if config is not None:
        reasons += _config_problems(config, accepts_base)
    pairs = pairs_of(tensors or {})
    if tensors is not None:
        reasons += _tensor_problems(tensors, pairs, module_shapes, limits)
        # Only real module paths meet the config's patterns: a made-up one could be shaped to make matching slow.
        known = {name: pair for name, pair in pairs.items() if module_shapes is None or name in module_shapes}
        reasons += _scaling_problems(config, known) if config is not None else []
    if reasons or config is None:
        raise AdapterRefused(label.name[:100], _bounded(reasons, limits.max_reasons))
    described = (Sample(description),) if description else ()
    return Admitted(pair_modules(config, pairs), samples or described, config.base_model or "")


def _attempt(reasons: list[str], read: Callable[[], T]) -> T | None:
    """What `read` gives, or None with the reasons it was refused for added to `reasons`."""
    try:
        return read()
    except FileRefused as exc:
        reasons += [f"{exc.file}: {problem}" for problem in exc.problems]
        return None


def _folder_problems(folder: Path, limits: Limits) -> Iterator[str]:
    if not os.path.isdir(folder):
        yield f"{folder.name!r} is not a folder"
        return
    try:
        entries = os.scandir(folder)
    except OSError as exc:
        yield f"{folder.name!r} cannot be read: {exc.strerror}"
        return
    with entries:
        for count, entry in enumerate(entries, start=1):
            if count > limits.max_files:
                yield f"the folder holds more than {limits.max_files} files"
                return
            if entry.is_symlink():
                yield f"{entry.name!r} is a symbolic link: copy the file itself"
            if entry.name == PICKLE_FILE:
                yield f"{PICKLE_FILE} is a pickle, which runs code when read: save it as {WEIGHTS_FILE} and remove it"


def _config_problems(config: PeftConfig, accepts_base: Collection[str]) -> Iterator[str]:
    yield from config.unsupported
    if config.base_model not in accepts_base:
        accepted = ", ".join(sorted(accepts_base)) or "none"
        yield f"base model {str(config.base_model)[:200]!r} is not accepted here (accepted: {accepted})"


def _tensor_problems(
    tensors: Mapping[str, Tensor], pairs: Pairs, shapes: Shapes | None, limits: Limits
) -> Iterator[str]:
    if not tensors:
        yield f"{WEIGHTS_FILE}: holds no tensors"
    for key, tensor in tensors.items():
        if split_key(key) is None:
            yield f"tensor {key[:200]!r} {_what_it_is(key)}"
        elif not _is_finite(tensor):
            yield f"tensor {key[:200]!r} holds NaN or infinity"
    for module, pair in pairs.items():
        yield from (f"module {module[:200]!r} {problem}" for problem in _pair_problems(module, pair, shapes, limits))
    if pairs and not any(_largest(pair["lora_b"]) for pair in pairs.values() if "lora_b" in pair):
        yield "every lora_B is zero: the adapter would change nothing"


def _is_finite(tensor: Tensor) -> bool:
    """Whether every number is, looked at in parts: the masks of a large tensor would be as large again."""
    return all(bool(torch.isfinite(part).all()) for part in _parts(tensor))


def _largest(tensor: Tensor) -> float:
    """The largest absolute value, 0 of no numbers."""
    return max((float(part.abs().max()) for part in _parts(tensor)), default=0.0)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    numbers = tensor.flatten()
    yield from (numbers[start : start + _CHECKED_NUMBERS] for start in range(0, len(numbers), _CHECKED_NUMBERS))


def _what_it_is(key: str) -> str:
    if "lora_embedding_" in key or key.endswith(("embed_tokens.weight", "lm_head.weight")):
        return "adds or changes vocabulary, which is not served"
    if "lora_magnitude_vector" in key:
        return "belongs to DoRA, which is not served"
    if key.endswith(".bias"):
        return "is a bias, which is not served"
    if ".modules_to_save." in key:
        return "is a fully trained module, which is not served"
    return "is no LoRA tensor of a linear layer"


def _pair_problems(module: str, pair: Mapping[Side, Tensor], shapes: Shapes | None, limits: Limits) -> Iterator[str]:
    if shapes is not None and module not in shapes:
        yield f"is no linear layer of the base model that can be adapted (tensors {', '.join(sorted(pair))})"
    if len(pair) < 2:
        yield "has lora_A but no lora_B" if "lora_a" in pair else "has lora_B but no lora_A"
        return
    a, b = tuple(pair["lora_a"].shape), tuple(pair["lora_b"].shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        yield f"has lora_A {a} and lora_B {b}, which do not fit each other as (rank, in) and (out, rank)"
        return
    if not 1 <= a[0] <= limits.max_rank:
        yield f"has rank {a[0]}, must be 1 to {limits.max_rank}"
    if shapes is not None and module in shapes and (b[0], a[1]) != shapes[module]:
        yield f"maps {a[1]} to {b[0]}, the base model's layer maps {shapes[module][1]} to {shapes[module][0]}"


def _scaling_problems(config: PeftConfig, pairs: Pairs) -> Iterator[str]:
    for name, pair in pairs.items():
        if len(pair) < 2 or pair["lora_a"].ndim != 2 or not pair["lora_a"].shape[0]:
            continue  # named by _pair_problems
        rank, wanted = pair["lora_a"].shape[0], config.rank_of(name)
        if rank != wanted:
            yield f"module {name[:200]!r} has rank {rank}, adapter_config.json gives it {wanted}"
        largest = _largest(pair["lora_b"])
        if not abs(config.scaling_of(name, rank)) * largest <= torch.finfo(pair["lora_b"].dtype).max:
            yield f"module {name[:200]!r} overflows its dtype once scaled by lora_alpha / rank"


def _bounded(reasons: Sequence[str], most: int) -> list[str]:
    rest = len(reasons) - most
    return [*reasons[:most], f"and {rest} more"] if rest > 0 else list(reasons)
