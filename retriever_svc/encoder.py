"""Encode texts as unit vectors."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lora_store.location import DEFAULT_CACHE_DIR
from retriever_svc.encoder_files import DEFAULT_MODEL, identity_files, model_folder
from retriever_svc.errors import EncoderUnusable
from retriever_svc.packaged_encoder import CONVERSION, TASK_PROMPT
from retriever_svc.saved_network import SUFFIX, SavedEncoder, load_saved
from retriever_svc.vector_cache import OwnedText, VectorCache
from retriever_svc.whitening import Whitening, split_identity

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
EncoderDtype = Literal["auto", "float32"]  # auto: OpenVINO, in bfloat16 where the processor has it
INSTRUCTION = "Represent the sentence for similar task retrieval: "  # the paper's
MAX_TOKENS = 256  # read from each text, including the instruction
_CHARS_PER_TOKEN = 64  # limits the tokenizer's work on long texts
MAX_CHARS = MAX_TOKENS * _CHARS_PER_TOKEN  # read from each text
CHUNK_TOKENS = 1024  # per forward pass, including padding
_BYTES_PER_TOKEN = 3  # low estimate: one Chinese character; English has 4 to 5
_FIXED_TOKENS = 12  # per text: the instruction and the special tokens
# Chinese, Japanese and Korean characters, spaces before them, words and marks have a token each, or more.
_WIDE = "\u2e80-\uffef"
_PIECES = re.compile(rf"\s(?=[{_WIDE}])|[{_WIDE}]|[^\W{_WIDE}]+|[^\w\s]")


def load_model(
    model: str | Path, max_tokens: int = MAX_TOKENS, cache_dir: Path = DEFAULT_CACHE_DIR
) -> SentenceTransformer:
    """Load the model in float32 on the CPU, to read up to `max_tokens` of a text. Raises: EncoderUnusable."""
    from sentence_transformers import SentenceTransformer  # imported here, since it takes seconds

    folder = model_folder(model, cache_dir)
    try:
        network = SentenceTransformer(
            str(folder), device="cpu", model_kwargs={"use_safetensors": True, "dtype": "float32"}
        )
    except (OSError, ValueError) as exc:
        raise EncoderUnusable(str(model), str(exc)) from exc
    network.max_seq_length = min(max_tokens, network.max_seq_length or max_tokens)
    return network


def choose_instruction(model: SentenceTransformer | SavedEncoder) -> str:
    """Return the text that the model expects before a task's text: its own prompt `task`, or else the paper's."""
    prompt: str = model.prompts.get(TASK_PROMPT, INSTRUCTION)
    return prompt


def tokens_read(text: str) -> int:
    """Estimate how many tokens the encoder reads of `text`: one for each 3 bytes of UTF-8, from 1 to MAX_TOKENS."""
    num_bytes = len(text[: _BYTES_PER_TOKEN * MAX_TOKENS].encode("utf-8", "replace"))
    return min(max(1, math.ceil(num_bytes / _BYTES_PER_TOKEN)), MAX_TOKENS)


def _identity(folder: Path, settings: str) -> str:
    """Short digest of everything the vectors depend on: weights, tokenizer, module settings, instruction and length."""
    digest = hashlib.sha256(settings.encode())
    for path in identity_files(folder):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class Encoder:
    """A sentence-transformers model that puts an instruction before every text. Safe to call from any thread.

    `instruction`: None means that of the model (see `choose_instruction`).

    It reads up to `max_tokens` of a text, including the instruction, and 64 characters per token. Invalid Unicode (lone
    surrogates) reads as "?". `num_threads` sets the encoder's thread count, and torch's for the whole process unless a
    saved network of the packaged encoder is used, which does without torch.
    With `dtype` auto a vector also depends slightly on the texts that are encoded with it, as bfloat16 is rounded.
    `exact_by`: the library that computes the packaged encoder with `dtype` float32. torch computes other encoders.
    `max_cached_texts`: the number of cached vectors for each owner of texts.
    `projection` follows the model, if one is set with `projected`.
    Source: LoraRetriever (ACL Findings 2024), section 4.1.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        num_threads: int | None = None,
        instruction: str | None = None,
        max_tokens: int = MAX_TOKENS,
        max_cached_texts: int = 2048,
        dtype: EncoderDtype = "auto",
        exact_by: Literal["torch", "openvino"] = "torch",
        cache_dir: Path = DEFAULT_CACHE_DIR,
    ) -> None:
        folder = model_folder(model, cache_dir)
        saves, is_exact = None, dtype == "float32"
        has_conversion = instruction is None and max_tokens == MAX_TOKENS and (folder / CONVERSION).is_file()
        if has_conversion and not (is_exact and exact_by == "torch"):
            saves = folder.with_name(f"{folder.name}{SUFFIX}"), _identity(folder, str(max_tokens))
        found = load_saved(*saves, choose_instruction, max_tokens, num_threads, is_exact=is_exact) if saves else None
        if found is None and num_threads is not None:
            import torch  # imported here, since it takes seconds

            torch.set_num_threads(num_threads)
        self._model: SentenceTransformer | SavedEncoder = found or load_model(folder, max_tokens)
        self._instruction = choose_instruction(self._model) if instruction is None else instruction
        self._max_chars = max_tokens * _CHARS_PER_TOKEN
        self._cache = VectorCache(max_cached_texts)
        # One thread: concurrent forward passes would only share the same cores. Its queue serves callers in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.name = str(model)
        self.identity: str = _identity(folder, f"{self._instruction}\0{self._model.max_seq_length}")
        self.dim: int = self._model.get_embedding_dimension()
        self.projection: Whitening | None = None
        if (saves or not is_exact) and not isinstance(self._model, SavedEncoder):
            from retriever_svc.bfloat16_linear import has_bfloat16_products, use_bfloat16  # torch takes seconds
            from retriever_svc.openvino_network import use_openvino

            is_replaced = use_openvino(self._model, self._compute, saves, is_exact=is_exact)
            if not is_replaced and not is_exact and has_bfloat16_products():
                use_bfloat16(self._model, self._compute)

    def projected(self, projection: Whitening | None) -> Encoder:
        """Return this encoder with another projection, or without one. Both share the model, its thread and cache.

        Raises: EncoderUnusable if the projection was made for another encoder.
        """
        encoder = split_identity(self.identity)[0]
        if projection is not None and projection.encoder != encoder:
            reason = f"the projection {projection.identity} was made for another encoder: fit a new one"
            raise EncoderUnusable(encoder, reason)
        other = copy.copy(self)
        other.projection = projection
        other.identity = encoder if projection is None else projection.identity
        return other

    def encode(self, texts: Sequence[str], owners: Sequence[str] | None = None) -> Vectors:
        """Return unit rows of E(instruction ⊕ text), projected; otherwise as `encode_plain`."""
        return project(self, self.encode_plain(texts, owners))

    def encode_plain(self, texts: Sequence[str], owners: Sequence[str] | None = None) -> Vectors:
        """Return unit rows of E(instruction ⊕ text) before the projection, in order: (N, D) float32; (0, D) for none.

        `owners` has one entry per text: only this owner's part of the cache is read and filled. Without owners the
        cache is not used. Other callers wait until the whole call is done, so use `BulkEncoding` for many texts.
        """
        readable = [text[: self._max_chars].encode("utf-8", "replace").decode() for text in texts]
        keys = list(zip([""] * len(readable) if owners is None else owners, readable, strict=True))
        known = {} if owners is None else self._cache.get(keys)
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        if missing:
            known.update(self._thread.submit(self._encode_chunks, missing).result())
        if owners is not None:
            self._cache.put({key: known[key] for key in missing})
        return np.stack([known[key] for key in keys]) if keys else np.empty((0, self.dim), np.float32)

    def _encode_chunks(self, keys: Iterable[OwnedText]) -> dict[OwnedText, Vectors]:
        """Return the row (D,) of each text. Runs on the encoder's thread."""
        rows: dict[OwnedText, Vectors] = {}
        for chunk in split_chunks(keys):
            rows.update(zip(chunk, self._compute([text for _, text in chunk]), strict=True))
        return rows

    def _compute(self, texts: list[str]) -> Vectors:
        rows: Vectors = self._model.encode(
            texts,
            prompt=self._instruction,
            batch_size=len(texts),
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return rows


def project(encoder: Encoder, vectors: Vectors) -> Vectors:
    """Project vectors of `encode_plain`, if the encoder has a projection."""
    return vectors if encoder.projection is None else encoder.projection.project(vectors)


def split_chunks(keys: Iterable[OwnedText]) -> Iterator[list[OwnedText]]:
    """Yield the texts in chunks of about `CHUNK_TOKENS` with padding, shortest texts first to keep padding short."""
    chunk: list[OwnedText] = []
    for num_tokens, key in sorted(((_about_tokens(key[1]), key) for key in keys), key=lambda pair: pair[0]):
        if chunk and (len(chunk) + 1) * num_tokens > CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(key)
    if chunk:
        yield chunk


def _num_pieces(text: str) -> int:
    return len(_PIECES.findall(text, 0, _BYTES_PER_TOKEN * MAX_TOKENS))


def _about_tokens(text: str) -> int:
    return min(MAX_TOKENS, _FIXED_TOKENS + max(tokens_read(text), _num_pieces(text)))


def unit_rows(vectors: Vectors) -> Vectors:
    """Return every row scaled to length 1. Rows of zeros stay zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    rows: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return rows
