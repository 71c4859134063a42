from __future__ import annotations

from pathlib import Path

import pytest

from lora_store.errors import StoreUnavailable
from lora_store.files import Files
from lora_store.location import Location
from lora_store.snapshot import ActiveEncoder
from retriever_svc.encoder_files import DEFAULT_MODEL, EARLIER_MODELS
from retriever_svc.encoder_registry import EncoderRegistry
from retriever_svc.errors import EncoderUnusable, ProjectionUnusable
from retriever_svc.projection_files import ProjectionFiles
from retriever_svc.whitening import Whitening, fit_whitening, split_identity
from tests.retriever_svc.pool_fakes import FakeEncoder
from tests.retriever_svc.projectable import Projectable
from tests.retriever_svc.test_whitening import world

NEW = ActiveEncoder("new-model", "new")


class Models:
    """Models by name, as they are on disk now."""

    def __init__(self) -> None:
        self.identities = {"default-model": "default", "new-model": "new"}
        self.loaded: list[str] = []

    def __call__(self, model: str) -> FakeEncoder:
        if model not in self.identities:
            raise EncoderUnusable(model, "there is none")
        self.loaded.append(model)
        return FakeEncoder({}, identity=self.identities[model])


def test_the_default_is_active_until_another_is_activated() -> None:
    models = Models()
    encoders = EncoderRegistry(models, "default-model")
    assert models.loaded == []
    default = encoders.load_encoder(None)
    assert default is encoders.load_encoder(None)
    assert default is encoders.load_encoder(ActiveEncoder("the same under another name", "default"))
    assert encoders.load_encoder(NEW).identity == "new"
    assert encoders.load_encoder(NEW) is encoders.load_encoder(NEW)
    assert models.loaded == ["default-model", "new-model"]
    later = Models()
    assert EncoderRegistry(later, "default-model").load_encoder(NEW).identity == "new"
    assert later.loaded == ["new-model"]


def test_a_prepared_encoder_takes_over_and_later_rounds_of_a_reindex_load_none() -> None:
    models = Models()
    encoders = EncoderRegistry(models, "default-model")
    encoders.load_encoder(None)
    first = encoders.prepare("new-model")
    assert all(encoders.prepare("new-model", first.identity) is first for _ in range(2))
    assert encoders.load_encoder(None).identity == "default"
    assert encoders.load_encoder(NEW) is first is encoders.prepare("new-model", first.identity)
    assert models.loaded == ["default-model", "new-model"]


def test_a_rewritten_folder_is_read_again() -> None:
    models = Models()
    encoders = EncoderRegistry(models, "default-model")
    encoders.prepare("new-model")
    models.identities["new-model"] = "newer"
    assert encoders.prepare("new-model").identity == "newer"
    models.identities["new-model"] = "new"
    assert encoders.load_encoder(NEW).identity == "new"  # the prepared one is not used


@pytest.mark.parametrize(
    ("found", "reason"), [("newer", "identity newer, but the pool's embeddings have new"), (None, "there is none")]
)
def test_an_encoder_that_is_not_the_pools_is_refused_and_the_active_one_stays(found: str | None, reason: str) -> None:
    models = Models()
    encoders = EncoderRegistry(models, "default-model")
    before = encoders.load_encoder(None)
    models.identities = {"default-model": "default"} | ({"new-model": found} if found else {})
    for _ in range(2):
        with pytest.raises(EncoderUnusable, match=reason) as caught:
            encoders.load_encoder(NEW)
        assert caught.value.model == "new-model"
    assert encoders.load_encoder(ActiveEncoder("default-model", "default")) is before


def test_an_encoder_whose_folder_is_missing_is_replaced_by_an_equal_default() -> None:
    """The pool of another machine was reindexed with the same encoder in a folder that is not here."""
    encoders = EncoderRegistry(Models(), "default-model")
    assert encoders.load_encoder(ActiveEncoder("/not/here", "default")).identity == "default"
    with pytest.raises(EncoderUnusable, match="there is none") as caught:
        encoders.load_encoder(ActiveEncoder("/not/here", "another"))
    assert caught.value.model == "/not/here"


class Shipped(ProjectionFiles):
    """Files with a packaged projection for the encoder `default`."""

    packaged = fit_whitening("default", world())

    def shipped(self, encoder: str) -> Whitening | None:
        return self.packaged if split_identity(encoder)[0] == "default" else None


def projectable(identity: str) -> EncoderRegistry:
    return EncoderRegistry(lambda model: Projectable({}, identity=identity), "model", Shipped())


def test_the_packaged_projection_follows_the_default_encoder() -> None:
    encoder = projectable("default").load_encoder(None)
    assert (encoder.projection, encoder.identity) == (Shipped.packaged, Shipped.packaged.identity)
    assert projectable("another").load_encoder(None).identity == "another"
    none = EncoderRegistry(lambda model: Projectable({}, identity="default"), "model", Shipped(), "none")
    assert none.load_encoder(None).identity == "default"


def test_a_pool_embedded_without_a_projection_stays_so_until_a_reindex() -> None:
    encoders = projectable("default")
    assert encoders.load_encoder(None, embedded_by="default").identity == "default"
    active = ActiveEncoder("model", encoders.prepare("model").identity)
    assert encoders.load_encoder(active).projection is Shipped.packaged
    assert projectable("default").load_encoder(None, embedded_by="older").projection is Shipped.packaged


def test_a_pool_stays_with_the_projection_that_embedded_it_until_a_reindex() -> None:
    class Away(Shipped):
        def find(self, identity: str) -> Whitening | None:
            raise StoreUnavailable("endpoint down")

    def load(files: ProjectionFiles, model: str = "default") -> FakeEncoder:
        encoders = EncoderRegistry(lambda _: Projectable({}, identity=model), "model", files, "none")
        return encoders.load_encoder(None, embedded_by=Shipped.packaged.identity)

    assert load(Shipped()).identity == Shipped.packaged.identity
    assert load(Shipped(), "another").identity == "another"
    with pytest.raises(StoreUnavailable):
        load(Away())


class Later(Shipped):
    """The files of a later version, with another packaged projection."""

    packaged = fit_whitening("default", world(seed=9))


def test_a_later_version_serves_a_pool_with_the_projection_that_embedded_it(tmp_path: Path) -> None:
    stored = Files(Location(str(tmp_path)).child("projections"))

    def version(files: ProjectionFiles, model: str = "default") -> EncoderRegistry:
        return EncoderRegistry(lambda _: Projectable({}, identity=model), "model", files)

    earlier = version(Shipped(stored)).load_encoder(None).identity
    assert version(Later(stored)).load_encoder(None, embedded_by=earlier).identity == earlier
    assert version(Later(stored)).load_encoder(ActiveEncoder("model", earlier)).identity == earlier
    assert version(Later(stored)).load_encoder(None).identity == Later.packaged.identity  # a new pool
    assert version(Later(stored)).prepare("model").identity == Later.packaged.identity  # a reindex
    assert version(Later(), "default").load_encoder(None, embedded_by=earlier).identity == Later.packaged.identity
    assert version(Later(stored), "another").load_encoder(None, embedded_by=earlier).identity == "another"


def test_an_identity_with_a_projection_is_activated_with_it(tmp_path: Path) -> None:
    fitted = fit_whitening("default", world(seed=3))
    files = Shipped(Files(Location(str(tmp_path)).child("projections")))
    files.save(fitted)
    encoders = EncoderRegistry(lambda model: Projectable({}, identity="default"), "model", files)
    assert encoders.load_encoder(ActiveEncoder("model", fitted.identity)).identity == fitted.identity
    assert encoders.load_encoder(ActiveEncoder("model", "default")).projection is None
    assert encoders.load_encoder(ActiveEncoder("model", Shipped.packaged.identity)).projection is not None
    for projection, identity in (("none", "default"), ("auto", Shipped.packaged.identity), (fitted.identity,) * 2):
        assert encoders.prepare("model", projection).identity == identity
    with pytest.raises(ProjectionUnusable, match="is missing"):
        encoders.load_encoder(ActiveEncoder("model", "default+0123456789abcdef"))


@pytest.mark.parametrize("model", EARLIER_MODELS)
def test_a_pool_of_an_earlier_default_is_served_by_it_until_a_reindex(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool of version 0.1.0 has no active encoder: its default embedded it."""
    identities = {name: f"of {name}" for name in EARLIER_MODELS} | {DEFAULT_MODEL: "new-default", model: "default"}

    def version(projection: str = "auto") -> EncoderRegistry:
        load = lambda model: Projectable({}, identity=identities[model])  # noqa: E731
        return EncoderRegistry(load, DEFAULT_MODEL, Shipped(), projection)

    for embedded_by in (Shipped.packaged.identity, "default"):
        encoders = version()
        assert encoders.load_encoder(None, embedded_by=embedded_by).identity == embedded_by
        assert (
            f"embedded by {model}" in caplog.text
            and f"`loraretriever pool reindex --encoder {DEFAULT_MODEL}`" in caplog.text
        )
        prepared = encoders.prepare(DEFAULT_MODEL)
        assert prepared.identity == "new-default"
        assert encoders.load_encoder(None).identity == embedded_by
        assert encoders.load_encoder(ActiveEncoder(DEFAULT_MODEL, "new-default")) is prepared
        caplog.clear()
    for embedded_by in (None, "new-default", "another", "another+0123456789abcdef"):
        assert version().load_encoder(None, embedded_by=embedded_by).identity == "new-default"
    assert caplog.text == ""


def test_without_the_earlier_defaults_package_the_new_one_serves() -> None:
    def load(model: str) -> Projectable:
        if model in EARLIER_MODELS:
            raise EncoderUnusable(model, "not installed")
        return Projectable({}, identity="new-default")

    encoders = EncoderRegistry(load, DEFAULT_MODEL, Shipped())
    assert encoders.load_encoder(None, embedded_by=Shipped.packaged.identity).identity == "new-default"
