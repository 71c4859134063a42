from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_store.errors import StoreUnavailable
from lora_store.files import Files
from lora_store.location import Location
from retriever_svc import EncoderUnusable
from retriever_svc.encoder_files import DEFAULT_MODEL, ENGLISH_MODEL
from retriever_svc.errors import ProjectionUnusable
from retriever_svc.ordinary_prompts import bare_words, ordinary_prompts, prompts_digest
from retriever_svc.packaged_encoder import NAME
from retriever_svc.projection_files import ProjectionFiles, shipped_file
from retriever_svc.whitening import fit_whitening
from tests.retriever_svc.pool_fakes import FakeEncoder
from tests.retriever_svc.test_whitening import DIM, world
from tests.shared_encoders import shared_encoder

PACKAGED, UNTRAINED, ENGLISH = "934bba3becd2354b", "9ac5f0a15bd9adad", "20e072f1df80adcc"
PACKAGED_ENCODERS = [(DEFAULT_MODEL, PACKAGED), (NAME, UNTRAINED), (ENGLISH_MODEL, ENGLISH)]
PROMPTS = {text: np.random.default_rng(number).standard_normal(3) for number, text in enumerate(ordinary_prompts())}


def files_in(folder: Path) -> Files:
    return Files(Location(str(folder)).child("projections"))


class Down(Files):
    """A store that cannot be reached."""

    def read(self, name: str) -> bytes | None:
        raise StoreUnavailable("down")

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        raise StoreUnavailable("down")


@pytest.mark.parametrize(("model", "identity"), PACKAGED_ENCODERS)
def test_a_packaged_encoder_has_a_projection_of_its_own(model: str, identity: str) -> None:
    encoder, files = shared_encoder(model), ProjectionFiles()
    shipped = files.shipped(encoder.identity)
    assert encoder.identity == identity
    assert shipped is not None
    assert (shipped.encoder, shipped.matrix.shape, shipped.folds.shape[0]) == (identity, (384, 384), 0)
    assert files.find(shipped.identity).identity == shipped.identity == files.shipped(shipped.identity).identity
    projected = encoder.projected(shipped)
    text = ["Turn left at the bakery."]
    assert projected.identity == shipped.identity
    np.testing.assert_allclose(projected.encode(text), shipped.project(encoder.encode(text)), atol=1e-6)
    np.testing.assert_array_equal(projected.encode_plain(text), encoder.encode(text))
    assert projected.projected(None).identity == identity
    with pytest.raises(EncoderUnusable, match="was made for another encoder"):
        encoder.projected(fit_whitening("another", world()))


@pytest.mark.parametrize(("model", "identity"), PACKAGED_ENCODERS)
def test_the_packaged_vectors_are_those_of_the_packaged_prompts(model: str, identity: str) -> None:
    encoder, files = shared_encoder(model), ProjectionFiles()
    vectors = files.ordinary(encoder)
    texts = ordinary_prompts()
    assert vectors.shape == (len(texts), 384)
    some = [*range(0, len(texts), 20), len(texts) - 1]
    np.testing.assert_allclose(vectors[some], encoder.encode([texts[n] for n in some]), atol=2e-3)
    projected = encoder.projected(files.shipped(identity))
    np.testing.assert_allclose(files.ordinary(projected), projected.projection.project(vectors), atol=1e-6)


def test_a_saved_projection_is_found_by_its_identity(tmp_path: Path) -> None:
    fitted, other = fit_whitening("another", world()), fit_whitening("another", world(seed=1))
    ProjectionFiles(files_in(tmp_path)).save(fitted)
    again = ProjectionFiles(files_in(tmp_path)).find(fitted.identity)
    assert again is not None
    np.testing.assert_array_equal(again.matrix, fitted.matrix)
    assert again.project(world()[0]).shape == (20, DIM)
    files_in(tmp_path / "other").write(f"{fitted.identity}.safetensors", other.to_bytes())
    for files in (*(ProjectionFiles(files_in(tmp_path / name)) for name in ("empty", "other")), ProjectionFiles()):
        with pytest.raises(ProjectionUnusable, match="is missing next to the catalogue: reindex"):
            files.find(fitted.identity)
    assert ProjectionFiles().shipped("another") is ProjectionFiles().find("another") is None
    assert not shipped_file("another").exists()


def test_ordinary_prompts_are_encoded_once_for_each_encoder_and_saved(tmp_path: Path) -> None:
    encoder = FakeEncoder(PROMPTS, dim=3, identity="another")
    files = ProjectionFiles(files_in(tmp_path))
    vectors = files.ordinary(encoder)
    np.testing.assert_array_equal(vectors, np.asarray([*PROMPTS.values()], np.float32))
    files.ordinary(encoder)
    successor = FakeEncoder({}, dim=3, identity="another")
    np.testing.assert_allclose(ProjectionFiles(files_in(tmp_path)).ordinary(successor), vectors, rtol=1e-2, atol=1e-2)
    assert (len(encoder.batches), successor.batches) == (1, [])


def test_a_damaged_file_or_a_store_that_is_down_costs_one_encoding(tmp_path: Path) -> None:
    name = f"another-{prompts_digest()[:16]}.ordinary.safetensors"
    files_in(tmp_path).write(name, b"damaged")
    for place in (files_in(tmp_path), Down(Location(str(tmp_path)).child("projections"))):
        encoder = FakeEncoder(PROMPTS, dim=3, identity="another")
        assert ProjectionFiles(place).ordinary(encoder).shape == (len(PROMPTS), 3)
        assert len(encoder.batches) == 1


def test_a_store_that_is_down_stops_only_a_start_that_needs_its_projection(caplog: pytest.LogCaptureFixture) -> None:
    fitted = fit_whitening(PACKAGED, world())
    files = ProjectionFiles(Down(Location("unused")))
    files.keep(fitted)
    assert "cannot store the packaged projection" in caplog.text
    with pytest.raises(StoreUnavailable):  # a replica without it would find nothing for its lifetime
        files.embedded_with(fitted.identity, PACKAGED)


def test_a_packaged_projection_is_stored_once(tmp_path: Path) -> None:
    fitted, files = fit_whitening(PACKAGED, world()), ProjectionFiles(files_in(tmp_path))
    files.keep(fitted)
    [stored] = tmp_path.rglob("*.safetensors")
    before = stored.stat().st_mtime_ns
    files.keep(fitted)
    assert stored.stat().st_mtime_ns == before
    assert files.embedded_with(fitted.identity, PACKAGED).identity == fitted.identity
    assert files.embedded_with(fitted.identity, "another") is None


def test_only_an_encoder_without_a_projection_has_a_centre() -> None:
    files, plain = ProjectionFiles(), FakeEncoder(PROMPTS, dim=3)
    ordinary = files.ordinary(plain)
    np.testing.assert_allclose(files.centre(plain), ordinary[~bare_words(len(ordinary))].mean(axis=0))
    plain.projection = fit_whitening(plain.identity, world())
    assert files.centre(plain) is None
