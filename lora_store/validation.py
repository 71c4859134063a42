"""Validate a folder before it is stored as an adapter. An error lists every reason at once."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from lora_store.adapter import LOCAL_TENANT, ModuleWeights, Sample, Shapes, is_valid_name
from lora_store.bounded_files import Limits, group_problems, read_tensors
from lora_store.contract_files import GIVEN, MAX_CONTRACT_BYTES, ReadContract, read_contract_file
from lora_store.errors import AdapterRefused, FileRefused
from lora_store.expert_tensors import read_experts
from lora_store.peft_config import CONFIG_FILE, PeftConfig, read_config
from lora_store.peft_files import (
    MLX_WEIGHTS_FILE,
    PICKLE_FILE,
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    Side,
    is_only_for_training,
    pair_modules,
    pair_tensors,
    read_template,
    split_key,
)
from lora_store.records import VISIBILITIES, Visibility
from lora_store.safetensors_layout import StoredModule, StoredTensor
from lora_store.sample_files import read_description, read_samples
from lora_store.tensor_names import (
    Spelling,
    describe_reading,
    explain_names,
    explain_other_parts,
    explain_torchtune,
    explain_vocabulary,
    misnamed_tensors,
    other_part_tensors,
    read_names,
    unreadable,
    vocabulary_tensors,
)

NEVER_TRAINED = "every lora_B is zero, so its answers are the base model's: was it trained?"
TEMPLATES = ("alpaca", "chat")
SERVER_TEMPLATE = "server"  # in a label: the adapter names none, whatever its folder brings
NO_CHAT_TEMPLATE = (
    "template 'chat': the base model has no chat template; use template 'alpaca', or let the operator set chat_template"
)
MAX_TAGS = 32
_SHOWN_FOLDERS = 5
_QUANTISED = re.compile(r"[48]-?bit|gptq|awq", re.IGNORECASE)

Pairs = Mapping[str, dict[Side, StoredTensor]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Label:
    """The publisher's metadata for an adapter, in addition to its folder.

    `base_model`: the base that it was trained on, instead of the one that its folder names. `contract`: JSON, instead
    of the folder's; "" for none.
    """

    name: str
    tenant: str = LOCAL_TENANT
    tags: tuple[str, ...] = ()
    template: str | None = None
    visibility: Visibility = "public"
    base_model: str | None = None
    contract: str | None = None

    def problems(self) -> Iterator[str]:
        """Yield every problem of the label, naming the field."""
        for what, value in [("name", self.name), ("tenant", self.tenant), *(("tag", tag) for tag in self.tags)]:
            if not is_valid_name(value):
                yield (
                    f"{what} {value[:100]!r} must be 1 to 64 of A-Z a-z 0-9 . _ - and not 'auto', '.' or '..'"
                    f"{_suggestion(value)}"
                )
        if len(self.tags) > MAX_TAGS:
            yield f"tags: at most {MAX_TAGS}, got {len(self.tags)}"
        allowed = (*TEMPLATES, SERVER_TEMPLATE)
        if self.template is not None and self.template not in allowed:
            yield f"template must be one of {', '.join(allowed)}, got {self.template[:100]!r}"
        if self.visibility not in VISIBILITIES:
            yield f"visibility must be one of {', '.join(VISIBILITIES)}, got {self.visibility!r}"
        num_bytes = len((self.contract or "").encode(errors="replace"))
        if num_bytes > MAX_CONTRACT_BYTES:
            yield f"contract: has {num_bytes} bytes, at most {MAX_CONTRACT_BYTES} are allowed; shorten it"


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """The content of a valid folder. Without samples, a description is the only sample."""

    config: PeftConfig
    pairs: Pairs
    samples: tuple[Sample, ...]
    base_model: str
    template: str | None = None  # named by the publisher, or the known one that the folder's chat template equals
    contract: str | None = None  # JSON, given by the publisher or of the folder's file
    is_described: bool = False  # its only sample is the description
    warnings: tuple[str, ...] = ()  # what its publisher should know
    paths: Mapping[str, str] = field(default_factory=dict)  # in the model that was trained, of modules with another one

    @property
    def stored(self) -> dict[str, StoredModule]:
        """The LoRA pairs by module path. A server that publishes them needs no torch."""
        return pair_modules(StoredModule, self.config, self.pairs, self.paths)

    @property
    def modules(self) -> dict[str, ModuleWeights]:
        """The same pairs as tensors of torch."""
        tensors = {name: {side: item.tensor() for side, item in pair.items()} for name, pair in self.pairs.items()}
        return pair_modules(ModuleWeights, self.config, tensors, self.paths)


def check_folder(
    folder: Path,
    label: Label | None = None,
    *,
    accepts_base: Collection[str],
    module_shapes: Shapes | None,
    templates: Mapping[str, str] | None = None,
    read_contract: ReadContract | None = None,
    limits: Limits | None = None,
    is_private: bool = False,
    samples_folder: Path | None = None,
) -> CheckedFolder:
    """Read and validate the folder's adapter. `is_private`: no other process can change the folder meanwhile.

    `samples_folder`: where its samples file is; default: in the folder.

    `module_shapes`: those of all modules that an adapter may change; None skips this check.
    `templates`: the names of the known chat templates, by digest; None skips this check. `read_contract`: how contracts
    are read; None ignores them.
    Raises: AdapterRefused, which lists every reason found.
    """
    label, limits = label or Label(folder.name), limits or Limits()
    if wrong_place := _wrong_place(folder, limits):
        raise AdapterRefused(label.name[:100], [*label.problems(), wrong_place])
    reasons = [*label.problems(), *_folder_problems(folder, limits)]
    config = _attempt(reasons, lambda: read_config(folder, limits))
    tensors = _attempt(reasons, lambda: read_tensors(_weights_file(folder), limits, is_private=is_private))
    samples = _attempt(reasons, lambda: read_samples(samples_folder or folder, limits))
    description = _attempt(reasons, lambda: read_description(folder, limits))
    template = _attempt(reasons, lambda: _choose_template(folder, label, templates, limits))
    if lacks_chat_template(template, templates):
        reasons.append(NO_CHAT_TEMPLATE)
    contract, notes = _attempt(reasons, lambda: _find_contract(folder, label, read_contract)) or (None, ())
    base_model = (config.base_model if config is not None else None) if label.base_model is None else label.base_model
    if config is not None:
        reasons += [*config.unsupported, *_base_problems(base_model, label, accepts_base)]
    pairs: Pairs = {}
    read: dict[str, Spelling] = {}
    paths: dict[str, str] = {}
    if tensors is not None and (config is None or config.is_lora):
        expert_paths: frozenset[str] = frozenset()
        of_experts: Mapping[str, StoredTensor] = {}
        if not tensors:
            reasons.append(f"{WEIGHTS_FILE}: has no tensors")
        if config is not None:
            experts = read_experts(tensors, config, module_shapes, limits.max_weights_bytes)
            config, of_experts, expert_paths = experts.config, experts.tensors, experts.paths
            notes = (*experts.notes, *notes)
            reasons += [f"{WEIGHTS_FILE}: {problem}" for problem in experts.problems]
            tensors = {key: tensor for key, tensor in tensors.items() if key not in experts.keys}
        read, explained = _read_names(reasons, tensors, module_shapes)
        named = {key: tensor for key, tensor in tensors.items() if key not in explained and key not in read}
        for key, spelling in read.items():
            is_turned = spelling.is_transposed and tensors[key].ndim == 2
            named[spelling.name] = tensors[key].transposed() if is_turned else tensors[key]
        named |= of_experts
        paths = {spelling.module: spelling.path for spelling in read.values() if spelling.module != spelling.path}
        pairs = pair_tensors(named)
        reasons += _tensor_problems(named, pairs, module_shapes, limits)
        # Match the config's patterns with real module paths only: a crafted one could make matching slow.
        known = {name: pair for name, pair in pairs.items() if module_shapes is None or name in module_shapes}
        if config is not None:
            paths |= {name: f"{name}.weight" for name in known if config.is_bare_parameter(name)}
            reasons += group_problems("module", _scaling_problems(config, known, paths))
            reasons += _pattern_problems(config, paths, [*known, *expert_paths])
    if reasons or config is None:
        raise AdapterRefused(label.name[:100], _shortened(reasons, limits.max_reasons))
    described = (Sample(description),) if description else ()
    untrained = () if any(_largest(pair["lora_b"]) for pair in pairs.values()) else (NEVER_TRAINED,)
    return CheckedFolder(
        config,
        pairs,
        samples or described,
        base_model or "",
        template,
        contract,
        is_described=bool(described and not samples),
        warnings=(*describe_reading(read), *notes, *untrained),
        paths=paths,
    )


def _choose_template(folder: Path, label: Label, templates: Mapping[str, str] | None, limits: Limits) -> str | None:
    """Return the publisher's template, or the known one that the folder brings. Raises: FileRefused."""
    digest = read_template(folder, limits)
    if label.template == SERVER_TEMPLATE:
        return None
    if label.template is not None or digest is None or templates is None:
        return label.template
    if digest not in templates:
        choices = "template 'chat' to use the base model's own, or 'alpaca'" if templates else "template 'alpaca'"
        problem = (
            f"is not the chat template that this server uses, and uploaded templates never run (sha256 {digest[:12]}):"
            f" publish with {choices}, or let the operator set chat_template to this file"
        )
        raise FileRefused(TEMPLATE_FILE, [problem])
    return templates[digest]


def lacks_chat_template(template: str | None, templates: Mapping[str, str] | None) -> bool:
    """Return whether this is the base model's chat template, and none is known. `templates`: None if nobody knows."""
    return template == "chat" and templates is not None and not templates


def _find_contract(folder: Path, label: Label, read: ReadContract | None) -> tuple[str | None, tuple[str, ...]]:
    """Return the publisher's contract, or the folder's, with what the publisher should know. Raises: FileRefused."""
    if read is None or label.contract == "":
        return None, ()
    return read_contract_file(folder, read) if label.contract is None else read(GIVEN, label.contract.encode())


def _suggestion(name: str) -> str:
    """Return the nearest valid name as a hint, or ""."""
    letters = unicodedata.normalize("NFKD", name[:200]).encode("ascii", "ignore").decode()
    nearest = re.sub(r"[^A-Za-z0-9._]+", "-", letters).strip("-")[:64]
    return f", such as {nearest!r}" if is_valid_name(nearest) else ""


def _attempt(reasons: list[str], read: Callable[[], T]) -> T | None:
    """Return what `read` returns; if it refuses a file, add the problems to `reasons` and return None."""
    try:
        return read()
    except FileRefused as exc:
        reasons += [f"{exc.file}: {problem}" for problem in exc.problems]
        return None


def _wrong_place(folder: Path, limits: Limits) -> str | None:
    """Return why this path cannot be an adapter folder, or None if it may be one."""
    if os.path.isfile(folder):
        return f"{folder.name!r} is a file: give the folder that contains it"
    if not os.path.isdir(folder):
        return f"{folder.name!r} is not a folder"
    nested = [] if os.path.lexists(folder / CONFIG_FILE) else _nested_adapters(folder, limits)
    if not nested:
        return None
    shown = ", ".join(nested[:_SHOWN_FOLDERS]) + (", …" if len(nested) > _SHOWN_FOLDERS else "")
    return f"{folder.name!r} is not an adapter folder; it contains adapters in {shown}: give one of these"


def _nested_adapters(folder: Path, limits: Limits) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            children = list(islice(entries, limits.max_files))
    except OSError:
        return []  # reported by _folder_problems
    folders = [child for child in children if child.is_dir(follow_symlinks=False)]
    return sorted(child.name for child in folders if os.path.lexists(os.path.join(child.path, CONFIG_FILE)))


def _folder_problems(folder: Path, limits: Limits) -> Iterator[str]:
    try:
        entries = os.scandir(folder)
    except OSError as exc:
        yield f"{folder.name!r} cannot be read: {exc.strerror}"
        return
    with entries:
        for count, entry in enumerate(entries, start=1):
            if count > limits.max_files:
                yield f"the folder has more than {limits.max_files} files: keep only those of the adapter"
                return
            if entry.is_symlink():
                yield f"{entry.name!r} is a symbolic link: replace it by the file"
            if entry.name == PICKLE_FILE:
                yield f"{PICKLE_FILE} is a pickle, which runs code when read: save {WEIGHTS_FILE} instead and remove it"


def _base_problems(base_model: str | None, label: Label, accepts_base: Collection[str]) -> Iterator[str]:
    if base_model in accepts_base:
        return
    names = [name for name in sorted(accepts_base) if not os.path.isabs(name)]  # clients need no path of the server
    accepted = ", ".join(map(repr, names)) or "no base model"
    remedy = "publish it with --base-name and the name that the server accepts (over HTTP: the field base_model)"
    if label.base_model is not None:
        yield f"base_model {label.base_model[:200]!r} is none that this server accepts: {accepted}"
    elif not base_model:
        yield (
            f"{CONFIG_FILE} names no base model (base_model_name_or_path); this server accepts {accepted}: if it was"
            f" trained on one of these, {remedy}"
        )
    else:
        yield _other_base(base_model, accepted, remedy)


def _other_base(base_model: str, accepted: str, remedy: str) -> str:
    copy = compare = ""
    if _QUANTISED.search(base_model):
        copy = " It is a quantised copy; its adapters usually work on the full model."
        compare = ", and compare with `loraretriever publish --dry-run FOLDER --parity`"
    return (
        f"the adapter names {base_model[:200]!r} as its base model; this server accepts {accepted}.{copy}"
        f" If they are the same weights, {remedy}, or let the operator add yours to the setting accepts_base{compare}"
    )


def _weights_file(folder: Path) -> Path:
    """Return PEFT's file, or MLX's if there is no other."""
    names = (WEIGHTS_FILE, MLX_WEIGHTS_FILE)
    return folder / next((name for name in names if os.path.lexists(folder / name)), WEIGHTS_FILE)


def _read_names(
    reasons: list[str], tensors: Mapping[str, StoredTensor], shapes: Shapes | None
) -> tuple[dict[str, Spelling], set[str]]:
    """Return how other tools' names are read, and the tensors that are refused for a reason added to `reasons`."""
    vocabulary = set(vocabulary_tensors(tensors, shapes))
    others = set(other_part_tensors(tensors.keys() - vocabulary, shapes))
    rest = tensors.keys() - vocabulary - others
    torchtune = list(explain_torchtune(rest))
    read = {} if torchtune else read_names(rest, shapes)
    misnamed = {} if torchtune else misnamed_tensors(rest - read.keys(), shapes)
    reasons += [*explain_vocabulary(vocabulary), *explain_other_parts(others), *torchtune]
    reasons += [*explain_names(misnamed, len(tensors)), *unreadable(rest, read)]
    return read, {*(rest if torchtune else ()), *vocabulary, *others, *misnamed}


def _tensor_problems(
    tensors: Mapping[str, StoredTensor], pairs: Pairs, shapes: Shapes | None, limits: Limits
) -> list[str]:
    def of_tensors() -> Iterator[tuple[str, str]]:
        for key, tensor in tensors.items():
            if is_only_for_training(key):
                continue
            if split_key(key) is None:
                yield key, _unsupported_kind(key)
            elif not all(np.isfinite(part).all() for part in tensor.numbers()):
                yield key, "contains NaN or infinity"

    of_modules = (
        (module, problem) for module, pair in pairs.items() for problem in _pair_problems(module, pair, shapes, limits)
    )
    return [*group_problems("tensor", of_tensors()), *group_problems("module", of_modules)]


def _largest(tensor: StoredTensor) -> float:
    """Return the largest absolute value, 0 for an empty tensor; NaN for a tensor with NaN."""
    return max((float(np.abs(part).max()) for part in tensor.numbers()), default=0.0)


def _unsupported_kind(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "belongs to DoRA, which is not supported"
    if key.endswith(".bias"):
        return "is a bias, which is not supported"
    if ".modules_to_save." in key:
        return "is a fully trained module, which is not supported"
    return "is not a LoRA tensor of a linear layer"


def _pair_problems(
    module: str, pair: Mapping[Side, StoredTensor], shapes: Shapes | None, limits: Limits
) -> Iterator[str]:
    if shapes is not None and module not in shapes:
        yield f"is not a linear layer of the base model that can be adapted (tensors {', '.join(sorted(pair))})"
    if len(pair) < 2:
        yield "has lora_A but no lora_B" if "lora_a" in pair else "has lora_B but no lora_A"
        return
    a, b = pair["lora_a"].shape, pair["lora_b"].shape
    num_dims = 2 if shapes is None or module not in shapes else len(shapes[module])
    if shapes is None and len(a) == len(b) == 3:  # experts, read as such
        num_dims = 3
    if len(a) != num_dims or len(b) != num_dims or a[-2] != b[-1]:
        yield f"has lora_A {a} and lora_B {b}; their shapes must be (rank, in) and (out, rank)"
        return
    if not 1 <= a[-2] <= limits.max_rank:
        yield f"has rank {a[-2]}, must be 1 to {limits.max_rank}"
    if shapes is not None and module in shapes and (b[-2], a[-1], *a[:-2]) != shapes[module]:
        yield f"maps {a[-1]} to {b[-2]}, but the base model's layer maps {shapes[module][1]} to {shapes[module][0]}"


def _scaling_problems(config: PeftConfig, pairs: Pairs, paths: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, pair in pairs.items():
        if len(pair) < 2 or pair["lora_a"].ndim not in (2, 3) or not pair["lora_a"].shape[-2]:
            continue  # reported by _pair_problems
        path = paths.get(name, name)
        rank, wanted = pair["lora_a"].shape[-2], config.find_rank(path, name)
        if rank != wanted:
            yield name, f"has rank {rank}, but {CONFIG_FILE} gives it {wanted}"
        largest = _largest(pair["lora_b"])
        if not abs(config.find_scaling(rank, path, name)) * largest <= pair["lora_b"].largest_finite:
            yield name, "overflows its dtype once scaled by lora_alpha / rank"


def _pattern_problems(config: PeftConfig, paths: Mapping[str, str], modules: Sequence[str]) -> Iterator[str]:
    """Yield the patterns of an adapter with other paths that match none of its modules, so that a scaling is lost."""
    for field_name, table in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if paths and (unused := table.without_match([*paths.values(), *modules])):
            yield (
                f"{field_name} has {unused[0][:100]!r}, which matches none of the tensors' modules: remove it, or save"
                " the adapter with PEFT's save_pretrained"
            )


def _shortened(reasons: Sequence[str], most: int) -> list[str]:
    rest = len(reasons) - most
    return [*reasons[:most], f"and {rest} more"] if rest > 0 else list(reasons)
