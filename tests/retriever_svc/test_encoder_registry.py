from __future__ import annotations

import pytest

from lora_store.snapshot import ActiveEncoder
from retriever_svc.encoder_registry import EncoderRegistry
from retriever_svc.errors import EncoderUnusable
from tests.retriever_svc.pool_fakes import FakeEncoder

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
    assert encoders.encoder_of(None) is encoders.encoder_of(None)
    assert encoders.encoder_of(NEW).identity == "new"
    assert encoders.encoder_of(NEW) is encoders.encoder_of(NEW)
    assert models.loaded == ["default-model", "new-model"]


def test_only_the_active_encoder_is_loaded_at_the_start() -> None:
    models = Models()
    assert EncoderRegistry(models, "default-model").encoder_of(NEW).identity == "new"
    assert models.loaded == ["new-model"]


def test_activating_the_active_identity_loads_nothing() -> None:
    models = Models()
    encoders = EncoderRegistry(models, "default-model")
    assert encoders.encoder_of(None) is encoders.encoder_of(ActiveEncoder("the same under another name", "default"))
    assert models.loaded == ["default-model"]


def test_a_prepared_encoder_takes_over_without_being_loaded_again() -> None:
    models = Models()
    encoders = EncoderRegistry(models, "default-model")
    prepared = encoders.prepare("new-model")
    assert encoders.encoder_of(None).identity == "default"
    assert encoders.encoder_of(NEW) is prepared
    assert models.loaded == ["new-model", "default-model"]


def test_a_rewritten_folder_is_read_again() -> None:
    models = Models()
    encoders = EncoderRegistry(models, "default-model")
    encoders.prepare("new-model")
    models.identities["new-model"] = "newer"
    assert encoders.prepare("new-model").identity == "newer"
    models.identities["new-model"] = "new"
    assert encoders.encoder_of(NEW).identity == "new"  # the prepared one is not used


@pytest.mark.parametrize(
    ("found", "reason"), [("newer", "identity newer, but the pool's embeddings have new"), (None, "there is none")]
)
def test_an_encoder_that_is_not_the_pools_is_refused_and_the_active_one_stays(found: str | None, reason: str) -> None:
    models = Models()
    encoders = EncoderRegistry(models, "default-model")
    before = encoders.encoder_of(None)
    models.identities = {"default-model": "default"} | ({"new-model": found} if found else {})
    for _ in range(2):
        with pytest.raises(EncoderUnusable, match=reason) as caught:
            encoders.encoder_of(NEW)
        assert caught.value.model == "new-model"
    assert encoders.encoder_of(ActiveEncoder("default-model", "default")) is before
