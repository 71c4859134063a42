"""The encoder changes together with the index, at one generation."""

from __future__ import annotations

import numpy as np
import pytest

from lora_store.snapshot import ActiveEncoder
from retriever_svc import EncoderUnusable, LivePool
from retriever_svc.inverted_lists import InvertedLists
from tests.retriever_svc.live_pools import DIM, ENCODER, TINY, assert_finds_exactly, records_of
from tests.retriever_svc.pool_fakes import FakeEncoder, Later, Source, record_of

NEW = ActiveEncoder("new-model", "new")


class Models:
    """Loads the old encoder under any name except `new-model`, which exists once the test adds it."""

    def __init__(self) -> None:
        self.new: FakeEncoder | None = None

    def __call__(self, model: str) -> FakeEncoder:
        if model != NEW.model:
            return ENCODER
        if self.new is None:
            raise EncoderUnusable(model, "there is none")
        return self.new


def test_encoder_and_index_change_at_one_generation() -> None:
    models, source = Models(), Source(*records_of(5))
    models.new = FakeEncoder({}, dim=3, identity="new")
    pools = LivePool(models, source)
    old = pools.current
    renewed = [record_of(f"a{n}", vector, encoder="new") for n, vector in enumerate(np.eye(3, dtype=np.float32))]
    source.commit(*renewed, encoder=NEW)
    assert pools.catch_up() == 2
    new = pools.current
    assert (new.snapshot.generation, new.encoder, new.index.num_live) == (2, models.new, 3)
    assert [m.record.ref.name for m in new.nearest(np.eye(3, dtype=np.float32)[1:2], 1, "local")[0]] == ["a1"]
    assert (old.snapshot.generation, old.encoder, old.index.num_live) == (
        1,
        ENCODER,
        5,
    )  # its searches end with the encoder they began with


def test_the_old_generation_stays_in_service_until_the_new_encoder_loads() -> None:
    models, records = Models(), records_of(5)
    source = Source(*records)
    pools = LivePool(models, source)
    source.commit(*records_of(4, encoder="new"), encoder=NEW)
    for _ in range(2):
        with pytest.raises(EncoderUnusable, match="new-model"):
            pools.catch_up()
    assert pools.stats().generation == 1
    assert_finds_exactly(pools, records)
    models.new = FakeEncoder({}, dim=DIM, identity="new")
    assert pools.catch_up() == 2
    assert (pools.stats().encoder, pools.stats().num_live) == ("new", 4)


def test_a_prepared_encoder_is_used_after_activation() -> None:
    models, source = Models(), Source(*records_of(5))
    models.new = FakeEncoder({}, dim=DIM, identity="new")
    pools = LivePool(models, source)
    assert pools.prepare_encoder("new-model") is models.new
    assert pools.current.encoder is ENCODER
    models.new = None
    source.commit(encoder=NEW)
    pools.catch_up()
    assert pools.stats().encoder == "new"


def test_a_training_that_ends_after_its_encoder_was_replaced_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models, later = Models(), Later()
    models.new = FakeEncoder({}, dim=DIM, identity="new")
    source = Source(*records_of(60))
    pools = LivePool(models, source, settings=TINY, background=later)
    renewed = records_of(60, seed=1, encoder="new")
    train = InvertedLists.train

    def overtaken(vectors: np.ndarray) -> InvertedLists:
        source.commit(*renewed, encoder=NEW)
        pools.catch_up()
        return train(vectors)

    with monkeypatch.context() as patch:
        patch.setattr(InvertedLists, "train", overtaken)
        later.waiting.pop(0)()
    assert not pools.stats().has_lists
    assert_finds_exactly(pools, renewed)
    later.run()  # that of the new encoder
    assert pools.stats().has_lists
    assert_finds_exactly(pools, renewed)


def test_the_start_uses_the_active_encoder() -> None:
    loaded: list[str] = []

    def load(model: str) -> FakeEncoder:
        loaded.append(model)
        return FakeEncoder({}, dim=DIM, identity="new")

    source = Source()
    source.commit(*records_of(3, encoder="new"), encoder=NEW)
    pools = LivePool(load, source, model="the config's")
    assert (loaded, pools.stats().num_live) == (["new-model"], 3)
