"""Convert a GGUF file once into a cache folder, and keep its integers.

transformers reads the file and knows the names and the order of its tensors, but dequantises them. So each layer's
integers are those of the file's tensor that has the same numbers, in whatever order of its outputs.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import decoders, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.checkpoint import load_whole
from gpu_worker.model.gguf_blocks import KINDS, read_integers
from gpu_worker.model.quantization import QuantizedWeight
from gpu_worker.model.quantized_checkpoint import METHOD, OFFSET, PACKED, pack_words
from lora_store.built_folder import build_folder

logger = logging.getLogger(__name__)

CONVERTER = 6  # raise it when a conversion writes other files, so that those in the cache are not read any more
_FLOATS = ("F32", "F16", "BF16")
_ROPE_FACTORS = "rope_freqs.weight"  # by which each frequency of the positions is divided
# How Llama 3.1 and its successors scale positions. The file has only the factors that follow from it.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# How a tokenizer of bytes splits texts, by the name in the file. transformers knows the ways of other names.
_SPLIT_AS_GPT_2 = ("gpt-2", "mpt", "olmo", "phi-2")
_DIGITS_ALONE = ("refact", "smollm", "starcoder")  # each digit is a piece; else as GPT-2
# Ways of which llama.cpp takes a word that is a token whole, and puts the start token first unless the file forbids it.
_AS_LLAMA_3 = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
)
# Ends of a turn. Files of chat models that do not name theirs have one of these.
_TURN_ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"),
    *("<end_of_turn>", "<|end_of_turn|>", "<end_of_utterance>"),
)
_CONTROL = 3  # the type of a token that is no text
_NOT_IN_MODEL = "nextn"  # layers that predict further tokens
_REMEDY = "use the folder of the same model that has config.json and *.safetensors"


def find_gguf(source: str) -> Path | None:
    """Return the GGUF file that `source` names, or that is alone in the folder that it names. None if there is none.

    Raises: BaseModelUnsupported if a folder without config.json has several.
    """
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:3])
        raise BaseModelUnsupported(
            f"{source} has {len(found)} GGUF files ({names}): name one of them as the base model"
        )
    return found[0] if found else None


def gguf_folder(gguf: Path, cache_dir: Path) -> Path:
    """Return the folder with the converted model. The first call for a file converts it, which takes about a minute.

    Raises: BaseModelUnsupported, which names the types of tensors that are not supported, or what else prevents it.
    """
    return converted_folder("gguf", [gguf], cache_dir, convert_gguf)


def converted_folder(kind: str, files: Sequence[Path], cache_dir: Path, convert: Callable[[Path, Path], None]) -> Path:
    """Return the folder of the cache into which `convert` has written the model, once for each state of these files.

    A state has both times of change: archives and images give files of other weights the same modification time.
    `convert` gets the first one and a folder. Another `CONVERTER` converts them again, into a folder of its own.
    Folders of earlier states of the first file are removed then.
    """
    facts: list[object] = [CONVERTER]
    for file in files:
        found = file.resolve().stat()
        facts += [file.resolve(), found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    name = f"{kind}-{files[0].stem}-{_digest(files[0].resolve())}"
    folder = cache_dir / f"{name}-{_digest(*facts)}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{name}.lock"):
        if not folder.exists():
            logger.info("converting %s into %s, once; this takes about a minute", files[0], folder)
            with build_folder(folder) as target:
                convert(files[0], target)
            for earlier in cache_dir.iterdir():  # those with a dot were not finished
                if re.match(rf"\.?{re.escape(name)}-", earlier.name) and earlier != folder:
                    shutil.rmtree(earlier, ignore_errors=True)
    return folder


def _digest(*facts: object) -> str:
    return hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:16]


@contextmanager
def parsing_once() -> Iterator[None]:
    """Let all within the block share one reader of a GGUF file.

    transformers makes one for the config, the weights and the tokenizer each. Parsing a large vocabulary takes longer
    than all else of a conversion.
    Raises: BaseModelUnsupported if the package that reads it is not installed.
    """
    try:
        import gguf
    except ImportError as exc:
        raise BaseModelUnsupported(
            "a GGUF file needs the Python package gguf, which is not installed; run pip install 'loraretriever[local]'"
        ) from exc
    own = gguf.GGUFReader
    shared = cache(own)
    gguf.GGUFReader = lambda path: shared(str(path))
    try:
        yield
    finally:
        gguf.GGUFReader = own


def _read_checked(gguf: Path) -> Any:
    """Return the file's GGUFReader. Raises: BaseModelUnsupported."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        types = {tensor.tensor_type.name for tensor in reader.tensors}
    except Exception as exc:  # numpy, struct and the reader raise their own kinds
        raise BaseModelUnsupported(f"{gguf} cannot be read as a GGUF file ({exc}). Copy it again") from exc
    others = sorted(types - {*KINDS, *_FLOATS})
    if others or not types & set(KINDS):
        raise BaseModelUnsupported(
            f"{gguf} has tensors of type {', '.join(others or sorted(types))}; the native engine reads GGUF files of"
            f" {', '.join(KINDS)}: use such a file, or {_REMEDY}"
        )
    return reader


def _check_all_is_read(gguf: Path, reader: Any, model: nn.Module) -> None:
    """transformers leaves out what it has no place for. Raises: BaseModelUnsupported if the file has such numbers."""
    in_file = sum(
        int(tensor.n_elements)
        for tensor in reader.tensors
        if tensor.name != _ROPE_FACTORS and _NOT_IN_MODEL not in tensor.name
    )
    in_model = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    if in_file > in_model:
        raise BaseModelUnsupported(
            f"{gguf} has {in_file - in_model} numbers that transformers does not read, such as biases: {_REMEDY}"
        )


def _read_field(reader: Any, name: str) -> Any:
    """Return this field of the file's architecture, or None."""
    architecture = reader.fields["general.architecture"].contents()
    field = reader.fields.get(f"{architecture}.{name}")
    return None if field is None else field.contents()


def _read_tokenizer(reader: Any, name: str) -> Any:
    """Return this field of the file's tokenizer, or None."""
    field = reader.fields.get(f"tokenizer.ggml.{name}")
    return None if field is None else field.contents()


def _check_window(gguf: Path, reader: Any, config: Any) -> None:
    """transformers reads the window of few families. Raises: BaseModelUnsupported for another one than the file's."""
    in_file, in_config = _read_field(reader, "attention.sliding_window"), getattr(config, "sliding_window", None)
    if (in_file or None) != (in_config or None):  # 0 is none too
        raise BaseModelUnsupported(
            f"{gguf} attends to {in_file or 'all'} tokens, and transformers reads {in_config or 'all'}: {_REMEDY}"
        )


def _check_heads(gguf: Path, reader: Any, model: Any) -> None:
    """transformers takes some sizes from its defaults. Raises: BaseModelUnsupported if the file has others.

    llama.cpp scales the attention of Gemma 3 by the size of a head, or by another number in its largest model, whose
    heads are smaller than those of the others. The file does not say so.
    """
    in_file = _read_field(reader, "rope.dimension_count")
    rotated = {2 * len(values) for name, values in model.named_buffers() if name.endswith("inv_freq")}
    if in_file is not None and rotated - {in_file}:
        raise BaseModelUnsupported(
            f"{gguf} rotates {in_file} values of a head, and transformers {max(rotated)}: {_REMEDY}"
        )
    head_dim = getattr(model.config, "head_dim", None)
    scalar = getattr(model.config, "query_pre_attn_scalar", head_dim)
    if scalar != head_dim:
        raise BaseModelUnsupported(
            f"{gguf} has heads of {head_dim} values, and transformers scales their attention as that of {scalar}:"
            f" {_REMEDY}"
        )


def _read_base(reader: Any, config: Any) -> None:
    """Set the bases of the rotations, which transformers does not read from the files of every architecture."""
    ropes = getattr(config, "rope_parameters", None) or {}
    if (base := _read_field(reader, "rope.freq_base")) is not None and ropes:
        ropes.get("full_attention", ropes)["rope_theta"] = base
    if (base := _read_field(reader, "rope.freq_base_swa")) is not None and "sliding_attention" in ropes:
        ropes["sliding_attention"]["rope_theta"] = base


def _read_rope(gguf: Path, reader: Any, config: Any) -> dict[str, Any]:
    """Return how the model scales its positions, which transformers does not read from the file.

    Raises: BaseModelUnsupported for a way that is not supported.
    """
    kind = _read_field(reader, "rope.scaling.type")
    factor = _read_field(reader, "rope.scaling.factor") or _read_field(reader, "rope.scale_linear")
    if kind not in (None, "none", "linear") or factor not in (None, 1.0):
        raise BaseModelUnsupported(f"{gguf} scales its positions ({kind or 'linear'} by {factor}): {_REMEDY}")
    found = [tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FACTORS]
    if not found or (found[0] == 1).all():
        return {}
    factors = torch.tensor(found[0]).double()
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {**config.rope_parameters, **_LLAMA3, "factor": float(factors.max())}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    base: float = config.rope_parameters["rope_theta"]
    plain = base ** -(torch.arange(len(factors)).double() / len(factors))
    if len(frequencies) != len(factors) or not torch.allclose(frequencies.double(), plain / factors, rtol=1e-4, atol=0):
        raise BaseModelUnsupported(f"{gguf} scales its positions otherwise than Llama 3.1 ({_ROPE_FACTORS}): {_REMEDY}")
    return dict(scaled.rope_parameters)


@parsing_once()
def convert_gguf(gguf: Path, target: Path) -> None:
    """Save the model of a GGUF file as a checkpoint of the format compressed-tensors, in a folder that exists.

    Raises: BaseModelUnsupported, as `gguf_folder`; also if transformers cannot read all of the file, or if it lacks
    tensors.
    """
    reader = _read_checked(gguf)
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            read = load_whole(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except BaseModelUnsupported:
        raise
    except Exception as exc:  # transformers has no single one for architectures and tokenizers that it does not know
        raise BaseModelUnsupported(f"{gguf} cannot be converted ({exc})") from exc
    _check_all_is_read(gguf, reader, read)
    _check_window(gguf, reader, read.config)
    _check_heads(gguf, reader, read)
    _read_base(reader, read.config)
    if rope := _read_rope(gguf, reader, read.config):
        read.config.rope_parameters = rope
    _set_split(gguf, reader, tokenizer)
    _set_start(reader, tokenizer)
    found = _find_integers(reader, read)
    kept = {read.get_submodule(name).weight.data_ptr() for name in found}  # a tied head has the embedding's
    whole = read.state_dict()
    tensors = {name: tensor.bfloat16() for name, tensor in whole.items() if tensor.data_ptr() not in kept}
    for name, weight in found.items():
        tensors |= _packed(name, weight)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    read.config.quantization_config = _quantization_config({(weight.bits, weight.group) for weight in found.values()})
    read.config.save_pretrained(target)
    read.generation_config.eos_token_id = _read_ends(reader, tokenizer)
    read.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _read_ends(reader: Any, tokenizer: Any) -> list[int] | None:
    """Return the tokens that end an answer: of a text, and of a turn and a message, which transformers does not read.

    The file of a chat model may leave out the end of a turn. llama.cpp finds it by its text too.
    """
    named = {name: _read_tokenizer(reader, f"{name}_token_id") for name in ("eos", "eot", "eom")}
    found = set(named.values()) - {None}
    if named["eot"] is None and "tokenizer.chat_template" in reader.fields:
        kinds = _read_tokenizer(reader, "token_type") or []
        control = {id_ for id_, kind in enumerate(kinds) if kind == _CONTROL}
        vocabulary = tokenizer.get_vocab()
        found |= {vocabulary[text] for text in _TURN_ENDS if text in vocabulary} & control
    return sorted(found) or None


def _set_split(gguf: Path, reader: Any, tokenizer: Any) -> None:
    """transformers splits texts as GPT-2 where it does not know the file's way.

    Raises: BaseModelUnsupported for such a way, unless it is GPT-2's or one with single digits.
    """
    model, way = (_read_tokenizer(reader, name) for name in ("model", "pre"))
    backend = tokenizer.backend_tokenizer
    if model != "gpt2" or way in _SPLIT_AS_GPT_2 or type(backend.pre_tokenizer) is pre_tokenizers.Sequence:
        return
    if way not in _DIGITS_ALONE:
        raise BaseModelUnsupported(
            f"{gguf} splits texts in a way that is not supported (tokenizer.ggml.pre is {way or 'missing'}): {_REMEDY}"
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _set_start(reader: Any, tokenizer: Any) -> None:
    """Begin texts, and take words, as llama.cpp does where transformers reads neither from the file."""
    backend = tokenizer.backend_tokenizer
    if _read_tokenizer(reader, "model") == "gpt2" and _read_tokenizer(reader, "pre") in _AS_LLAMA_3:
        backend.model.ignore_merges = True
        if _read_tokenizer(reader, "add_bos_token") is None:
            tokenizer.add_bos_token = True
    has_space = _read_tokenizer(reader, "add_space_prefix") is not False
    if not has_space and type(backend.pre_tokenizer) is pre_tokenizers.Metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _find_integers(reader: Any, model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the integers of the model's linear layers, by name. transformers orders some tensors' outputs anew."""
    from gguf.quants import dequantize

    found: dict[str, QuantizedWeight] = {}
    linears = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = {name: weight.detach().numpy() for name, weight in linears.items()}
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in KINDS or len(tensor.shape) != 2:
            continue
        numbers = dequantize(tensor.data, tensor.tensor_type)  # as transformers does
        places = {hash(row.tobytes()): place for place, row in enumerate(numbers)}
        for name, weight in left.items():
            if weight.shape == numbers.shape and (order := _find_order(weight, numbers, places)) is not None:
                found[name] = read_integers(tensor.tensor_type.name, tensor.data[order])
                del left[name]
                break
    return found


def _find_order(weight: NDArray[Any], numbers: NDArray[Any], places: dict[int, int]) -> NDArray[np.int64] | None:
    """Return the order in which the rows of `numbers` are those of `weight`, or None if they are not."""
    if hash(weight[0].tobytes()) not in places:
        return None
    order = np.array([places.get(hash(row.tobytes()), 0) for row in weight])
    return order if np.array_equal(numbers[order], weight) else None


def _packed(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    return {
        f"{name}.weight_packed": pack_words(weight.values, weight.bits),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": torch.tensor(weight.values.shape),
        **({} if weight.offsets is None else {name + OFFSET: weight.offsets}),
    }


def _quantization_config(kinds: Collection[tuple[int, int]]) -> dict[str, Any]:
    """Return the config of integers of these kinds: bits, and inputs of a group."""
    groups = {}
    for bits, size in sorted(kinds):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
        groups[f"group_{bits}_{size}"] = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": METHOD, "format": PACKED, "config_groups": groups, "ignore": []}
