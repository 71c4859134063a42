"""The start of an offline run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deployments.batch.run import BatchSettings, begin, check_devices
from deployments.config.app import AppConfig
from deployments.config.parts import ModelSettings
from deployments.errors import BatchRefused
from lora_store import Location
from lora_store.catalogue import Catalogue
from lora_store.events import Publish
from tests.deployments.adapter_records import BASE, adapter
from tests.deployments.batching import DEFAULTS, Place, prompts, write_rows


def make_settings(folder: Path, **settings: Any) -> BatchSettings:
    """Return a run of two rows over the pool of this folder."""
    write_rows(folder / "in.parquet", [{"prompt": "one"}, {"prompt": "two"}])
    config = AppConfig(store_uri=str(folder / "store"), **settings)
    return BatchSettings(config, str(folder / "in.parquet"), str(folder / "out"))


def open_catalogue(settings: BatchSettings) -> Catalogue:
    return Catalogue(Location(settings.config.store_uri).child("catalogue"))


def test_a_collected_generation_that_no_run_kept_is_refused_with_the_remedy(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, accepts_base=(BASE,))
    catalogue = open_catalogue(settings)
    catalogue.commit(lambda _: [Publish(adapter("poet"))])
    assert begin(settings).generation == 1
    catalogue.commit(lambda _: [Publish(adapter("poet", version="2"))])
    assert (begin(settings).generation, begin(settings).num_adapters) == (1, 1)
    catalogue.vacuum(datetime.now(UTC) + timedelta(days=1))
    (tmp_path / "out" / "_pool").unlink()  # a run of an earlier version has none
    with pytest.raises(BatchRefused, match=r"generation 1 of the pool is no longer stored.* in another output folder"):
        begin(settings)


def test_a_run_counts_the_adapters_of_other_bases_apart_and_keeps_its_bases(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, accepts_base=(BASE,))
    records = [adapter("poet"), replace(adapter("old"), base_model="org/old")]
    open_catalogue(settings).commit(lambda _: [Publish(item) for item in records])
    run = begin(settings)
    assert (run.num_adapters, run.unserved) == (1, (("org/old", 1),))
    with pytest.raises(BatchRefused, match=r"accepts_base was \['tiny-base'\], is \[\]"):
        begin(make_settings(tmp_path))


@pytest.mark.parametrize("are_several", [False, True])
def test_a_run_is_not_continued_with_the_text_of_another_chat_template(are_several: bool, tmp_path: Path) -> None:
    template = tmp_path / "a.jinja"
    template.write_text("{{ messages[0].content }}")

    def settings(file: Path | None) -> BatchSettings:
        own: dict[str, Any] = {"base_model": "org/a", "chat_template": file}
        return make_settings(tmp_path, **({"models": [own]} if are_several else own))

    open_catalogue(settings(None)).commit(lambda _: [Publish(adapter("poet"))])
    begin(settings(template))
    begin(settings(template))
    with pytest.raises(BatchRefused, match=r"chat_template.*None"):
        begin(settings(None))
    template.write_text("Answer in French: {{ messages[0].content }}")
    with pytest.raises(BatchRefused, match=r"chat_template.*sha256:"):
        begin(settings(template))


@pytest.mark.parametrize(("shares", "problem"), [((0.5, 0.5), None), ((1, 0.5), "add up to 1.5"), ((2, 0), None)])
def test_base_models_that_do_not_fit_on_one_gpu_are_refused(shares: Sequence[float], problem: str | None) -> None:
    models: list[dict[str, Any]] = [
        {
            "base_model": f"org/{number}",
            "worker": {"device": "cuda", "engine": "vllm", "tensor_parallel_size": max(1, int(share))} if share else {},
            "worker_scaling": {"ray_actor_options": {"num_gpus": share}},
        }
        for number, share in enumerate(shares)
    ]
    config = AppConfig.model_validate({"models": models})
    assert BatchSettings(config, "in", "out").engine_gpus == sum(shares)
    with nullcontext() if problem is None else pytest.raises(BatchRefused, match=problem):
        check_devices(config)


def test_a_run_with_other_rows_settings_or_defaults_is_refused(place: Place) -> None:
    def changed(name: str, **changes: Any) -> AppConfig:
        group = getattr(place.config, name)
        own = replace(group, **changes) if name == "worker" else group.model_copy(update=changes)
        return place.config.model_copy(update={name: own})

    rows = prompts(4)
    place.begin(rows)
    place.begin(rows, config=changed("worker", max_batch_size=2))  # changes no answer
    place.begin(rows, config=place.config.model_copy(update={"learning": "observe"}))
    for given, changes, says in (
        (rows[::-1], {}, r"in\.parquet was"),
        (rows, {"part_rows": 9}, "part_rows was 8, is 9"),
        (rows, {"defaults": DEFAULTS | {"max_tokens": 7}}, r"defaults\.max_tokens was 6, is 7"),
        (rows, {"config": place.config.model_copy(update={"learning": "apply"})}, "apply was False, is True"),
        (rows, {"config": place.config.model_copy(update={"strict_fields": True})}, "strict_fields was False, is True"),
        (rows, {"config": changed("retrieval", abstain="strict")}, "retrieval.abstain was 'balanced', is 'strict'"),
        (rows, {"config": changed("worker", dtype="bfloat16")}, "worker.dtype was 'float32', is 'bfloat16'"),
        (
            rows,
            {"config": changed("worker", dtype="bfloat16", quantization="int4")},
            "worker.quantization was 'none', is 'int4'",
        ),
        (
            rows,
            {"config": changed("sampling_defaults", temperature=0.0)},
            "sampling_defaults.temperature was None, is 0.0",
        ),
    ):
        with pytest.raises(BatchRefused, match=says):
            place.begin(given, **changes)


@pytest.mark.parametrize(("before", "now"), [(0, 2), (2, 3), (2, 1)])
def test_a_run_is_not_resumed_with_other_base_models(place: Place, before: int, now: int) -> None:
    def settings(count: int) -> AppConfig:
        models = tuple(ModelSettings(base_model=f"org/{number}") for number in range(count))
        return AppConfig(models=models, store_uri=place.config.store_uri, retrieval=place.config.retrieval)

    place.begin(prompts(4), config=settings(before))
    place.begin(prompts(4), config=settings(before))
    with pytest.raises(BatchRefused, match="base_model was "):
        place.begin(prompts(4), config=settings(now))
