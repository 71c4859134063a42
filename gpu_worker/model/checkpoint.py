"""Refuse a checkpoint that lacks some of its model's weights, which would be random numbers.

transformers fills missing tensors with random numbers and logs a report. vLLM 0.32 refuses missing norms only: linear
layers, embeddings and everything in a quantised model keep what was in memory.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedModel,
    QianfanOCRConfig,
    Qwen3ASRConfig,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.own_families import OWN_CONFIGS

logger = logging.getLogger(__name__)

_NUM_SHOWN = 3
_REMEDY = "Copy the model's files again, and check that config.json belongs to these weights"
_LOADER = "transformers.modeling_utils"  # the logger of its report


def load_whole(source: str, **options: Any) -> PreTrainedModel:
    """Load the model with all its weights. `options`: of transformers' `from_pretrained`.

    Raises: BaseModelUnsupported, which names the tensors that are missing, have another shape or cannot be converted,
    or the files that are missing or broken.
    """
    tensors = _read(weight_files(source), "meta")
    if small := sorted(key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.itemsize == 1):
        raise BaseModelUnsupported(
            f"{source} has weights of 8 bits ({_some(small)}), but no quantization_config in config.json. {_REMEDY}"
        )
    try:
        return _load(AutoModelForCausalLM, source, source, **options)
    except OSError as exc:
        raise BaseModelUnsupported(f"the weights of {source} cannot be read: {exc}") from exc


def read_tensors(source: str) -> dict[str, Tensor]:
    """Read all tensors of the checkpoint into host memory, after downloading those of a model of the hub.

    Raises: BaseModelUnsupported, which names the files that are missing or broken.
    """
    try:
        files = weight_files(source, may_download=True)
    except OSError as exc:
        raise BaseModelUnsupported(f"the weights of {source} cannot be read: {exc}") from exc
    return _read(files, "cpu")


def read_config(source: str) -> Any:
    """Read the model's config.json. Run no code that it names: its own, or a hub's for attention or experts."""
    for each in (QianfanOCRConfig, Qwen3ASRConfig, *OWN_CONFIGS):  # vLLM puts classes of its own there
        AutoConfig.register(each.model_type, each, exist_ok=True)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.update({"_attn_implementation": None, "_experts_implementation": None})
    return config


def load_tensors(source: str, config: Any, tensors: dict[str, Tensor], **options: Any) -> PreTrainedModel:
    """Make the model of this config with these tensors, and with the generation config of `source`.

    `options`: of transformers' `from_pretrained`.
    Raises: BaseModelUnsupported, as `load_whole`.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {module: f"{name}.weight" for name, module in empty.named_modules()}
    head = names.get(empty.get_output_embeddings())
    if getattr(config, "tie_word_embeddings", False) and head in tensors:
        # transformers would draw random numbers for a tied embedding that is not in the file
        tensors.setdefault(names[empty.get_input_embeddings()], tensors[head])
    model = _load(type(empty), None, source, config=config, state_dict=tensors, **options)
    with suppress(OSError):  # a model need not have one
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def check_checkpoint(source: str) -> bool:
    """Check the names and shapes of the tensors in the files, without reading their numbers.

    transformers loads tensors without numbers, so that its renamings, conversions and ties count. In a quantised
    checkpoint, modules with tensors that transformers' class does not have, such as scales, are not compared.
    Return False if nothing was checked: the files are not on this machine, or need a conversion that fails without
    numbers.
    Raises: BaseModelUnsupported, as `load_whole`, and for files of Mistral's own tools that vLLM would read too.
    """
    files = weight_files(source)
    tensors = _read(files, "meta")
    if not tensors:
        return False
    if files[0].name == SAFE_WEIGHTS_NAME and (others := sorted(files[0].parent.glob("consolidated*.safetensors"))):
        # Without an index vLLM loads every *.safetensors of the folder.
        raise BaseModelUnsupported(f"vLLM would read {others[0]} over {SAFE_WEIGHTS_NAME}: remove it, or move it away")
    config = read_config(source)
    quantised = find_quantised(config)
    for part in quantised:
        del part.quantization_config
    with torch.device("meta"):
        model_class = type(auto_class(config).from_config(config, trust_remote_code=False))
    options = {"config": config, "state_dict": tensors, "device_map": {"": "meta"}}
    try:
        _load(model_class, None, source, is_quantised=bool(quantised), **options)
    except RuntimeError:  # vLLM loads with code of its own, which may succeed
        logger.warning("the names of the tensors of %s could not be checked", source, exc_info=True)
        return False
    return True


def find_quantised(config: Any) -> list[Any]:
    """Return those of the whole config and its text config that have a `quantization_config`; vLLM reads both."""
    text = config.get_text_config()
    parts = [config] if text is config else [config, text]
    return [part for part in parts if getattr(part, "quantization_config", None) is not None]


def auto_class(config: Any) -> Any:
    """Return transformers' class that builds and loads a model, with its parts for images and sound if it has them."""
    is_multimodal = config.get_text_config() is not config and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return AutoModelForMultimodalLM if is_multimodal else AutoModelForCausalLM


def weight_files(source: str, *, may_download: bool = False) -> list[Path]:
    """Return the files of weights in this folder; for an id of the model hub those on this machine, none if one lacks.

    `may_download`: fetch those that the cache lacks.
    Raises: BaseModelUnsupported if files are missing that the folder's index names.
    """
    folder = Path(source)

    def find(name: str) -> Path | None:
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        found = cached_file(
            source, name, local_files_only=not may_download, _raise_exceptions_for_missing_entries=False
        )
        return None if found is None else Path(found)

    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (file := find(single)) is not None:
            return [file]
        if (found := find(index)) is not None:
            files = {name: find(name) for name in _shards(found)}
            missing = [name for name, file in files.items() if file is None]
            if missing and folder.is_dir():
                raise BaseModelUnsupported(
                    f"{found} names {len(files)} files, and {len(missing)} of them"
                    f" {'is' if len(missing) == 1 else 'are'} missing ({_some(missing)}). Copy the model's files again"
                )
            return [] if missing else [file for file in files.values() if file is not None]
    return sorted(folder.glob("*.safetensors"))  # vLLM accepts any name


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BaseModelUnsupported(f"{index} is not an index of weights ({exc!r}). {_REMEDY}") from exc


def _read(files: Sequence[Path], device: str) -> dict[str, Tensor]:
    """Return the tensors of the files, on the device "meta" without their data.

    Raises: BaseModelUnsupported, which names a broken file.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_state_dict(file, map_location=device)
        except Exception as exc:  # safetensors and torch raise their own kinds
            raise BaseModelUnsupported(f"{file} cannot be read ({exc}). Copy the model's files again") from exc
    return tensors


def _load(
    model_class: Any, path: str | None, source: str, *, is_quantised: bool = False, **options: Any
) -> PreTrainedModel:
    """Load the model. Raises: BaseModelUnsupported if tensors are missing, do not fit or cannot be converted."""
    is_part = "key_mapping" in options  # the rest of the checkpoint is left out on purpose
    with _Report(is_shown=path is not None and not is_part) as report:
        try:
            if path is None:  # the class's own function may ask for files beside the weights
                load = partial(PreTrainedModel.from_pretrained.__func__, model_class)
            else:
                load = model_class.from_pretrained
            model, info = load(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        except RuntimeError as exc:
            if is_quantised or not report.unconverted:
                raise
            what = f"tensors cannot be converted to those of the model ({_some(report.unconverted)})"
            raise BaseModelUnsupported(f"{source} lacks weights: {what}. {_REMEDY}") from exc
    unknown = {ancestor for name in info["unexpected_keys"] for ancestor in _ancestors(name)} if is_quantised else set()
    missing = sorted(name for name in info["missing_keys"] if name.rpartition(".")[0] not in unknown)
    others = sorted(item for item in info["mismatched_keys"] if item[0].rpartition(".")[0] not in unknown)
    problems, of_all = [], f"of the model's {len(model.state_dict())} tensors"
    if missing:
        problems.append(f"{len(missing)} {of_all} are missing ({_some(missing)})")
        if not is_quantised and (extra := sorted(info["unexpected_keys"])):
            problems.append(f"{len(extra)} tensors of the files are not the model's ({_some(extra)})")
    if others:
        shapes = [f"{name} is {tuple(found)} and must be {tuple(wanted)}" for name, found, wanted in others]
        problems.append(f"{len(others)} {of_all} have another shape ({_some(shapes)})")
    if is_part and (heads := sorted(name for name in info["unexpected_keys"] if "lm_head." in name)):
        problems.append(f"the output head has another name in the files ({_some(heads)})")
    if problems:
        raise BaseModelUnsupported(f"{source} lacks weights: {'; '.join(problems)}. {_REMEDY}")
    biases = [] if is_quantised else _biases_left_out(info["unexpected_keys"], model)  # GPTQ files have some of zeros
    if biases:
        raise BaseModelUnsupported(
            f"{source} has biases of linear layers that have none by its config.json ({_some(biases)}). {_REMEDY}"
        )
    return model


def _biases_left_out(unexpected: Collection[str], model: nn.Module) -> list[str]:
    """Return those tensors of the files that are biases of linear layers which have none in the model."""
    plain = {
        f"{path}.bias"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.bias is None
    }
    return sorted(plain & set(unexpected))


class _Report(logging.Filter):
    """transformers' report of a load, which is the only place that names the tensors it cannot convert."""

    def __init__(self, *, is_shown: bool) -> None:
        super().__init__()
        self._is_shown = is_shown
        self.unconverted: list[str] = []

    def __enter__(self) -> _Report:
        logging.getLogger(_LOADER).addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(_LOADER).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        self.unconverted += re.findall(r"^(\S.*?) +\| \S*CONVERSION", record.getMessage(), re.MULTILINE)
        return self._is_shown


def _ancestors(name: str) -> list[str]:
    """Return the modules that contain the tensor."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _some(names: Sequence[str]) -> str:
    """Return the first names, and how many there are besides."""
    shown = ", ".join(names[:_NUM_SHOWN])
    return shown + (f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else "")
