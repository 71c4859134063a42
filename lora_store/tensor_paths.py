"""Read the path of a module in a tensor's name, whatever torch and transformers put around it."""

from __future__ import annotations

MAX_NAME = 500  # longer names are not read
MOST_ADDED = 64  # characters that a path may have more than the base's; the config's patterns are slow for long ones
# Of torch and Lightning, around a module.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Around all layers: PEFT, transformers' classes, data parallel, and the text part of multimodal models.
_OUTER = {"base_model", "model", "module", "language_model", "text_model"}


def tensor_key(module: str, side: str) -> str:
    """Return PEFT's name of a module's tensor. `side`: A or B."""
    return f"base_model.model.{module}.lora_{side}.weight"


def inner_path(parts: list[str]) -> str:
    """Return the path without what surrounds all layers."""
    start = next((place for place, part in enumerate(parts) if part not in _OUTER), len(parts))
    return ".".join(parts[start:])
