"""Read tensor names that other tools write as PEFT's, and explain in one reason those that cannot be read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from lora_store.peft_files import WEIGHTS_FILE, split_key
from lora_store.tensor_paths import MAX_NAME, MOST_ADDED, WRAPPERS, inner_path, tensor_key

_NUM_SHOWN = 3
_VOCABULARY = re.compile(r"\.lora_embedding_|(^|\.)(embed_tokens|embed_in|wte|word_embeddings|lm_head|embed_out)\.")
_OTHER_PARTS = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|connector|audio_tower|embed_vision|embed_audio)\."
)
_LORA = re.compile(r"(.+)\.lora_([AB])(?:(?:\.[A-Za-z0-9_-]+)?\.weight)?")
_REORDERED_BY_TORCHTUNE = re.compile(r".+\.[qk]_proj\.lora_[ab]\.weight")
_READABLE = re.compile(  # the second form is MLX's, the third torchtune's
    r"(.+)\.lora_(?:([AB])(?:\.([A-Za-z0-9_-]+))?\.weight|([ab])|([ab])\.weight)"
)
_FROM_TORCHTUNE = {"attn": "self_attn", "output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_PEFT_PREFIX = "base_model.model."
_OLD_BLOCK = (".block_sparse_moe.", ".mlp.")  # what held Mixtral's router and experts in transformers 4, and now
_OLD_ROUTER = ".layer"  # ends the name of GraniteMoE's router in transformers 4


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a tensor with another name than PEFT's is read."""

    name: str  # PEFT's, of this base
    module: str  # the name in the base model
    path: str  # its name in the trained model, which the patterns of the config match
    adapter: str | None  # the adapter's name, if the tensor's has one
    is_transposed: bool


def read_names(keys: Collection[str], modules: Collection[str] | None) -> dict[str, Spelling]:
    """Return how each tensor is read whose name is not PEFT's but can only mean one module of the base.

    The names may differ in wrappers of torch, in an adapter's name, in what surrounds the layers, and in MLX's endings.
    `modules`: those of the base. None if they are not known; then what surrounds the layers is kept.
    """
    by_tail: dict[str, str | None] = {}
    for known in modules or ():
        tail = inner_path(known.split("."))
        by_tail[tail] = None if tail in by_tail else known
    found = {}
    for key in keys:
        match = None if len(key) > MAX_NAME or _is_known(key, modules) else _READABLE.fullmatch(key)
        if match is None:
            continue
        parts = [part for part in match[1].split(".") if part not in WRAPPERS]
        if match[5]:
            parts = [_FROM_TORCHTUNE.get(part, part) for part in parts]
        path = ".".join(parts).rpartition(_PEFT_PREFIX)[2]
        tail = inner_path(parts)
        tails = tail, tail.replace(*_OLD_BLOCK), tail.removesuffix(_OLD_ROUTER)
        module = path if modules is None else next(filter(None, map(by_tail.get, tails)), None)
        name = tensor_key(module or "", (match[2] or match[4] or match[5]).upper())
        if module and split_key(name) and len(path) <= len(module) + MOST_ADDED:
            found[key] = Spelling(name, module, path, match[3], is_transposed=match[4] is not None)
    return found


def unreadable(keys: Collection[str], read: Mapping[str, Spelling]) -> Iterator[str]:
    """Yield why the tensors cannot be read as `read` says: two are one tensor of PEFT's, or belong to two adapters."""
    num = Counter(read[key].name if key in read else key for key in keys)
    for name in sorted(name for name, count in num.items() if count > 1)[:_NUM_SHOWN]:
        both = sorted(key for key in keys if (read[key].name if key in read else key) == name)
        yield f"{WEIGHTS_FILE}: {_list_names(both, ' and ')} are the same tensor: keep one of them"
    adapters = {read[key].adapter if key in read else None for key in keys if split_key(key) or key in read}
    if len(adapters) > 1:
        names = _list_names([name or "no name" for name in adapters])
        yield f"{WEIGHTS_FILE}: has tensors of several adapters ({names}): save one adapter a folder"


def describe_reading(read: Mapping[str, Spelling]) -> Iterator[str]:
    """Yield what the publisher should know of the names that were read as others."""
    if read:
        key = min(read)
        count = f"{len(read)} tensor name" + ("s" if len(read) > 1 else "")
        yield f"{count} of another tool read as PEFT's: {key[:200]!r} read as {read[key].name!r}"


def other_part_tensors(keys: Collection[str], modules: Collection[str] | None) -> list[str]:
    """Return the tensors that adapt the vision or audio part of a multimodal model."""
    return [key for key in keys if _OTHER_PARTS.search(key) and not (modules is not None and _is_known(key, modules))]


def explain_other_parts(keys: Collection[str]) -> Iterator[str]:
    """Yield the reason why these tensors are refused, if there are any."""
    if keys:
        yield (
            f"{len(keys)} tensors adapt the vision or audio part of a multimodal model ({min(keys)[:200]!r}); only its"
            " text part is served: train with target_modules of the language model only"
        )


def explain_torchtune(keys: Collection[str]) -> Iterator[str]:
    """Yield the reason why tensors in torchtune's own format are refused, if there are any."""
    plain = {key: ".".join(part for part in key.split(".") if part not in WRAPPERS) for key in keys}
    if found := [key for key, name in plain.items() if _REORDERED_BY_TORCHTUNE.fullmatch(name)]:
        yield (
            f"{WEIGHTS_FILE}: {len(found)} tensors have torchtune's own format ({min(found)[:200]!r}), which orders the"
            " rows of queries and keys otherwise for some models: let torchtune save the adapter in PEFT's format"
        )


def vocabulary_tensors(keys: Collection[str], modules: Collection[str] | None) -> list[str]:
    """Return the tensors that adapt the embedding or the output head. `modules`: those an adapter may change."""
    return [key for key in keys if _VOCABULARY.search(key) and not _is_known(key, modules)]


def explain_vocabulary(keys: Collection[str]) -> Iterator[str]:
    """Yield the reason why these tensors are refused, if there are any."""
    if keys:
        yield (
            f"the adapter adds or changes vocabulary ({_list_names(keys)}), which is not supported: leave the embedding"
            " and the output head out of target_modules and modules_to_save"
        )


def misnamed_tensors(keys: Collection[str], modules: Collection[str] | None) -> dict[str, str]:
    """Return PEFT's name for each tensor of the base's modules that has another one.

    `modules`: those of the base, None if they are not known.
    """
    by_tail = _tails(modules) if modules is not None else None
    found = {}
    for key in keys:
        wanted = None if len(key) > MAX_NAME or _is_known(key, modules) else _name_for_peft(key, by_tail)
        if wanted is not None and wanted != key:
            found[key] = wanted
    return found


def explain_names(misnamed: dict[str, str], num_tensors: int) -> Iterator[str]:
    """Yield the reason why these tensors are refused, if there are any."""
    if not misnamed:
        return
    count = f"all {num_tensors}" if len(misnamed) == num_tensors else f"{len(misnamed)} of {num_tensors}"
    key, wanted = min(misnamed.items())
    beginnings = {_beginnings(*item) for item in misnamed.items()}
    what = "are not those that PEFT gives them"
    if len(beginnings) == 1 and (shared := beginnings.pop()) is not None:
        found, right = shared
        what = f"begin with {found!r}; the names of this base begin with {right!r}"
    yield (
        f"{WEIGHTS_FILE}: {count} tensor names {what}: {key!r} must be {wanted!r}. Save the adapter with"
        " PEFT's save_pretrained, or rename its tensors"
    )


def _list_names(names: Collection[str], separator: str = ", ") -> str:
    """Return the first of these names in their order, and how many others there are."""
    shown = separator.join(repr(name[:200]) for name in sorted(names)[:_NUM_SHOWN])
    return shown + (f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else "")


def _is_known(key: str, modules: Collection[str] | None) -> bool:
    split = split_key(key)
    if split is None or modules is not None:
        return split is not None and modules is not None and split[0] in modules
    return not _VOCABULARY.search(key) and WRAPPERS.isdisjoint(split[0].split("."))


def _name_for_peft(key: str, by_tail: dict[str, str] | None) -> str | None:
    """Return PEFT's name of the tensor, or None if the base has no such module."""
    match = _LORA.fullmatch(key)
    if match is None:
        return None
    parts = [part for part in match[1].split(".") if part not in WRAPPERS]
    if by_tail is None:
        _, prefix, rest = ".".join(parts).rpartition(_PEFT_PREFIX)
        module: str | None = rest if prefix else ".".join(parts)
    else:
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        module = next((by_tail[tail] for tail in tails if tail in by_tail), None)
    return None if not module else tensor_key(module, match[2])


def _tails(modules: Collection[str]) -> dict[str, str]:
    """Return each module by the ends of its path that begin with a name and contain a layer's number."""
    found: dict[str, str] = {}
    for module in modules:
        parts = module.split(".")
        for start in range(len(parts)):
            if not parts[start].isdigit() and any(part.isdigit() for part in parts[start:]):
                found[".".join(parts[start:])] = module
    return found


def _beginnings(key: str, wanted: str) -> tuple[str, str] | None:
    """Return the names' beginnings, up to the first part from which they are equal; None if they end differently."""
    found, right = key.split("."), wanted.split(".")
    same = 0
    while same < min(len(found), len(right)) and found[-1 - same] == right[-1 - same]:
        same += 1
    if not same:
        return None
    return ".".join(found[: len(found) - same + 1]) + ".", ".".join(right[: len(right) - same + 1]) + "."
