"""The command of an offline run, as far as it works without a cluster."""

from __future__ import annotations

import json
import traceback
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import typer
from ray.exceptions import ActorDiedError, RayError, RayTaskError, UserCodeException

from deployments.auth import ray_token
from deployments.batch import dataset
from deployments.batch.output import BatchOutput
from deployments.batch.run import BatchSettings, begin
from deployments.cli.run_batch import run_batch
from deployments.config.app import AppConfig
from gpu_worker.errors import AdapterLoadFailed
from lora_store import Location
from lora_store.catalogue import Catalogue
from lora_store.events import Publish
from tests.deployments.adapter_records import BASE, adapter, given
from tests.deployments.batching import write_rows
from tests.deployments.scripted import words


@pytest.fixture
def settings(tmp_path: Path) -> BatchSettings:
    rows = write_rows(tmp_path / "in.parquet", [{"prompt": f"number {n}"} for n in range(5)])
    config = AppConfig(store_uri=str(tmp_path / "store"))
    Catalogue(Location(config.store_uri).child("catalogue"))
    return BatchSettings(config, str(rows), str(tmp_path / "out"), part_rows=2)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_complete_run_starts_nothing_and_says_what_is_not_served(
    as_json: bool, settings: BatchSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    Catalogue(Location(settings.config.store_uri).child("catalogue")).commit(lambda _: [Publish(adapter("poet"))])
    for part in begin(settings).parts:
        BatchOutput(settings.output_uri).write(part.number, pa.table({"text": ["x"] * (part.stop - part.start)}))
    run_batch(settings, address="no cluster is there", concurrency=1, as_json=as_json)
    printed = capsys.readouterr()
    if as_json:
        outcome = json.loads(printed.out)
        assert (outcome["output"], outcome["rows"], outcome["answered"]) == (settings.output_uri, 5, 0)
    else:
        said = words(printed.out)
        assert "5 rows in 3 parts, 3 of them already done; 0 adapters at generation 1" in said
        assert f"wrote all 5 rows to {settings.output_uri}" in said.replace("out ", "out")
        assert words(printed.err).startswith(f"1 adapter was made for {BASE} and is not served: start the server with")


def test_a_run_on_a_cluster_without_token_mode_is_refused(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_token, "is_token_auth_enabled", lambda: False)  # Ray reads the mode once
    with pytest.raises(typer.Exit):
        run_batch(settings, address="127.0.0.1:1", concurrency=1)
    assert "Ray runs without token authentication (RAY_AUTH_MODE is 'disabled')" in words(capsys.readouterr().err)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace Ray and its actors. Return the outcomes of the parts: numbers, or the error that ends the run."""
    outcomes: list[Any] = []
    monkeypatch.setattr(dataset, "cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr(dataset, "answer_parts", lambda *_: map(given, outcomes))
    for resources in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, resources, lambda: {"CPU": 64.0})
    return outcomes


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (None, "an engine needs 2 GPU, and Ray finds 0 on this machine: change worker.device"),
        ("a-cluster:1", "waiting until the cluster has 2 free GPU; now it has 0"),
    ],
)
def test_a_run_that_needs_more_gpus_than_there_are_says_so(
    address: str | None, says: str, settings: BatchSettings, fake_ray: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    worker = {"worker": {"engine": "vllm", "device": "cuda", "tensor_parallel_size": 2}}
    config = AppConfig.model_validate({"store_uri": settings.config.store_uri, **worker})
    with suppress(typer.Exit):
        run_batch(replace(settings, config=config), address=address, concurrency=1)
    assert says in words(capsys.readouterr().err)


def test_a_run_whose_parts_are_elsewhere_fails(
    settings: BatchSettings, fake_ray: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_ray += [{"num_rows": 2, "num_errors": 0}] * 3
    with pytest.raises(typer.Exit):
        run_batch(settings, address="a-cluster:1", concurrency=1)
    printed = capsys.readouterr()
    assert f"3 of 3 parts are not in {settings.output_uri}: machines of the cluster" in words(printed.err)
    assert "wrote all" not in printed.out


def remote_error(error: Exception, *, is_at_start: bool) -> RayError:
    """Return what Ray raises for an error of an actor, at its start or in a call."""
    try:
        try:
            raise error
        except Exception as exc:
            if is_at_start:
                raise
            raise UserCodeException("UDF failed to process a data block.") from exc
    except Exception as exc:
        failed = RayTaskError("call", traceback.format_exc(), exc)
    return ActorDiedError(failed) if is_at_start else failed


@pytest.mark.parametrize("is_at_start", [False, True])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (AdapterLoadFailed("the store cannot\nbe reached"), "the store cannot be reached; the same command continues"),
        (FileNotFoundError(2, "No such file", "in"), "[Errno 2] No such file: 'in'; the same command continues"),
        (KeyError("a mistake"), "KeyError: 'a mistake'"),
    ],
)
def test_what_ends_an_actor_is_said_without_a_stack_trace_unless_it_is_a_mistake(
    error: Exception,
    says: str,
    is_at_start: bool,
    settings: BatchSettings,
    fake_ray: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_ray.append(remote_error(error, is_at_start=is_at_start))
    with pytest.raises(typer.Exit):
        run_batch(settings, address="a-cluster:1", concurrency=1)
    said = words(capsys.readouterr().err)
    assert says in said and ('File "' in said) == isinstance(error, KeyError)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("https://bucket/out", "https://bucket/out cannot be written: "),
        ("s3:///out", "s3:///out cannot be written: "),
        ("{here}", "{here} is not empty and contains no resumable run"),
    ],
)
def test_an_output_that_cannot_be_used_is_refused_in_one_line(
    output: str, says: str, settings: BatchSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        run_batch(replace(settings, output_uri=output.format(here=tmp_path)), address=None, concurrency=1)
    printed = capsys.readouterr()
    assert (ended.value.exit_code, printed.out) == (1, "") and printed.err.startswith(says.format(here=tmp_path))
