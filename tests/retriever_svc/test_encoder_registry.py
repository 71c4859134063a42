from __future__ import annotations

import pytest

from lora_store.snapshot import ActiveEncoder
from retriever_svc.encoder_registry import Encoders
from retriever_svc.errors import EncoderUnusable
from tests.retriever_svc.pool_fakes import FakeEncoder

NEW = ActiveEncoder("new-model", "new")


class Models:
    """Models by name, as they lie on the disk right now."""

    def __init__(self) -> None:
        self.identities = {"default-model": "default", "new-model": "new"}
        self.loaded: list[str] = []

    def __call__(self, model: str) -> FakeEncoder:
        if model not in self.identities:
            raise EncoderUnusable(model, "there is none")
        self.loaded.append(model)
        return FakeEncoder({}, identity=self.identities[model])


def test_the_default_is_in_force_until_another_is_activated() -> None:
    models = Models()
    encoders = Encoders(models, "default-model")
    assert models.loaded == []
    assert encoders.in_force(None) is encoders.in_force(None)
    assert encoders.in_force(NEW).identity == "new"
    assert encoders.in_force(NEW) is encoders.in_force(NEW)
    assert models.loaded == ["default-model", "new-model"]


def test_what_is_active_at_start_is_the_only_one_loaded() -> None:
    models = Models()
    assert Encoders(models, "default-model").in_force(NEW).identity == "new"
    assert models.loaded == ["new-model"]


def test_activating_the_identity_in_force_loads_nothing() -> None:
    models = Models()
    encoders = Encoders(models, "default-model")
    assert encoders.in_force(None) is encoders.in_force(ActiveEncoder("the same under another name", "default"))
    assert models.loaded == ["default-model"]


def test_a_prepared_encoder_takes_over_without_being_loaded_again() -> None:
    models = Models()
    encoders = Encoders(models, "default-model")
    prepared = encoders.prepare("new-model")
    assert encoders.in_force(None).identity == "default"
    assert encoders.in_force(NEW) is prepared
    assert models.loaded == ["new-model", "default-model"]


def test_a_folder_written_anew_is_read_anew() -> None:
    models = Models()
    encoders = Encoders(models, "default-model")
    encoders.prepare("new-model")
    models.identities["new-model"] = "newer"
    assert encoders.prepare("new-model").identity == "newer"
    models.identities["new-model"] = "new"
    assert encoders.in_force(NEW).identity == "new"  # the one prepared is passed over


@pytest.mark.parametrize(("found", "reason"), [("newer", "identity new, and this is newer"), (None, "there is none")])
def test_what_is_not_the_encoder_of_the_pool_is_refused_and_the_one_in_force_stays(
    found: str | None, reason: str
) -> None:
    models = Models()
    encoders = Encoders(models, "default-model")
    before = encoders.in_force(None)
    models.identities = {"default-model": "default"} | ({"new-model": found} if found else {})
    for _ in range(2):
        with pytest.raises(EncoderUnusable, match=reason) as caught:
            encoders.in_force(NEW)
        assert caught.value.model == "new-model"
    assert encoders.in_force(ActiveEncoder("default-model", "default")) is before
