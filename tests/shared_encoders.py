"""One network for each packaged encoder of a test process: loading one takes four seconds of a core."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from lora_store.location import DEFAULT_CACHE_DIR
from retriever_svc.encoder import Encoder
from retriever_svc.encoder_files import DEFAULT_MODEL, ENGLISH_MODEL
from retriever_svc.vector_cache import VectorCache

_loaded: dict[tuple[str, str], Encoder] = {}


def shared_encoder(
    model: str | Path = DEFAULT_MODEL,
    *,
    num_threads: int | None = None,
    max_cached_texts: int = 2048,
    dtype: Any = "auto",
    cache_dir: Path = DEFAULT_CACHE_DIR,
    **options: Any,
) -> Encoder:
    """Return an encoder with an empty cache of vectors. Only its network and thread are those of earlier ones.

    A packaged encoder is the one of the user's cache folder, since its conversion into another takes half a minute.
    """
    if model not in (DEFAULT_MODEL, ENGLISH_MODEL):
        return Encoder(
            model,
            num_threads=num_threads,
            max_cached_texts=max_cached_texts,
            dtype=dtype,
            cache_dir=cache_dir,
            **options,
        )
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if (model, dtype) not in _loaded:
        _loaded[model, dtype] = Encoder(model, dtype=dtype, **options)
    own = copy.copy(_loaded[model, dtype])
    own._cache = VectorCache(max_cached_texts)
    return own
