"""Locate, check and load the base model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version

from gpu_worker.config import PACKAGED_MODEL, NativeWorkerConfig, WorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.front.request.model_files import sampling_defaults_of_files
from gpu_worker.model.checkpoint import load_whole, read_config
from gpu_worker.model.embedding import EmbeddingRows, QuantizedRows, is_tied, keeping_tie, look_up
from gpu_worker.model.gguf_model import find_gguf, gguf_folder
from gpu_worker.model.inject import target_linears
from gpu_worker.model.mistral_format import converted_mistral, find_params
from gpu_worker.model.own_families import OWN_FAMILIES
from gpu_worker.model.packaged_model import flag_markers, packaged_folder, wants_integers
from gpu_worker.model.packed_attention import ATTENTION_NAME, register
from gpu_worker.model.packed_linear import LinearKernel, NarrowLinear
from gpu_worker.model.quantization import BITS, QuantizedLinear, quantize, quantize_layers
from gpu_worker.model.quantized_checkpoint import check_format, load_quantized
from gpu_worker.model.rope import pin_longrope
from gpu_worker.model.text_part import text_options

logger = logging.getLogger(__name__)

_ATTENTION_SINKS = ("gpt_oss",)
_EMBEDDING_BITS = 8  # of an embedding without a head: its rows cost no time, and nothing is gained by fewer
_MEASURED_TOKENS = 256
_LARGEST_CUDA_HEAD = 256  # limit of flash attention 2
_NEEDED = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size"),
    "max_position_embeddings",
)
_WITHOUT_GROUPS = ("gpt_neox", "gptj", "opt", "persimmon")  # each head has keys of its own, and no setting says so


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base model and the properties that the engine needs."""

    model: PreTrainedModel
    tokenizer: Any  # a transformers tokenizer with a `tokenizers` back end
    eos_token_ids: frozenset[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    vocab_size: int
    dtype: torch.dtype
    window: int | None = None  # `window_layers` see only this many last tokens
    window_layers: frozenset[int] = frozenset()
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # for what a request leaves unset

    @property
    def backend_tokenizer(self) -> Tokenizer:
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        return backend

    @property
    def num_embeddings(self) -> int:
        """Return the number of token ids that the model's embedding has."""
        num: int = self.model.get_input_embeddings().num_embeddings
        return num


def model_source(config: WorkerConfig) -> str:
    """Return the argument for transformers: the configured id or folder, or the cache folder of a converted model.

    Raises: BaseModelUnsupported if the packaged model, a GGUF file or Mistral's own format cannot be converted.
    """
    if config.base_model == PACKAGED_MODEL:
        return str(packaged_folder(config.cache_dir, keeps_integers=wants_integers(config)))
    if (params := find_params(config.base_model)) is not None:
        return str(converted_mistral(params, config.cache_dir))
    gguf = find_gguf(config.base_model) if isinstance(config, NativeWorkerConfig) else None
    return config.base_model if gguf is None else str(gguf_folder(gguf, config.cache_dir))


def load_tokenizer(config: WorkerConfig, source: str | None = None) -> Any:
    """Load the base model's tokenizer, with the operator's chat template if there is one.

    `source`: what `model_source` returned, if it is known: it hashes a packaged model's files.
    Raises: BaseModelUnsupported.
    """
    source = source or model_source(config)
    is_packaged = config.base_model == PACKAGED_MODEL
    load: Any = _packaged_tokenizer if is_packaged else partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
    try:
        tokenizer = load(Path(source) if is_packaged else source)
    except ValueError as exc:  # among others: its class is code of the checkpoint
        reason = first_line(exc)
        raise BaseModelUnsupported(f"the base model's tokenizer cannot be loaded ({reason})") from exc
    if not tokenizer.is_fast:
        raise BaseModelUnsupported("the base model needs a fast tokenizer (tokenizer.json)")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may ask for both; transformers ignores it
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    if is_packaged:
        flag_markers(tokenizer)
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    return tokenizer


def _packaged_tokenizer(folder: Path) -> Any:
    """Read the tokenizer's file once. `AutoTokenizer` parses its 33 MB in Python, several times, and keeps a copy."""
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens)


def load_config(source: str) -> Any:
    """Read the model's config.json.

    Raises: BaseModelUnsupported for a GGUF file, for a folder of them, and for a family that transformers lacks.
    """
    folder = Path(source)
    if folder.suffix == ".gguf" and not folder.exists():
        raise BaseModelUnsupported(f"base_model {source!r} is no file of this machine")
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() else [folder] if folder.suffix == ".gguf" else []
    if found and not (folder / "config.json").exists():
        raise BaseModelUnsupported(
            f"{found[0]} is a GGUF file, which engine 'vllm' does not read here: use engine 'native', or the folder of"
            " the same model that has config.json and *.safetensors"
        )
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
        family = settings.get("model_type")
    except Exception as exc:  # OSError if it is no JSON, AttributeError if it is no object
        if not folder.is_dir():
            raise  # the model hub may not answer now
        raise BaseModelUnsupported(
            f"the configuration of {source} cannot be read ({first_line(exc)}). Copy the model's files again"
        ) from exc
    if family is not None and (not isinstance(family, str) or family not in CONFIG_MAPPING):
        raise BaseModelUnsupported(
            f"{family} is no family of transformers {transformers_version}, and this server runs no code of a"
            " checkpoint: use a base model that transformers loads without trust_remote_code, or one of"
            f" {', '.join(OWN_FAMILIES)}"
        )
    _check_generation_config(folder / "generation_config.json")
    try:
        return read_config(source)
    except Exception as exc:  # its checks have no common class, and its language model may be of an unknown family
        raise BaseModelUnsupported(f"the configuration of {source} cannot be read ({first_line(exc)})") from exc


def _check_generation_config(path: Path) -> None:
    """transformers ignores a broken file, and with it the ends of answers that only this file names.

    Raises: BaseModelUnsupported.
    """
    if not path.is_file():
        return
    try:
        is_object = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:  # UnicodeDecodeError is one
        is_object = False
    if not is_object:
        raise BaseModelUnsupported(f"{path} is not a JSON object. Copy the model's files again")


def load_base_model(config: NativeWorkerConfig, source: str | None = None) -> BaseModel:
    """Load the base model into host memory and check it. Of a multimodal checkpoint only the text part is loaded.

    `source`: as in `load_tokenizer`.
    Raises: BaseModelUnsupported with the reason.
    """
    source = source or model_source(config)
    whole_config = load_config(source)
    part = text_options(whole_config)
    hf_config = part.get("config", whole_config)
    _check_config(hf_config)
    _check_class(hf_config)
    head_dim = config_setting(hf_config, "head_dim") or hf_config.hidden_size // hf_config.num_attention_heads
    if config.device == "cuda" and (head_dim > _LARGEST_CUDA_HEAD or head_dim % 8):
        raise BaseModelUnsupported(
            f"{hf_config.model_type} has a head size of {head_dim}; attention on cuda supports multiples of 8 up to"
            f" {_LARGEST_CUDA_HEAD}"
        )
    register()
    with ThreadPoolExecutor(1) as thread:  # a large tokenizer takes a second, and is read by another core
        reading = thread.submit(load_tokenizer, config, source)
        model = _load_model(config, source, hf_config, part)
        dtype = model.dtype
        is_chosen = config.dtype == "auto" and config.device == "cpu"
        if is_chosen and dtype == torch.float32 and LinearKernel.load(config.cache_dir) is not None:
            store_narrow(model)
        pin_longrope(model, min(config.max_model_len, hf_config.max_position_embeddings))
        tokenizer = reading.result()
    return BaseModel(
        model=model.eval(),
        tokenizer=tokenizer,
        eos_token_ids=find_end_ids(model.generation_config.eos_token_id, tokenizer, hf_config.vocab_size),
        num_layers=hf_config.num_hidden_layers,
        num_kv_heads=_num_kv_heads(hf_config),
        head_dim=head_dim,
        max_position=hf_config.max_position_embeddings,
        vocab_size=hf_config.vocab_size,
        dtype=dtype,
        window=_window(hf_config),
        window_layers=_window_layers(hf_config),
        sampling_defaults=sampling_defaults(config, source),
    )


def _load_model(config: NativeWorkerConfig, source: str, hf_config: Any, part: Mapping[str, Any]) -> PreTrainedModel:
    """Load the weights. Integers of the checkpoint are kept, and the others become integers if the settings say so.

    `part`: options that load a part of a checkpoint.
    Products of integers give bfloat16, on every processor.
    """
    has_integers = config_setting(hf_config, "quantization_config") is not None
    if has_integers and (config.device != "cpu" or config.dtype == "float32"):
        raise BaseModelUnsupported(
            f"the base model has quantised weights, which the native engine reads with device 'cpu' and dtype 'auto' or"
            f" 'bfloat16', got '{config.device}' and '{config.dtype}'"
        )
    if has_integers and part:
        raise BaseModelUnsupported(
            "the base model is a multimodal checkpoint with quantised weights, which the native engine does not read:"
            " use engine 'vllm', or dequantise the weights and save the result"
        )
    is_quantised = has_integers or config.quantization != "none"
    dtype = torch.bfloat16 if is_quantised else resolve_dtype(config.dtype, config.device)
    load = partial(load_quantized, config=hf_config) if has_integers else partial(load_whole, **part)
    try:
        model = load(source, dtype=dtype, attn_implementation=ATTENTION_NAME)
        squares = measure_inputs(model) if config.quantization == "int4" else None
    except (BaseModelUnsupported, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as exc:  # whatever the model's code makes of a setting that it does not expect
        if "allocate memory" in str(exc):  # torch's RuntimeError for too little memory of the machine
            raise
        raise BaseModelUnsupported(
            f"transformers cannot build or run the model of {source} ({exc!r}): check the settings in its config.json"
        ) from exc
    if config.quantization != "none":
        with keeping_tie(model):
            quantize_layers(model, _linear_names(model), BITS[config.quantization], squares)
        embedding = model.get_input_embeddings()
        if not is_tied(model) and isinstance(embedding, nn.Embedding):
            look_up(model, QuantizedRows(quantize(embedding.weight, _EMBEDDING_BITS), dtype))
    return model


@torch.inference_mode()
def measure_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the sum of the squares of each input (I,) over random tokens, by layer that can be rounded."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, 0) + inputs[0].float().square().flatten(0, -2).sum(dim=0)

    layers = [(name, model.get_submodule(name)) for name in _linear_names(model)]
    rounded = [(name, layer) for name, layer in layers if not isinstance(layer, QuantizedLinear)]
    if not rounded:
        return sums
    handles = [layer.register_forward_pre_hook(lambda _, x, name=name: add(name, x)) for name, layer in rounded]
    num_ids = model.get_input_embeddings().num_embeddings
    length = min(_MEASURED_TOKENS, model.config.max_position_embeddings)
    ids = torch.randint(num_ids, (1, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None]
    model.set_attn_implementation("eager")
    try:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
        for handle in handles:
            handle.remove()
    return sums


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers that an adapter may target, and of the output head if it is one."""
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head and isinstance(head, nn.Linear)]
    return [*target_linears(model, head), *heads]


def store_narrow(model: PreTrainedModel) -> None:
    """Store the weights of a float32 model's linear layers, its output head and its embedding as bfloat16, in place.

    All products stay those of float32 numbers.
    """
    was_tied = is_tied(model)
    for name in _linear_names(model):
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and linear.in_features % 2 == 0:  # as the kernel needs
            model.set_submodule(name, NarrowLinear(linear))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if was_tied and isinstance(head, NarrowLinear):
        look_up(model, head)
    elif isinstance(embedding, nn.Embedding) and not was_tied:
        look_up(model, EmbeddingRows(embedding.weight.detach().bfloat16(), torch.float32))


def sampling_defaults(config: WorkerConfig, source: str | None = None) -> dict[str, float]:
    """Return the sampling parameters for what a request leaves unset: the operator's, then the base model's own.

    `source`: as in `load_tokenizer`.
    """
    own = sampling_defaults_of_files(source or model_source(config)) if config.generation_config == "auto" else {}
    return own | dict(config.sampling_defaults)


def resolve_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """Resolve `auto`: bfloat16 on a GPU and on CPUs with bfloat16 products in hardware, else float32."""
    if name == "auto" and device == "cuda":
        name = "bfloat16"
    if name == "auto":
        capabilities = torch.cpu.get_capabilities()
        name = "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"
        if name == "float32":
            logger.info("this processor has no AVX-512 or AMX instructions for bfloat16: products are float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _check_class(config: Any) -> None:
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    classes = found if isinstance(found, tuple) else (found,)
    if not any(model_class._supports_attention_backend for model_class in classes):
        raise BaseModelUnsupported(
            f"{config.model_type} does not support transformers' attention interface, which this engine needs"
        )


def _check_config(config: Any) -> None:
    problems = []
    if config_setting(config, "quantization_config") is not None:
        check_format(config.quantization_config, config.model_type)
    if config_setting(config, "is_encoder_decoder"):
        problems.append("an encoder-decoder architecture")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config_setting(config, name) is not None:
            problems.append(f"soft-capping ({name})")
    if config_setting(config, "kv_lora_rank") is not None:
        problems.append("multi-head latent attention")
    if config_setting(config, "use_bidirectional_attention"):
        problems.append("bidirectional attention")
    layers = set(config_setting(config, "layer_types") or ())
    if other := sorted(map(str, layers - {"full_attention", "sliding_attention"})):
        problems.append(f"layers of other kinds ({', '.join(other)})")
    if config.model_type in _ATTENTION_SINKS:
        problems.append("attention sinks")
    found = {name: config_setting(config, name) for name in _NEEDED} | {"num_key_value_heads": _num_kv_heads(config)}
    problems += [f"a config without {name}" for name, value in found.items() if not isinstance(value, int)]
    if problems:
        raise BaseModelUnsupported(f"{config.model_type} has {', '.join(problems)}, which this engine does not support")


def _num_kv_heads(config: Any) -> Any:
    name = "num_attention_heads" if config.model_type in _WITHOUT_GROUPS else "num_key_value_heads"
    return config_setting(config, name)


def _window(config: Any) -> int | None:
    """Return the window of the layers that have one, or None if all layers see all tokens.

    A family without windows keeps any setting of its config.json, and transformers does not read it.
    """
    kinds = config_setting(config, "layer_types")
    has_windows = hasattr(type(config), "sliding_window") if kinds is None else "sliding_attention" in kinds
    return config_setting(config, "sliding_window") or None if has_windows else None  # 0 is none too


def _window_layers(config: Any) -> frozenset[int]:
    """Return the layers with a sliding window, or none if all layers have one."""
    kinds = config_setting(config, "layer_types") or ()
    layers = frozenset(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    has_window = isinstance(config_setting(config, "sliding_window"), int)
    return layers if has_window and len(layers) < config.num_hidden_layers else frozenset()


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, with the next one if that says what the first one announces."""
    lines = [line.strip() for line in str(error).splitlines()[:2]]
    return " ".join(lines if lines and lines[0].endswith(":") else lines[:1])


def config_setting(config: Any, name: str) -> Any:
    """Return a setting of the model's config, or None if it is absent.

    Raises: BaseModelUnsupported if the config has no single value because its layers differ.
    """
    try:
        return getattr(config, name, None)
    except Exception as exc:  # transformers raises a RuntimeError from an inner module
        raise BaseModelUnsupported(
            f"{config.model_type} has no single {name} for all its layers, which this engine needs"
        ) from exc


def find_end_ids(declared: int | Sequence[int] | None, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """Return the ids that end an answer: those that the model's files declare, and the tokenizer's.

    Ids that the model cannot choose are left out, with a warning: its logits have no such place.
    """
    ids = declared if isinstance(declared, Sequence) else [declared]
    found = {token_id for token_id in (*ids, tokenizer.eos_token_id) if token_id is not None}
    outside = {token_id for token_id in found if not 0 <= token_id < vocab_size}
    if outside:
        logger.warning(
            "the end ids %s are ignored: the base model has ids from 0 to %d; check eos_token_id in"
            " generation_config.json and config.json, and the tokenizer's end token",
            ", ".join(map(str, sorted(outside))),
            vocab_size - 1,
        )
    return frozenset(found - outside)
