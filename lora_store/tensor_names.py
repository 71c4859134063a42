"""Explain, in one reason, tensors that other tools have named otherwise than PEFT does, and adapted vocabularies."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from lora_store.peft_files import WEIGHTS_FILE, split_key, tensor_key

_NUM_SHOWN = 3
_MAX_NAME = 500  # longer names are not explained
_VOCABULARY = re.compile(r"\.lora_embedding_|(^|\.)(embed_tokens|embed_in|wte|word_embeddings|lm_head|embed_out)\.")
_LORA = re.compile(r"(.+)\.lora_([abAB])(?:(?:\.[A-Za-z0-9_-]+)?\.weight)?")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of torch, around a module


def vocabulary_tensors(keys: Collection[str], modules: Collection[str] | None) -> list[str]:
    """Return the tensors that adapt the embedding or the output head. `modules`: those an adapter may change."""
    return [key for key in keys if _VOCABULARY.search(key) and not _is_known(key, modules)]


def explain_vocabulary(keys: Collection[str]) -> Iterator[str]:
    """Yield the reason why these tensors are refused, if there are any."""
    if keys:
        shown = ", ".join(repr(key[:200]) for key in sorted(keys)[:_NUM_SHOWN])
        rest = f" and {len(keys) - _NUM_SHOWN} more" if len(keys) > _NUM_SHOWN else ""
        yield (
            f"the adapter adds or changes vocabulary ({shown}{rest}), which is not supported: leave the embedding and"
            " the output head out of target_modules and modules_to_save"
        )


def misnamed_tensors(keys: Collection[str], modules: Collection[str] | None) -> dict[str, str]:
    """Return PEFT's name for each tensor of the base's modules that has another one.

    `modules`: those of the base, None if they are not known.
    """
    by_tail = _tails(modules) if modules is not None else None
    found = {}
    for key in keys:
        wanted = None if len(key) > _MAX_NAME or _is_known(key, modules) else _name_for_peft(key, by_tail)
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
    transposed = " (and transposed, where MLX wrote them)" if ".lora_a" in key or ".lora_b" in key else ""
    yield (
        f"{WEIGHTS_FILE}: {count} tensor names {what}: {key!r} must be {wanted!r}{transposed}. Save the adapter with"
        " PEFT's save_pretrained, or rename its tensors"
    )


def _is_known(key: str, modules: Collection[str] | None) -> bool:
    split = split_key(key)
    if split is None or modules is not None:
        return split is not None and modules is not None and split[0] in modules
    return not _VOCABULARY.search(key) and _WRAPPERS.isdisjoint(split[0].split("."))


def _name_for_peft(key: str, by_tail: dict[str, str] | None) -> str | None:
    """Return PEFT's name of the tensor, or None if the base has no such module."""
    match = _LORA.fullmatch(key)
    if match is None:
        return None
    parts = [part for part in match[1].split(".") if part not in _WRAPPERS]
    if by_tail is None:
        _, prefix, rest = ".".join(parts).rpartition("base_model.model.")
        module: str | None = rest if prefix else ".".join(parts)
    else:
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        module = next((by_tail[tail] for tail in tails if tail in by_tail), None)
    return None if not module else tensor_key(module, match[2].upper())


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
