"""Convert a model of the format of Mistral's own tools once into a cache folder. Its parts for images are left out.

Such a folder has params.json, consolidated*.safetensors and tekken.json, and no config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from transformers import MistralConfig
from transformers.integrations.mistral import convert_tekken_tokenizer

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.gguf_model import converted_folder

_SETTINGS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
}
_LENGTHS = ("max_position_embeddings", "max_seq_len")
_MAX_POSITION = 128_000  # where the file does not say it, as in vLLM
_READ = ("tied_embeddings", "vision_encoder", "multimodal", *_LENGTHS)
_ALLOWED = {"activation": "silu", "causal": True, "model_type": "transformer"}
_NAMES = {
    "tok_embeddings": "embed_tokens",
    "norm": "norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_TENSOR = re.compile(rf"(layers\.\d+\.)?({'|'.join(map(re.escape, _NAMES))})(\.weight|\.bias)")
_PART_BYTES = 2**31  # the tensors of one written file, which are in memory together
_REMEDY = "use the folder of the same model that has config.json and *.safetensors"


def find_params(source: str) -> Path | None:
    """Return params.json of a folder that has this format only, None of any other."""
    path = Path(source, "params.json")
    return path if path.is_file() and not path.with_name("config.json").exists() else None


def converted_mistral(params: Path, cache_dir: Path) -> Path:
    """Return the folder with the converted model. The first call for these files converts them.

    Raises: BaseModelUnsupported.
    """
    files = [params, params.with_name("tekken.json"), *_weight_files(params)]
    return converted_folder("mistral", [each for each in files if each.exists()], cache_dir, convert_mistral)


def convert_mistral(params: Path, target: Path) -> None:
    """Write the language model as transformers reads it. Raises: BaseModelUnsupported."""
    config = _read_config(params)
    _convert_tokenizer(params.with_name("tekken.json"), target)
    names: dict[str, str] = {}
    for number, part in enumerate(_in_parts(_read_tensors(params, config))):
        file = f"model-{number + 1:05}.safetensors"
        save_file(part, target / file, metadata={"format": "pt"})
        names |= dict.fromkeys(part, file)
        config.dtype = next(iter(part.values())).dtype
    index = {"metadata": {}, "weight_map": names}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(target)


def _weight_files(params: Path) -> list[Path]:
    return sorted(params.parent.glob("consolidated*.safetensors"))


def _read_config(params: Path) -> MistralConfig:
    try:
        found = json.loads(params.read_text(encoding="utf-8"))
        settings = {name: found.pop(key) for key, name in _SETTINGS.items()}
    except (ValueError, KeyError, AttributeError) as exc:
        raise BaseModelUnsupported(f"{params} does not describe a model of Mistral ({exc!r}): {_REMEDY}") from exc
    others = {name: value for name, value in found.items() if name not in _READ and value}
    if unknown := [name for name, value in others.items() if value != _ALLOWED.get(name)]:
        raise BaseModelUnsupported(f"{params} has {', '.join(unknown)}, which this server does not convert: {_REMEDY}")
    return MistralConfig(
        **settings,
        max_position_embeddings=min((found[name] for name in _LENGTHS if found.get(name)), default=_MAX_POSITION),
        tie_word_embeddings=bool(found.get("tied_embeddings")),
        sliding_window=None,
        architectures=["MistralForCausalLM"],
    )


def _convert_tokenizer(tekken: Path, target: Path) -> None:
    if not tekken.is_file():
        raise BaseModelUnsupported(f"{tekken.parent} has no tekken.json: {_REMEDY}")
    try:
        tokenizer = convert_tekken_tokenizer(str(tekken))
    except (ImportError, KeyError, ValueError) as exc:  # older files name no special tokens; mistral_common knows them
        reason = str(exc).strip().splitlines()[0]
        raise BaseModelUnsupported(f"{tekken} cannot be read ({reason}): {_REMEDY}") from exc
    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(target)


def _in_parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if part and sum(each.nbytes for each in part.values()) + tensor.nbytes > _PART_BYTES:
            yield part
            part = {}
        part[name] = tensor
    if part:
        yield part


def _read_tensors(params: Path, config: MistralConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the language model's tensors as transformers names and orders them. Raises: BaseModelUnsupported."""
    for file in _weight_files(params):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no dictionary)
                    found = _TENSOR.fullmatch(name)
                    if found is None and name.startswith(("layers.", "output.", "norm.", "tok_embeddings.")):
                        raise BaseModelUnsupported(f"{file} has {name}, which this server does not convert: {_REMEDY}")
                    if found is not None:
                        layer, part, kind = found.groups(default="")
                        prefix = "" if part == "output" else "model."
                        yield f"{prefix}{layer}{_NAMES[part]}{kind}", _ordered(part, tensors.get_tensor(name), config)
        except (OSError, SafetensorError) as exc:
            raise BaseModelUnsupported(f"{file} cannot be read ({exc}). Copy the model's files again") from exc


def _ordered(part: str, tensor: Tensor, config: MistralConfig) -> Tensor:
    """Return the tensor with the pairs of values that positions rotate half a head apart, not side by side."""
    if part not in ("attention.wq", "attention.wk"):
        return tensor
    pairs = tensor.view(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
