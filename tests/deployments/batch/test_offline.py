"""The offline class over a real store, a real encoder and a real engine."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray

from deployments.batch.answering import OfflineEngine, PartAnswerer
from deployments.batch.offline import Generated, LoraRetriever
from deployments.batch.planning import PartPlanner
from deployments.batch.rows import Asked
from deployments.config.app import AppConfig, RetrievalSettings
from deployments.errors import BatchRefused
from deployments.retriever_factory import live_pool
from gpu_worker.config import PACKAGED_MODEL, NativeSettings
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.front.request.request import Completion, Job
from lora_store import LoraStore
from lora_store.pool_copy import ArchiveTarget, export_pool, import_pool
from lora_store.pool_files import ArchivedPool, StoredPool
from retriever_svc import Retriever, RouteRequest, embed_groups
from retriever_svc.retriever import RouteAnswer
from tests.deployments.batching import BASE, TOPICS, TOPICS_OF, VERBS, Place, prompts

SHORT = {"max_tokens": 6, "temperature": 0}
POOL = Path(__file__).parents[3] / "examples" / "starter_pool"


@pytest.fixture(scope="module")
def offline(pool: AppConfig) -> Iterator[LoraRetriever]:
    with LoraRetriever(pool) as opened:
        yield opened


def test_answers_are_those_of_a_batch_run_and_no_ray_is_started(offline: LoraRetriever, place: Place) -> None:
    rows = [{"prompt": row["prompt"]} for row in prompts(6)]
    run = place.begin(rows)
    before = threading.enumerate()
    with closing(PartAnswerer(run)) as answerer:
        planned = asyncio.run(PartPlanner(run).plan(run.parts[0]))
        asyncio.run(answerer.answer(planned))
        loads = [thread for thread in threading.enumerate() if "adapter-load" in thread.name and thread not in before]
    assert loads
    for thread in loads:
        thread.join(120)
        assert not thread.is_alive(), "a closed engine keeps no threads"
    found = offline.generate([row["prompt"] for row in rows], as_is=True, **SHORT)
    assert [(answer.text, answer.strategy) for answer in found] == [
        (row["text"], row["strategy"]) for row in place.written()
    ]
    assert [answer.adapters[0]["name"] for answer in found[:2]] == ["the-sea", "old-trains"]
    assert not ray.is_initialized()


def test_equal_calls_draw_the_versions_under_trial_anew(
    offline: LoraRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    async def note(planner: object, models: object, tenant: str, name: str, body: object) -> Asked:
        names.append(name)
        return Asked(error={"code": "noted"})

    monkeypatch.setattr("deployments.batch.offline.ask_planner", note)
    for _ in range(2):
        offline.generate(["Hi", "Hi"])
    assert len({*names}) == 4


def test_a_pool_that_was_exported_and_imported_gives_the_same_answers(
    offline: LoraRetriever, pool: AppConfig, tmp_path: Path
) -> None:
    with ArchiveTarget(tmp_path / "pool.tar") as archive:
        export_pool(StoredPool(pool.store_uri), archive)
    import_pool(ArchivedPool(tmp_path / "pool.tar"), str(tmp_path / "restored"))
    texts = [f"{verb} {topic}, please." for verb in VERBS for topic in TOPICS]
    expected = offline.generate(texts, as_is=True, **SHORT)
    with LoraRetriever(pool.model_copy(update={"store_uri": str(tmp_path / "restored")})) as restored:
        assert restored.generate(texts, as_is=True, **SHORT) == expected
    assert len({answer.text for answer in expected}) > 5 and all(answer.adapters for answer in expected[:2])


def test_prompts_of_several_base_models_are_answered_as_by_each_alone(two_bases: AppConfig) -> None:
    texts = [f"{verb} {topic}, please." for verb in VERBS for topic in TOPICS[:5] if topic != "a long war"]
    alone: dict[str, list[Generated]] = {}
    for name, config in two_bases.by_model.items():
        with LoraRetriever(config) as offline:
            alone[name] = offline.generate(texts, as_is=True, **SHORT)
    with LoraRetriever(two_bases) as offline:
        found = offline.generate(texts, as_is=True, **SHORT)
        [named] = offline.generate("Hello", model="second", **SHORT)
        [ours] = offline.generate(texts[:1], model="second:auto", as_is=True, **SHORT)
    owners = {text: name for name, topics in TOPICS_OF.items() for text in texts if any(t in text for t in topics)}
    assert [answer.base_model for answer in found] == [owners[text] for text in texts]
    assert len({answer.text for answer in found}) > 1
    for place, answer in enumerate(found):
        expected = alone[owners[texts[place]]][place]
        assert (answer.text, answer.strategy) == (expected.text, expected.strategy)
        assert list(answer.adapters) == list(expected.adapters)
    assert (named.base_model, named.strategy, ours.base_model) == ("second", "base", "second")


def test_a_base_model_is_loaded_when_a_prompt_needs_it(two_bases: AppConfig, tmp_path: Path) -> None:
    first, second = two_bases.models
    broken = second.model_copy(update={"base_model": str(tmp_path)})
    with LoraRetriever(two_bases.model_copy(update={"models": (first, broken)})) as offline:
        [answer] = offline.generate("Tell me about the sea, please.", as_is=True, **SHORT)
        assert (answer.base_model, answer.error) == ("first", None)
        for _ in range(2):
            with pytest.raises(BaseModelUnsupported, match="Unrecognized model"):
                offline.generate("Tell me about wild bees, please.", as_is=True, **SHORT)
        assert offline.generate("Tell me about the sea, please.", as_is=True, **SHORT) == [answer]


def test_options_apply_to_all_prompts_or_to_each(offline: LoraRetriever) -> None:
    texts = [f"Explain {topic}" for topic in TOPICS[:3]]
    alone = offline.generate(texts, lora={"k": 1, "strategy": "selection"}, **SHORT)
    assert [(answer.strategy, len(answer.adapters)) for answer in alone] == [("selection", 1)] * 3
    each = offline.generate(texts, lora=[None, {"k": 2}, {"adapters": [{"name": "wild-bees"}]}], **SHORT)
    assert [answer.adapters[-1]["name"] for answer in each][2] == "wild-bees"
    assert len(each[1].adapters) == 2
    assert offline.generate("Hello", model=BASE, **SHORT)[0].strategy == "base"
    with pytest.raises(ValueError, match="2 options for 3 prompts"):
        offline.generate(texts, lora=[None, None])
    message = {"role": "user", "content": "Hi"}
    for conversation in (message, [message]):
        with pytest.raises(ValueError, match="send a list of conversations"):
            offline.generate(conversation, **SHORT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("stream", True),
        ("stream_options", {"include_usage": True}),
        ("logprobs", 0),
        ("top_logprobs", 1),
        ("prompt_logprobs", 0),
        ("echo", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
    ],
)
def test_fields_whose_results_would_be_lost_are_refused_by_name(
    offline: LoraRetriever, field: str, value: object
) -> None:
    with pytest.raises(ValueError, match=f"^{field}: an answer here is one text"):
        offline.generate("Hi", **SHORT, **{field: value})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_token": 1}, "max_token: unknown field; did you mean 'max_tokens'"),
        ({"skip_special_tokens": False}, "skip_special_tokens: unknown field"),
        ({"max_completion_tokens": 1, "as_is": True}, "max_completion_tokens: unknown field"),
        ({"timeout_s": 5}, "timeout_s: answers here have no deadline"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "messages: send texts and conversations in prompts"),
        ({"prompt": "Hello", "as_is": True}, "prompt: send texts and conversations in prompts"),
    ],
)
def test_fields_without_effect_are_refused_by_name(fields: Any, says: str, offline: LoraRetriever) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        offline.generate("Hi", **fields)


def test_an_interrupted_call_ends_its_rows(offline: LoraRetriever, monkeypatch: pytest.MonkeyPatch) -> None:
    complete, cancelled = OfflineEngine.complete, list[int]()

    async def interrupted(self: OfflineEngine, jobs: Sequence[Job]) -> list[Completion | Exception]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            return await complete(self, jobs)
        except asyncio.CancelledError:
            cancelled.append(len(jobs))
            raise

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(OfflineEngine, "complete", interrupted)
            with pytest.raises(KeyboardInterrupt):
                offline.generate(["Explain the sea"] * 64, max_tokens=200, temperature=0, ignore_eos=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert offline.generate("Explain the sea", **SHORT)[0].num_new_tokens == 6  # calls take turns
    assert cancelled == [64]


def test_an_interrupted_call_plans_no_more_prompts(offline: LoraRetriever, monkeypatch: pytest.MonkeyPatch) -> None:
    route, routed, raised = Retriever.route, list[int](), threading.Event()

    def interrupted(self: Retriever, requests: Sequence[RouteRequest]) -> list[RouteAnswer]:
        routed.append(len(requests))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert raised.wait(60)
        return route(self, requests)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    texts = [f"Explain number {n}" for n in range(1000)]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Retriever, "route", interrupted)
            with pytest.raises(KeyboardInterrupt):
                offline.generate(texts, max_tokens=1)
            raised.set()
            assert offline.generate("Hello", model=BASE, **SHORT)[0].error is None  # calls take turns
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(routed) == 1 and routed[0] < len(texts)


def test_a_text_is_a_message_of_a_chat_unless_it_is_taken_as_it_is(offline: LoraRetriever) -> None:
    message = [{"role": "user", "content": "Explain the sea"}]
    chat, text, as_is = (
        offline.generate([prompt], as_is=is_raw, **SHORT)[0]
        for prompt, is_raw in ((message, False), ("Explain the sea", False), ("Explain the sea", True))
    )
    assert chat == text
    assert as_is.num_prompt_tokens < text.num_prompt_tokens


@pytest.mark.parametrize("num_answers", [1, None])
def test_a_bad_prompt_gets_an_error_and_the_others_their_answers(
    num_answers: int | None, offline: LoraRetriever
) -> None:
    nothing_more: dict[str, Any] = {"stream": False, "logprobs": False, "tools": None, "timeout_s": None}
    nothing_more |= {"n": num_answers, "skip_special_tokens": True}
    good, bad = offline.generate(["Explain the sea", "x" * 600], **SHORT, **nothing_more)
    assert good.error is None and good.num_new_tokens == 6
    assert bad.error is not None and bad.error["code"] == "context_length_exceeded"
    assert bad.text == ""
    [unknown] = offline.generate(["Hi"], model="nobody")
    assert unknown.error is not None and unknown.error["code"] == "model_not_found"


@pytest.mark.parametrize("as_is", [False, True])
@pytest.mark.parametrize(
    ("prompt", "param"),
    [(None, "prompt"), (float("nan"), "prompt"), (7, "prompt"), (["Hi"], "messages.0"), ([], "messages")],
)
def test_what_is_no_prompt_is_refused_by_name_and_the_others_are_answered(
    prompt: Any, param: str, as_is: bool, offline: LoraRetriever
) -> None:
    bad, good = offline.generate([prompt, "Explain the sea"], as_is=as_is, **SHORT)
    assert good.error is None and good.num_new_tokens == 6
    assert bad.error is not None and (bad.error["code"], bad.error["param"]) == ("invalid_request", param)


@pytest.mark.parametrize("options", ["k", 7, [["k", 1]]])
def test_options_that_are_no_object_are_refused_for_their_prompt(options: Any, offline: LoraRetriever) -> None:
    good, bad = offline.generate(["Explain the sea"] * 2, lora=[{"k": 1}, options], **SHORT)
    assert good.error is None and len(good.adapters) == 1
    assert bad.error is not None and (bad.error["code"], bad.error["param"]) == ("invalid_request", "lora")


def test_a_place_without_a_pool_is_refused_and_none_begins_there(pool: AppConfig, tmp_path: Path) -> None:
    with pytest.raises(BatchRefused, match="misspelt: there is no pool"):
        LoraRetriever(pool.model_copy(update={"store_uri": str(tmp_path / "misspelt")}))
    assert not (tmp_path / "misspelt").exists()


def test_adapters_of_another_base_do_not_answer(pool: AppConfig) -> None:
    config = AppConfig.model_validate(pool.model_dump() | {"base_model_name": "another-base"})
    with LoraRetriever(config) as offline:
        [found] = offline.generate(["Explain the sea"], **SHORT)
        [named] = offline.generate(["Explain the sea"], model="the-sea")
    assert (found.strategy, list(found.adapters)) == ("base", [])
    assert named.error is not None and named.error["code"] == "adapter_incompatible"


def test_the_real_model_answers_with_the_adapter_that_fits(tmp_path: Path) -> None:
    config = AppConfig(
        store_uri=str(tmp_path / "pool"),
        retrieval=RetrievalSettings(encoder_threads=1),
        worker=NativeSettings(max_batch_size=4, max_model_len=256, num_threads=1),
    )
    store = LoraStore(config.store_uri, accepts_base=config.served_model.accepted_names)
    staged = [store.stage(POOL / name) for name in ("sentence_negation", "date_format")]
    embeddings = embed_groups(live_pool(config, store.snapshot).current.encoder, [item.samples for item in staged])
    store.commit(staged, embeddings, [1.0, 1.0], "tester")
    with LoraRetriever(config) as offline:
        assert config.base_model == PACKAGED_MODEL
        fits, base = offline.generate(
            ["Negate the statement: the chemist has used my car", "What is the capital of France?"],
            lora={"k": 1},
            max_tokens=12,
            temperature=0,
        )
    assert (fits.text.strip(), fits.adapters[0]["name"]) == ("the chemist has not used my car", "sentence_negation")
    assert (base.strategy, "Paris" in base.text) == ("base", True)
