"""One network for each encoder of a test process: loading a packaged one takes four seconds of a core."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from retriever_svc.encoder import Encoder
from retriever_svc.encoder_files import DEFAULT_MODEL
from retriever_svc.vector_cache import VectorCache

_loaded: dict[tuple[object, ...], Encoder] = {}


def shared_encoder(
    model: str | Path = DEFAULT_MODEL,
    *,
    num_threads: int | None = None,
    max_cached_texts: int = 2048,
    dtype: Any = "auto",
    exact_by: Any = "torch",
    cache_dir: Path | None = None,
    **options: Any,
) -> Encoder:
    """Return an encoder with an empty cache of vectors. Only its network and thread are those of earlier ones.

    Every cache folder is the user's, since a conversion of the packaged encoder into another takes half a minute.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    key = (model, dtype, exact_by if dtype == "float32" else None, *options.items())
    if key not in _loaded:
        _loaded[key] = Encoder(model, dtype=dtype, exact_by=exact_by, **options)
    own = copy.copy(_loaded[key])
    own._cache = VectorCache(max_cached_texts)
    return own


def changeable_encoder(model: str = DEFAULT_MODEL) -> Encoder:
    """Return a packaged encoder in float32 with a network of its own: a copy takes a tenth of the time of a load."""
    own = shared_encoder(model, dtype="float32")
    tokenizer = own._model.tokenizer
    own._model = copy.deepcopy(own._model, {id(tokenizer): tokenizer})
    return own
