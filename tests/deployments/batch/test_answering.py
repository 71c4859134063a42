"""Both stages of an offline run without Ray: a real store, a real encoder and an engine over a tiny model.

Which engine answers an offline run: the one that the settings name.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from contextlib import closing
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.batch.answering import PartAnswerer
from deployments.batch.offline import LoraRetriever
from deployments.batch.planning import PartPlanner
from deployments.batch.rows import Asked
from deployments.batch.run import BatchRun
from deployments.config.app import AppConfig
from deployments.errors import BatchRefused
from deployments.weights import RetryPolicy
from gpu_worker.config import VllmSettings
from gpu_worker.errors import AdapterLoadFailed, BaseModelUnsupported, EngineFull, WorkerConfigInvalid
from gpu_worker.front.grammar.compiler import GrammarCompiler
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.engine import NativeEngine
from lora_store import STRATEGIES, AdapterNotFound, GenerationGone, Location, LoraStore, StoreUnavailable
from lora_store.catalogue import CATALOGUE, Catalogue
from lora_store.usage import SUMS, UsageQuery
from tests.deployments.batching import BASE, TOPICS, TOPICS_OF, Place, prompts, publish, tiny_app
from tests.tiny import byte_tokenizer, gemma3_with_wide_heads, linear_shapes, tiny_config

POISON = "~"  # one byte, one token


async def answer(run: BatchRun, answerer: PartAnswerer) -> list[dict[str, int]]:
    """Answer the remaining parts, two at a time, as an actor does."""
    planner = PartPlanner(run)
    planned = [await planner.plan(part) for part in run.parts]
    return list(await asyncio.gather(*[answerer.answer(part) for part in planned]))


async def test_rows_of_every_kind_are_answered_and_bad_ones_keep_their_error(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prompts(18)
    bad: dict[int, tuple[dict[str, Any], str]] = {
        1: ({"prompt": None}, "invalid_request"),
        4: ({"lora": '{"strategey": "fusion"}'}, "invalid_request"),
        5: ({"model": "nobody"}, "model_not_found"),
        9: ({"prompt": "x" * 600}, "context_length_exceeded"),
        11: ({"max_tokens": 9000}, "invalid_request"),
        12: ({"lora": '{"min_generation": 99}'}, "stale_index"),
        13: ({"lora": '{"min_score": 1.0, "fallback": "error"}'}, "no_adapter_matched"),
    }
    for number, (change, _) in bad.items():
        rows[number] = rows[number] | {"model": None, "lora": None} | change
    run = place.begin(rows)
    usage = LoraStore(place.config.store_uri, accepts_base=[BASE]).usage
    query = UsageQuery(date(2000, 1, 1), date(2100, 1, 1), ("key", "base"), run.settings.tenant)
    before = next(iter(usage.sums(query)), dict.fromkeys(SUMS, 0))
    with closing(PartAnswerer(run)) as answerer:
        reported = await answer(run, answerer)
        tomorrow = time.time() + 86_400
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: tomorrow)
            await answer(replace(run, parts=run.parts[:1]), answerer)  # counts once
    [after] = usage.sums(query)
    tokens = [sum(row[name] or 0 for row in place.written()) for name in ("num_prompt_tokens", "num_new_tokens")]
    assert (after["key"], after["base"]) == ("batch", place.config.served_model.name)
    counted = [after[name] - before[name] for name in ("requests", "errors", "prompt_tokens", "completion_tokens")]
    assert counted == [len(rows), len(bad), *tokens]
    assert [part["num_rows"] for part in reported] == [8, 8, 2]
    assert sum(part["num_errors"] for part in reported) == len(bad)
    found = place.written()
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert {n: row["error"]["code"] for n, row in enumerate(found) if row["error"]} == {
        number: code for number, (_, code) in bad.items()
    }
    strategies = {0: "mixture", 7: "fusion", 2: "base", 3: "top_p_mixture", 10: "mixture", 17: "selection"}
    assert {number: found[number]["strategy"] for number in strategies} == strategies
    assert found[0]["adapters"][0]["name"] == "the-sea"
    assert [adapter["weight"] for adapter in found[10]["adapters"]] == [0.5, 1.0]
    assert (found[17]["num_new_tokens"], found[0]["num_new_tokens"], found[17]["finish_reason"]) == (5, 6, "length")


@pytest.mark.parametrize("is_collected", [False, True])
async def test_a_resumed_run_answers_the_missing_parts_from_the_same_generation(
    is_collected: bool, place: Place, model: Path, tmp_path: Path
) -> None:
    own = replace(place, config=tiny_app(model, str(tmp_path / "pool")))
    shapes = linear_shapes(load_base_model(tiny_config(model)))
    publish(own.config, shapes, tmp_path / "adapters", TOPICS[:2])
    rows = [{"prompt": "Tell me about wild bees", "model": name} for name in (None, "wild-bees", None, "the-sea")]
    run = own.begin(rows, part_rows=2)
    with closing(PartAnswerer(run)) as answerer:
        await answer(replace(run, parts=run.parts[:1]), answerer)
        first = next((place.folder / "out").glob("part-*"))
        before = first.stat()
        publish(own.config, shapes, tmp_path / "later", ["wild bees"])
        LoraStore(own.config.store_uri, accepts_base=[BASE]).withdraw("local", ["the-sea"], "tester")
        if is_collected:
            catalogue = Catalogue(Location(own.config.store_uri).child(CATALOGUE))
            catalogue.vacuum(datetime.now(UTC) + timedelta(days=1))
            with pytest.raises(GenerationGone):
                catalogue.snapshot_at(1)
        again = own.begin(rows, part_rows=2)
        assert (again.generation, again.num_done, [part.number for part in again.parts]) == (1, 1, [1])
        await answer(again, answerer)
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    found = own.written()
    assert [row["error"] and row["error"]["code"] for row in found] == [None, "model_not_found", None, None]
    assert {adapter["name"] for row in found if row["adapters"] for adapter in row["adapters"]} == {
        "the-sea",
        "old-trains",
    }
    assert own.begin(rows, part_rows=2).parts == ()


async def test_an_engine_that_does_not_start_is_the_error_of_the_first_part(place: Place, tmp_path: Path) -> None:
    run = place.begin([{"prompt": "The sea"}])
    config = place.config.model_copy(update={"base_model": str(tmp_path)})
    answerer = PartAnswerer(replace(run, settings=replace(run.settings, config=config)))
    with closing(answerer), pytest.raises(BaseModelUnsupported, match="Unrecognized model"):
        await answer(run, answerer)


async def test_a_relative_output_is_that_of_the_process_that_began_the_run(
    place: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    run = place.begin([{"prompt": "The sea"}], output_uri="out")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with closing(PartAnswerer(run)) as answerer:
        await answer(run, answerer)
    assert len(place.written()) == 1


async def test_a_run_deletes_no_usage_whatever_its_settings_keep(place: Place) -> None:
    usage = LoraStore(place.config.store_uri, accepts_base=[BASE]).usage
    query = UsageQuery(date(2000, 1, 1), date(2100, 1, 1), (), "long-gone")
    event = {"time": 1_000_000_000_000, "tenant": "long-gone", "adapters": [], "status": 200, "code": ""}
    usage.put("a" * 32, json.dumps(event).encode(), datetime.now(UTC), timedelta(36_500))
    run = place.begin([{"prompt": "The sea"}])
    with closing(PartAnswerer(run)) as answerer:
        await answer(run, answerer)
    assert [row["requests"] for row in usage.sums(query)] == [1]


async def test_rows_of_several_base_models_are_written_and_counted_by_base(
    two_bases: AppConfig, tmp_path: Path
) -> None:
    place = Place(tmp_path, two_bases)
    topics = ("the sea", "wild bees", "good bread", "old trains", "wild bees")
    expected = ["first", "second", "second", "first", "second"]
    rows = [{"prompt": f"Explain {topic}, please."} for topic in topics]
    run = place.begin(rows, part_rows=3)
    assert (run.num_adapters, run.unserved) == (4, ())
    with closing(PartAnswerer(run)) as answerer:
        await answer(run, answerer)
    found = place.written()
    assert [(row["prompt"], row["base_model"], row["error"]) for row in found] == [
        (row["prompt"], base, None) for row, base in zip(rows, expected, strict=True)
    ]
    query = UsageQuery(date(2000, 1, 1), date(2100, 1, 1), ("base",), run.settings.tenant)
    usage = LoraStore(two_bases.store_uri, accepts_base=two_bases.served_models.accepted_names).usage
    assert {row["base"]: row["requests"] for row in usage.sums(query)} == {"first": 2, "second": 3}
    first, second = two_bases.models
    worker = replace(second.worker, dtype="bfloat16")
    other = two_bases.model_copy(update={"models": (first, second.model_copy(update={"worker": worker}))})
    with pytest.raises(BatchRefused, match=r"models\.1\.worker\.dtype was 'float32', is 'bfloat16'"):
        place.begin(rows, part_rows=3, config=other)
    with pytest.raises(BatchRefused, match="a column 'base_model'"):
        place.begin([row | {"base_model": "x"} for row in rows], config=other)


async def test_a_row_that_makes_a_step_fail_does_not_affect_others(place: Place) -> None:
    rows = [{"prompt": f"The sea {n}", "model": BASE} for n in range(12)]
    rows[5]["prompt"] = f"Say {POISON}"
    run = place.begin(rows, part_rows=6)
    with closing(PartAnswerer(run)) as answerer:
        engine = answerer.named("").engine
        assert isinstance(engine, NativeEngine) and engine.loop.num_steps == 0, "warmed up"
        [token] = engine.loop.base.tokenizer(POISON, add_special_tokens=False).input_ids

        def break_on_poison(module: Any, args: Any, kwargs: Any) -> None:
            if (kwargs["input_ids"] == token).any():
                raise RuntimeError("this one")

        engine.loop.base.model.register_forward_pre_hook(break_on_poison, with_kwargs=True)
        await answer(run, answerer)
    found = place.written()
    assert [n for n, row in enumerate(found) if row["error"]] == [5]
    assert found[5]["error"]["code"] == "request_failed"
    assert all(row["num_new_tokens"] == 6 for n, row in enumerate(found) if n != 5)


async def test_rows_wait_for_weights_and_a_part_that_never_gets_them_is_not_written(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.batch.answering.REPEAT_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr("deployments.weights.RetryPolicy", lambda: RetryPolicy(max_tries=1))
    store = LoraStore(place.config.store_uri, accepts_base=[BASE])
    lost = store.snapshot().records["local", "wild-bees"].weights_digest
    failures, read = ["no route"] * 3, LoraStore.read_parts

    def fail_first(store: LoraStore, digest: str) -> Any:
        if digest == lost:
            raise AdapterNotFound(digest)
        if failures:
            raise StoreUnavailable(failures.pop())
        return read(store, digest)

    monkeypatch.setattr(LoraStore, "read_parts", fail_first)
    run = place.begin([{"prompt": "Hello", "model": name} for name in ("the-sea", "wild-bees")])
    with closing(PartAnswerer(run)) as answerer:
        with pytest.raises(AdapterLoadFailed, match="cannot be reached"):
            await answer(run, answerer)
        assert (failures, list((place.folder / "out").glob("part-*"))) == ([], [])
        failures += ["no route"] * 2
        await answer(run, answerer)
    assert [row["error"] and row["error"]["code"] for row in place.written()] == [None, "unavailable"]


def choose_word(asked: Asked, word: str) -> Asked:
    """Return the planned row with a grammar of its own, which allows this word only."""
    assert asked.job is not None
    sampling = replace(asked.job.sampling, grammar=Grammar.of_choices([word], "structured_outputs"))
    return replace(asked, job=replace(asked.job, sampling=sampling))


@pytest.mark.parametrize("max_pending", [0, 2])
async def test_rows_wait_for_the_compiler_and_a_part_that_gets_no_place_is_not_written(
    max_pending: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.batch.answering.REPEAT_PAUSES_S", (0.0, 0.0))
    compiler = partial(GrammarCompiler, max_pending=max_pending)
    monkeypatch.setattr("gpu_worker.front.preprocess.GrammarCompiler", compiler)
    words = [f"word{n}" for n in range(7)]
    run = place.begin([{"prompt": word, "model": BASE} for word in words])
    planned = await PartPlanner(run).plan(run.parts[0])
    planned = replace(planned, asked=tuple(map(choose_word, planned.asked, words)))
    with closing(PartAnswerer(run)) as answerer:
        if max_pending:
            assert await answerer.answer(planned) == {"num_rows": len(words), "num_errors": 0}
            assert [row["text"] for row in place.written()] == words
        else:
            with pytest.raises(EngineFull, match="0 grammars are waiting for the compiler; retry later"):
                await answerer.answer(planned)
            assert not list((place.folder / "out").glob("part-*"))


HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_refused_and_no_other_answers(pool: AppConfig) -> None:
    with pytest.raises(WorkerConfigInvalid, match=r"'vllm' needs the package vLLM.*docs/how-to/install\.md"):
        LoraRetriever(pool.model_copy(update={"worker": VllmSettings()}))


def test_an_engine_answers_from_any_event_loop_until_it_is_closed(place: Place) -> None:
    run = place.begin(prompts(6))
    with closing(PartAnswerer(run)) as answerer:
        assert asyncio.run(answer(run, answerer)) == asyncio.run(answer(run, answerer))
    assert not answerer.named("").engine.health().is_alive


def wide_gemma3(folder: Path) -> Path:
    """Save a tiny model that vLLM serves."""
    torch.manual_seed(0)
    model = gemma3_with_wide_heads()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight  # tied to the head
        embeddings /= 8
        embeddings[256:] = 0  # no special token is ever chosen
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_one_process_answers_with_an_engine_of_each_kind(two_bases: AppConfig, tmp_path: Path) -> None:
    folder = wide_gemma3(tmp_path / "model")
    worker = tiny_app(folder, "unused", engine="vllm", enforce_eager=True, num_threads=1).worker
    native, second = two_bases.models
    models = (native, second.model_copy(update={"base_model": str(folder), "worker": worker}))
    config = AppConfig(models=models, store_uri=str(tmp_path / "pool"), retrieval=two_bases.retrieval)
    for model in models:
        name = model.served_base_name
        shapes = linear_shapes(load_base_model(tiny_config(Path(model.base_model))))
        publish(config, shapes, tmp_path / name, TOPICS_OF[name], base=name)
    texts = [f"Explain {topic}, please." for pair in zip(*TOPICS_OF.values(), strict=True) for topic in pair]
    asked: dict[str, Any] = {"as_is": True, "max_tokens": 6, "temperature": 0}
    with LoraRetriever(config) as offline:
        found = offline.generate(texts, **asked)
    assert [(answer.base_model, answer.error) for answer in found] == [("first", None), ("second", None)] * 2
    for name, own in config.by_model.items():
        with LoraRetriever(own) as alone:
            expected = alone.generate(texts, **asked)
        for answer, other in zip(found, expected, strict=True):
            assert answer.base_model != name or (answer.text, answer.adapters) == (other.text, other.adapters)


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
async def test_vllm_answers_a_batch_of_every_kind(tmp_path: Path) -> None:
    folder = wide_gemma3(tmp_path / "model")
    config = tiny_app(folder, str(tmp_path / "pool"), engine="vllm", enforce_eager=True, num_threads=1)
    publish(config, linear_shapes(load_base_model(tiny_config(folder))), tmp_path / "adapters", TOPICS[:5])
    place = Place(tmp_path, config)
    run = place.begin(prompts(12))
    with closing(PartAnswerer(run)) as answerer:
        assert type(answerer.named("").engine).__name__ == "VllmEngine"
        await answer(run, answerer)
    found = place.written()
    assert len(found) == 12 and [row["error"] for row in found] == [None] * 12
    assert {row["strategy"] for row in found} == set(STRATEGIES)
    assert all(row["num_new_tokens"] in (5, 6) for row in found)
