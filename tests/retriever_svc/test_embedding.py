from __future__ import annotations

import math

import numpy as np

from lora_store.adapter import Sample
from lora_store.records import OutputProfile
from retriever_svc import embed_groups
from retriever_svc.calibration import leave_one_out_scores
from tests.retriever_svc.pool_fakes import FAKE_IDENTITY, FakeEncoder

TABLE = {"x": (1.0, 0.0), "y": (0.0, 1.0), "z": (0.6, 0.8)}


def samples(*texts: str) -> list[Sample]:
    return [Sample(text) for text in texts]


def test_an_adapter_is_embedded_by_the_normalised_mean_of_its_samples() -> None:
    [embedding] = embed_groups(FakeEncoder(TABLE), [samples("x", "y", "z")])
    assert embedding is not None
    mean = np.asarray([1.6, 1.8]) / 3
    np.testing.assert_allclose(embedding.vector, mean / np.linalg.norm(mean), atol=1e-6)
    assert embedding.vector.dtype == embedding.own_scores.dtype == np.float32
    assert embedding.encoder == FAKE_IDENTITY
    np.testing.assert_allclose(embedding.own_scores, leave_one_out_scores(np.asarray([*TABLE.values()])), atol=1e-6)


def test_many_samples_are_encoded_in_chunks_and_each_text_of_an_owner_once() -> None:
    table = {f"{number} {'x' * 2000}": (float(number), 1.0) for number in range(9)}
    encoder = FakeEncoder(table)
    groups = [samples(*table), samples(*reversed(table)), samples(*table)]
    first, second, _ = embed_groups(encoder, groups, ["a", "a", "b"])
    assert first is not None and second is not None
    assert [len(batch) for batch in encoder.batches] == [4, 4, 4, 4, 2]
    np.testing.assert_allclose(first.vector, second.vector, atol=1e-6)
    np.testing.assert_allclose(first.own_scores, second.own_scores[::-1], atol=1e-6)
    np.testing.assert_allclose(first.vector, np.asarray([4.0, 1.0]) / np.hypot(4, 1), atol=1e-6)


def test_few_samples_of_all_groups_are_encoded_by_one_call_and_one_without_samples_has_no_embedding() -> None:
    encoder = FakeEncoder(TABLE)
    first, none, last = embed_groups(encoder, [samples("x", "z"), [], samples("y")])
    assert encoder.batches == [["x", "z", "y"]]
    assert first is not None
    assert none is None
    assert last is not None
    assert last.vector.tolist() == [0, 1]
    assert len(last.own_scores) == 0
    assert embed_groups(encoder, []) == []


def test_samples_whose_vectors_are_not_finite_give_no_embedding() -> None:
    table = TABLE | {"bad": (math.nan, math.nan), "worse": (math.inf, 0.0)}
    outputs = [Sample("x", output) for output in ("bad", "y", "z", "x")]
    groups = [samples("x", "bad"), samples("y"), samples("worse"), outputs]
    found = embed_groups(FakeEncoder(table), groups)
    assert [embedding is not None for embedding in found] == [False, True, False, False]


def test_outputs_are_encoded_for_their_profile_and_do_not_move_the_adapter() -> None:
    outputs = {"one": (1.0, 0.0), "two": (1.0, 0.0), "three": (1.0, 0.0), "four": (0.0, 1.0)}
    encoder = FakeEncoder(TABLE | outputs)
    with_text = [Sample("x", output) for output in outputs]
    with_labels = [Sample("y", label) for label in ("yes", "no", "yes", "no")]
    text, labels, plain = embed_groups(encoder, [with_text, with_labels, samples("z")])
    assert text is not None and labels is not None and plain is not None
    assert [e.vector.tolist() for e in (text, labels)] == [[1, 0], [0, 1]]
    assert text.outputs is not None and text.outputs.vector is not None
    assert text.outputs.vector.tolist() == [127, 42]
    assert labels.outputs == OutputProfile(("no", "yes"))
    assert plain.outputs is None
    assert {text for batch in encoder.batches for text in batch} == {"x", "y", "z", *outputs}
