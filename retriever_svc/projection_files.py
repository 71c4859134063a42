"""Find projections and the vectors of ordinary prompts: in this package, or next to the catalogue."""

from __future__ import annotations

import logging
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lora_store.errors import StoreUnavailable
from lora_store.files import Files
from retriever_svc.encoder import Encoder, Vectors, project
from retriever_svc.errors import ProjectionUnusable
from retriever_svc.ordinary_prompts import bare_words, ordinary_prompts, prompts_digest
from retriever_svc.whitening import Whitening, split_identity

logger = logging.getLogger(__name__)


class ProjectionFiles:
    """The projections of one store, and those in this package. Without `files` nothing is saved.

    Files are named by content, so replicas can write the same one at the same time.
    """

    def __init__(self, files: Files | None = None) -> None:
        self._files = files
        self._ordinary: dict[str, Vectors] = {}  # by the identity of an encoder without projection

    def shipped(self, encoder: str) -> Whitening | None:
        """Return the packaged projection for the encoder of this identity, or None."""
        path = shipped_file(split_identity(encoder)[0])
        return Whitening.from_bytes(path.read_bytes()) if path.is_file() else None

    def find(self, identity: str) -> Whitening | None:
        """Return the projection of an encoder's identity, None if the identity has none.

        Raises: ProjectionUnusable if the projection is missing or damaged; StoreUnavailable.
        """
        encoder, digest = split_identity(identity)
        if not digest:
            return None
        shipped = self.shipped(encoder)
        if shipped is not None and shipped.identity == identity:
            return shipped
        found = self._stored(identity)
        if found is None or found.identity != identity:
            raise ProjectionUnusable(f"the projection {identity} is missing next to the catalogue: reindex")
        return found

    def embedded_with(self, identity: str, encoder: str) -> Whitening | None:
        """Return the projection that embedded the pool, if there is one and it is of `encoder`.

        Raises: StoreUnavailable.
        """
        try:
            return self.find(identity) if split_identity(identity)[0] == encoder else None
        except ProjectionUnusable:
            return None

    def keep(self, projection: Whitening) -> None:
        """Store a packaged projection unless it is stored, for later versions, which may come with another one."""
        try:
            if self._stored(projection.identity) is None:
                self.save(projection)
        except (ProjectionUnusable, StoreUnavailable) as exc:
            logger.warning("cannot store the packaged projection; the next replica tries again: %s", exc)

    def _stored(self, identity: str) -> Whitening | None:
        data = None if self._files is None else self._files.read(_make_name(identity))
        return None if data is None else Whitening.from_bytes(data)

    def save(self, projection: Whitening) -> None:
        """Write the projection next to the catalogue. Raises: StoreUnavailable."""
        if self._files is not None:
            self._files.write(_make_name(projection.identity), projection.to_bytes())

    def ordinary(self, encoder: Encoder) -> Vectors:
        """Return the ordinary prompts' vectors by this encoder: (J, D). Encode them at most once per encoder."""
        plain = split_identity(encoder.identity)[0]
        if plain not in self._ordinary:
            self._ordinary[plain] = self._plain_ordinary(encoder, plain)
        return project(encoder, self._ordinary[plain])

    def centre(self, encoder: Encoder) -> Vectors | None:
        """Return the mean of the ordinary prompts' vectors (D,) without bare words; None for a projected encoder.

        A projection has a centre of its own. Without one, vectors are compared from this mean (see `centred`).
        """
        if encoder.projection is not None:
            return None
        ordinary = self.ordinary(encoder)
        centre: Vectors = ordinary[~bare_words(len(ordinary))].mean(axis=0)
        return centre

    def _plain_ordinary(self, encoder: Encoder, identity: str) -> Vectors:
        shipped = shipped_file(f"{identity}.ordinary")
        name = f"{identity}-{prompts_digest()[:16]}.ordinary.safetensors"
        data = shipped.read_bytes() if shipped.is_file() else self._read(name)
        if data is not None:
            try:
                return np.asarray(load(data)["vectors"], np.float32)
            except (SafetensorError, KeyError):
                logger.warning("encoding the ordinary prompts again, since the file %s is damaged", name)
        vectors = encoder.encode_plain(ordinary_prompts())
        self._write(name, ordinary_file(vectors))
        return vectors

    def _read(self, name: str) -> bytes | None:
        try:
            return None if self._files is None else self._files.read(name)
        except StoreUnavailable:
            return None  # the prompts are encoded instead

    def _write(self, name: str, data: bytes) -> None:
        try:
            if self._files is not None:
                self._files.write(name, data)
        except StoreUnavailable as exc:
            logger.warning("cannot save the ordinary prompts' vectors; the next replica encodes them: %s", exc.cause)


def shipped_file(stem: str) -> Path:
    """Return the place of a packaged file, which may not exist."""
    return Path(str(package_files("retriever_svc").joinpath(f"data/{stem}.safetensors")))


def ordinary_file(vectors: Vectors) -> bytes:
    """Return the ordinary prompts' vectors as safetensors, with 16-bit numbers."""
    return bytes(save({"vectors": vectors.astype(np.float16)}))


def _make_name(identity: str) -> str:
    return f"{identity}.safetensors"
