"""Model names over HTTP: a client that only sets `model` gets what the policy says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deployments.api.names import NamePolicy
from deployments.api.structured import MAX_SCHEMA_DEPTH
from gpu_worker.config import PACKAGED_MODEL
from lora_store import AdapterRecord, Plan, PlannedAdapter, Strategy, names
from tests.deployments.adapter_records import BASE, POOL, adapter, pool_of
from tests.deployments.app_fakes import Served
from tests.deployments.asking import asked, error_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.key_files import bearer, entry, write
from tests.deployments.observability.test_usage import events_in

Say = Callable[..., Awaitable[httpx.Response]]
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "model": "support"}
MIXTURE = {"lora": {"adapters": [{"name": "poet", "weight": 0.75}, {"name": "coder", "weight": 0.25}]}}


@asynccontextmanager
async def named(**options: Any) -> AsyncIterator[tuple[Say, Served]]:
    """Yield a call that raises unless it expects the status that is answered."""
    async with asked(**options) as (client, served):

        async def say(method: str, path: str, body: Any = None, status: int = 200, key: str = "") -> httpx.Response:
            sent = {} if body is None else {"json": body}
            response = await client.request(method, path, headers=bearer(key) if key else {}, **sent)
            assert response.status_code == status, response.text
            return response

        yield say, served


async def answered(policy: Any, body: dict[str, Any], path: str = "/v1/chat/completions", status: int = 200) -> Any:
    """Return the response to a request to the name `support` with this policy, and the worker's job or None."""
    async with named() as (say, served):
        await say("PUT", "/v1/names/support", policy)
        response = await say("POST", path, body, status)
    return response, served.job if status == 200 else None, served.retriever.called("route")


async def test_a_client_that_only_sets_model_gets_the_whole_policy() -> None:
    lora = {"k": 3, "weights": "uniform", "filter": {"tags": ["a"]}, "abstain": "strict", "strategy": "mixture"}
    policy = {"lora": lora, "temperature": 0.25, "stop": ["###"], "max_tokens": 9, "template": "alpaca"}
    policy["response_format"] = {"type": "json_object"}
    response, job, [([request],)] = await answered(policy, CHAT)
    assert response.json()["model"] == "support"
    assert (request.top_k, request.weighting, request.tags, request.abstain) == (3, "uniform", ("a",), "strict")
    assert (job.sampling.temperature, job.sampling.stop, job.sampling.max_tokens) == (0.25, ("###",), 9)
    assert "temperature" not in job.sampling.unset and "top_p" in job.sampling.unset
    assert job.sampling.max_tokens_is_default, "a long prompt gets a shorter answer"
    assert job.sampling.grammar is not None and job.template == "alpaca"


async def test_a_policy_names_the_base_models_chat_template_only_if_it_has_one(tmp_path: Path) -> None:
    policy = {"template": "chat"}
    async with named(base_model=PACKAGED_MODEL) as (say, _):
        for body in (policy, {"variant": {"share": 0.5, **policy}}):
            problem = error_of(await say("PUT", "/v1/names/support", body, 400))
            assert problem["param"] == "template" and "the base model has no chat template" in problem["message"]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    async with named(base_model=str(tmp_path)) as (say, _):
        await say("PUT", "/v1/names/support", policy)


async def test_fields_of_the_request_win_over_those_of_the_policy() -> None:
    policy = {
        "lora": {"k": 3, "abstain": "strict"},
        "temperature": 0.25,
        "stop": ["a"],
        "structured_outputs": {"regex": "x"},
    }
    policy["lora"] |= {"strategy": "fusion", "strategy_options": {}}
    body = CHAT | {
        "lora": {"min_score": 0.5, "strategy": "mixture"},
        "temperature": 1.5,
        "response_format": {"type": "text"},
    }
    _, job, [([request],)] = await answered(policy, body | {"max_completion_tokens": 2})
    assert (request.top_k, request.abstain, request.min_score, request.strategy) == (3, None, 0.5, "mixture")
    assert (job.sampling.temperature, job.sampling.stop, job.sampling.max_tokens) == (1.5, ("a",), 2)
    assert not job.sampling.max_tokens_is_default
    assert job.sampling.grammar is None


TOOL = {"type": "function", "function": {"name": "f"}}
STRICT = {"type": "function", "function": {"name": "f", "strict": True}}


@pytest.mark.parametrize(
    ("policy", "body", "kept"),
    [
        ({"min_tokens": 5}, {"response_format": {"type": "json_object"}}, False),
        ({"min_tokens": 5}, {"structured_outputs": {"regex": "a"}}, False),
        ({"ignore_eos": True, "max_tokens": 9}, {"response_format": {"type": "json_object"}}, False),
        ({"min_tokens": 5}, {"tools": [TOOL], "tool_choice": "required"}, False),
        ({"min_tokens": 5}, {"tools": [STRICT]}, False),
        ({"min_tokens": 5}, {"tools": [TOOL]}, True),
        ({"min_tokens": 5}, {"response_format": {"type": "text"}}, True),
        ({"min_tokens": 5}, {"max_tokens": 4}, False),
        ({"min_tokens": 5}, {"max_completion_tokens": 5}, True),
        ({"stop": ["."]}, {"response_format": {"type": "json_object"}}, False),
        ({"stop": ["."]}, {"tools": [TOOL]}, False),
        ({"stop": ["."], "response_format": {"type": "json_object"}}, {}, True),
    ],
    ids=str,
)
async def test_a_policys_minimum_and_stops_give_way_to_a_requests_own_format_and_limit(
    policy: dict[str, Any], body: dict[str, Any], kept: bool
) -> None:
    _, job, _ = await answered(policy, CHAT | body)
    assert (job.sampling.min_tokens == 5 or job.sampling.ignore_eos or job.sampling.stop != ()) == kept


JSON_OBJECT = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("policy", "body", "limit", "has_format"),
    [
        ({"max_tokens": 4}, {"min_tokens": 5}, None, False),
        ({"max_tokens": 5}, {"min_tokens": 5}, 5, False),
        ({"max_tokens": 4}, {"min_tokens": 5, "max_tokens": 6}, 6, False),
        (JSON_OBJECT, {"min_tokens": 5}, None, False),
        (JSON_OBJECT, {"ignore_eos": True, "max_tokens": 9}, 9, False),
        ({"structured_outputs": {"regex": "a"}}, {"ignore_eos": True}, None, False),
        (JSON_OBJECT, {"min_tokens": 0, "ignore_eos": False}, None, True),
        ({"structured_outputs": {"choice": ["a"]}}, {"tools": [TOOL]}, None, False),
        ({"structured_outputs": {"json_object": True}}, {"tools": [TOOL]}, None, True),
    ],
    ids=str,
)
async def test_a_policys_limit_and_format_give_way_to_a_requests_own_minimum_and_tools(
    policy: dict[str, Any], body: dict[str, Any], limit: int | None, has_format: bool
) -> None:
    _, job, _ = await answered(policy, CHAT | body)
    assert (job.sampling.max_tokens, job.sampling.grammar is not None) == (limit, has_format)


@pytest.mark.parametrize("policy", [MIXTURE, {"model": "poet"}, {"model": BASE}], ids=["mixture", "adapter", "base"])
async def test_a_name_can_be_a_fixed_mixture_an_adapter_or_the_base_model(policy: dict[str, Any]) -> None:
    _, job, routed = await answered(policy, CHAT)
    expected = {"mixture": [("poet", 0.75), ("coder", 0.25)], "adapter": [("poet", 1.0)], "base": []}
    kind = "mixture" if policy is MIXTURE else "base" if policy["model"] == BASE else "adapter"
    assert [(row.ref.name, row.weight) for row in job.plan.adapters] == expected[kind]
    assert routed == []


@pytest.mark.parametrize("model", ["auto", BASE, "poet"])
@pytest.mark.parametrize(
    "body",
    [
        {"lora": {"adapters": [{"name": "coder"}]}},
        {"merged_adapters": {"ids": ["coder"]}},
        {"lora_path": "coder"},
        {
            "lora": {
                "plan": {
                    "strategy": "selection",
                    "adapters": [{"name": "coder", "digest": POOL[1].ref.digest, "weight": 1}],
                }
            }
        },
    ],
    ids=["adapters", "merged_adapters", "lora_path", "plan"],
)
async def test_a_request_that_names_adapters_takes_no_others_from_the_policy(body: dict[str, Any], model: str) -> None:
    lora = {"lora": {"k": 3, "strategy": "mixture"}} if model == "auto" else {}
    _, job, _ = await answered({"model": model, "temperature": 0.5, **lora}, CHAT | body)
    assert [row.ref.name for row in job.plan.adapters] == ["coder"] and job.sampling.temperature == 0.5


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": "Hi"}), ("/v1/responses", {"input": "Hi"}), ("/v1/chat/completions", CHAT)],
)
async def test_every_route_answers_by_the_policy(path: str, body: dict[str, Any]) -> None:
    response, job, _ = await answered({"temperature": 0.25, **MIXTURE}, {**body, "model": "support"}, path)
    assert job.sampling.temperature == 0.25 and len(job.plan.adapters) == 2
    assert response.json()["model"] == "support"
    assert response.json().get("temperature", 0.25) == 0.25  # responses repeat it


@pytest.mark.parametrize(
    ("body", "shown"), [({}, "json_object"), ({"text": {"format": {"type": "text"}}}, "text")], ids=["policy", "own"]
)
async def test_a_response_shows_the_format_of_the_policy_unless_it_has_its_own(
    body: dict[str, Any], shown: str
) -> None:
    sent = {"input": "Hi", "model": "support", **body}
    response, job, _ = await answered(JSON_OBJECT, sent, "/v1/responses")
    assert response.json()["text"] == {"format": {"type": shown}}
    assert (job.sampling.grammar is not None) == (shown == "json_object")


async def test_tokenize_uses_the_template_of_the_policy() -> None:
    async with named() as (say, _):
        await say("PUT", "/v1/names/support", {"template": "alpaca"})
        response = await say("POST", "/tokenize", {**CHAT, "return_token_strs": True})
    assert "".join(response.json()["token_strs"]).startswith("alpaca|")


async def test_what_the_encoder_reads_to_count_is_charged_by_a_model_name_too(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("a", "local", limits={"tokens_per_minute": 120}))
    body = {"messages": [{"role": "user", "content": "word " * 60}]}  # 75 tokens, and the encoder reads as many
    async with named(keys_file=keys, cache_dir=tmp_path) as (say, _):
        await say("PUT", "/v1/names/support", {}, key="a")
        for model in ("auto", "support"):
            error = error_of(await say("POST", "/v1/messages/count_tokens", body | {"model": model}, 400, "a"))
            assert "the key allows 120 per minute" in error["message"]
        await say("POST", "/v1/messages/count_tokens", body | {"model": BASE}, key="a")
    assert [event["model"] for event in events_in(tmp_path)] == ["", "auto", "support", BASE]


async def test_explain_and_a_header_show_the_version_and_it_can_be_asked_for_again() -> None:
    async with named() as (say, _):
        first = (await say("PUT", "/v1/names/support", {"temperature": 0})).json()["digest"]
        second = (await say("PUT", "/v1/names/support", {"model": "poet"})).json()["digest"]
        for model, digest in {
            "support": second,
            f"support@{first[:8]}": first,
            f"local/support@{second}": second,
        }.items():
            answer = await say("POST", "/v1/chat/completions", CHAT | {"model": model, "lora": {"explain": True}})
            plan = answer.json()["lora"]
            assert plan["policy"] == answer.headers["x-lora-policy"] == f"support@{digest[:12]}"
            await say("POST", "/v1/chat/completions", CHAT | {"model": "auto", "lora": {"plan": plan}})
        await say("POST", "/v1/chat/completions", CHAT | {"model": "support@ffffffff"}, 404)
        assert "policy" not in (await say("POST", "/v1/chat/completions", CHAT)).json()["lora"]


async def test_a_share_of_conversations_gets_the_variant_and_keeps_it() -> None:
    policy = {"model": "poet", "variant": {"share": 0.25, "model": "coder", "temperature": 0}}
    async with named() as (say, _):
        await say("PUT", "/v1/names/support", policy)
        shares = []
        for number in range(40):
            opening = [{"role": "user", "content": f"Question {number}"}]
            later = [*opening, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "And now?"}]
            answers = [
                await say("POST", "/v1/chat/completions", CHAT | {"messages": turns}) for turns in (opening, later)
            ]
            found = [answer.json()["lora"]["adapters"][0]["name"] for answer in answers]
            assert found[0] == found[1]
            assert answers[0].headers["x-lora-policy"].endswith("(variant)") == (found[0] == "coder")
            shares.append(found[0] == "coder")
        assert 6 <= sum(shares) <= 14


async def test_a_name_has_a_history_and_rolls_back() -> None:
    async with named() as (say, _):
        digests = []
        for temperature in (0, 1):
            digests.append((await say("PUT", "/v1/names/support", {"temperature": temperature})).json()["digest"])
        shown = (await say("GET", "/v1/names/support")).json()
        assert (shown["id"], shown["policy"], shown["approved"]) == ("support", {"temperature": 1.0}, False)
        assert [version["digest"] for version in shown["versions"]] == digests[::-1]
        back = (await say("POST", "/v1/names/support/rollback", {})).json()
        assert (back["digest"], back["replicas"]) == (digests[0], {"ready": 1, "behind": 0})
        assert (await say("GET", "/v1/names")).json()["data"][0]["policy"] == {"temperature": 0.0}
        await say("POST", "/v1/names/support/rollback", {"digest": digests[1][:8]})
        assert (await say("GET", "/v1/names/support")).json()["digest"] == digests[1]
        error = error_of(await say("POST", "/v1/names/support/rollback", {"digest": "f" * 8}, 404))
        assert error["code"] == "version_not_found" and error["message"].startswith("model name 'support' has no")
        await say("DELETE", "/v1/names/support")
        for method, path, body in (
            ("GET", "/v1/names/support", None),
            ("DELETE", "/v1/names/support", None),
            ("POST", "/v1/names/support/rollback", {}),
            ("POST", "/v1/chat/completions", CHAT),
        ):
            problem = error_of(await say(method, path, body, 404))
            assert problem["code"] == "model_not_found"
            assert ("`loraretriever name list`" in problem["message"]) == path.startswith("/v1/names")


async def test_names_are_listed_among_the_models_page_by_page() -> None:
    async with named() as (say, _):
        for name in ("b", "a"):
            await say("PUT", f"/v1/names/{name}", {"temperature": 0.5, "template": "alpaca"})
        expected = ["auto", BASE, "a", "b", "coder", "poet"]
        for limit in range(1, 7):
            found: list[str] = []
            has_more = True
            while has_more and len(found) <= len(expected):
                after = found[-1] if found else ""
                page = (await say("GET", f"/v1/models?limit={limit}&after={after}")).json()
                found, has_more = found + [card["id"] for card in page["data"]], page["has_more"]
            assert found == expected
        card = (await say("GET", "/v1/models/a")).json()
        assert (card["parent"], card["template"], card["sampling_defaults"]) == (BASE, "alpaca", {"temperature": 0.5})
        assert (
            card["root"].startswith("a@")
            and card == (await say("GET", "/v1/models?name=a&after=" + BASE)).json()["data"][0]
        )


async def test_a_list_that_is_polled_reads_each_policy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant may have hundreds of names with long policies, and reading them stops the other requests."""
    read: list[str] = []

    def loads(text: str) -> Any:
        read.append(text)
        return json.loads(text)

    monkeypatch.setattr(names, "json", SimpleNamespace(loads=loads, dumps=json.dumps))
    async with named() as (say, _):
        for number in range(3):
            await say("PUT", f"/v1/names/polled-{number}", {"seed": 10_000 + number})
        for _ in range(5):
            page = (await say("GET", "/v1/models?name=polled")).json()
            assert len(page["data"]) == 3
    assert len(read) == 3


async def test_names_are_listed_page_by_page_with_their_policies() -> None:
    async with named() as (say, _):
        for name in ("c", "a", "b"):
            await say("PUT", f"/v1/names/{name}", {"stop": [name]})
        for limit in range(1, 5):
            found: list[Any] = []
            page: Any = {"has_more": True, "last_id": ""}
            while page["has_more"] and len(found) <= 3:
                page = (await say("GET", f"/v1/names?limit={limit}&after={page['last_id']}")).json()
                found += page["data"]
            assert [(item["id"], item["policy"]["stop"]) for item in found] == [(name, [name]) for name in "abc"]
        assert (await say("GET", "/v1/names?after=bb")).json()["last_id"] == "c", "a name that is gone has a place"


async def test_route_shows_the_plan_that_a_name_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with named(cache_dir=tmp_path) as (say, served):
        await say("PUT", "/v1/names/support", {"lora": {"k": 3, "strategy": "fusion"}, "template": "alpaca"})
        monkeypatch.setattr(NamePolicy, "sampling", None)  # only contracts are compared with it
        body = {"prompt": ["Hi", "Ho"], "model": "support", "lora": {"k": 2}}
        plans = (await say("POST", "/v1/route", body)).json()["data"]
        [(requests,)] = served.retriever.called("route")
        assert [(request.text, request.top_k, request.strategy) for request in requests] == [
            ("Hi", 2, "fusion"),
            ("Ho", 2, "fusion"),
        ]
        assert [plan["policy"].partition("@")[0] for plan in plans] == ["support"] * 2
        for model, expected in (("poet", ["poet"]), (BASE, [])):
            [plan] = (await say("POST", "/v1/route", {"prompt": "Hi", "model": model})).json()["data"]
            assert [row["name"] for row in plan["adapters"]] == expected
        assert error_of(await say("POST", "/v1/route", {"prompt": "Hi", "model": "nobody"}, 404))
    assert [event["model"] for event in events_in(tmp_path)] == ["", "support", "poet", BASE, "nobody"]


def nested(depth: int) -> dict[str, Any]:
    """Return a policy whose schema is nested this deeply."""
    schema = json.loads('{"items": ' * depth + "{}" + "}" * depth)
    return {"structured_outputs": {"json": schema}}


@pytest.mark.parametrize(
    ("name", "policy", "status", "code", "words"),
    [
        ("poet", {}, 409, "name_taken", "an adapter is called 'poet'"),
        (BASE, {}, 409, "name_taken", "the base model"),
        ("auto", {}, 400, "invalid_request", "name: "),
        ("a b", {}, 400, "invalid_request", "name: "),
        ("other/x", {}, 404, "model_not_found", "other/x"),
        ("x", {"temperatur": 1}, 400, "invalid_request", "did you mean 'temperature'"),
        ("x", {"stream": True}, 400, "invalid_request", "stream: unknown field"),
        (
            "x",
            {"lora": {"plan": {"strategy": "base"}}},
            400,
            "invalid_request",
            "lora.plan: belongs to a single request",
        ),
        ("x", {"variant": {"temperature": 0}}, 400, "invalid_request", "variant.share"),
        ("x", {"variant": {"share": 0.5, "max_tokens": 10**6}}, 400, "invalid_request", "max_tokens: at most"),
        ("x", {"variant": {"share": 1}}, 400, "invalid_request", "variant.share"),
        ("x", {"model": "nobody"}, 404, "model_not_found", "nobody"),
        ("x", {"model": "poet", "lora": {"k": 2}}, 400, "invalid_request", "lora.k"),
        ("x", {"lora": {"adapters": [{"name": "nobody"}]}}, 404, "model_not_found", "nobody"),
        ("x", {"lora": {"strategy": "mean"}}, 400, "invalid_request", "lora.strategy"),
        ("x", {"lora": {"strategy_options": {"nope": 1}}}, 400, "invalid_request", "has no option 'nope'"),
        (
            "x",
            {"variant": {"share": 0.5, "lora": {"strategy": "top_p_mixture", "strategy_options": {"kept_weight": 2}}}},
            400,
            "invalid_request",
            "kept_weight must be above 0",
        ),
        ("x", {"variant": {"share": 0.5, "model": "nobody"}}, 404, "model_not_found", "nobody"),
        (
            "x",
            {"max_tokens": 5, "min_tokens": 10},
            400,
            "invalid_request",
            "min_tokens must be between 0 and max_tokens",
        ),
        ("x", {"variant": JSON_OBJECT | {"ignore_eos": True, "share": 0.5}}, 400, "invalid_request", "ignore_eos must"),
        ("x", {"stop_token_ids": [-5]}, 400, "invalid_request", "stop_token_ids.0: must be at least 0"),
        ("x", {"logit_bias": {"-5": 1}}, 400, "invalid_request", "logit_bias.-5: must be at least 0"),
        ("x", {"structured_outputs": {"regex": "(["}}, 400, "invalid_request", "structured_outputs.regex cannot be"),
        ("x", nested(MAX_SCHEMA_DEPTH - 1), 400, "invalid_request", "cannot be compiled: recursion limit"),
        ("x", nested(260), 400, "invalid_request", "it is nested too deeply: at most 128 levels"),
        (
            "x",
            {"stop": ["s" * 256] * 16, "structured_outputs": {"regex": "a" * 30_000}},
            400,
            "invalid_request",
            "at most",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_cannot_be_a_name_or_a_policy_is_refused(
    name: str, policy: dict[str, Any], status: int, code: str, words: str
) -> None:
    async with named() as (say, served):
        error = error_of(await say("PUT", f"/v1/names/{name}", policy, status))
        assert served.store.called("set_name") == [] or code == "name_taken"
    assert error["code"] == code and words in error["message"]


async def test_a_name_of_another_tenant_is_seen_once_an_admin_approved_it(tmp_path: Path) -> None:
    keys = write(
        tmp_path / "keys.json", entry("a", "local"), entry("b", "them"), entry("admin", "ops", ["admin", "infer"])
    )
    async with named(keys_file=keys) as (say, _):
        digest = (await say("PUT", "/v1/names/support", MIXTURE, key="a")).json()["digest"]
        hidden = [
            await say("GET", "/v1/names/local/support", status=404, key="b"),
            await say("GET", "/v1/names/local/nobody", status=404, key="b"),
        ]
        first, second = (error_of(response)["message"] for response in hidden)
        assert first.replace("support", "nobody") == second
        for key in ("b", "admin"):
            assert error_of(await say("POST", "/v1/chat/completions", CHAT, 404, key))["code"] == "model_not_found"
            assert (await say("GET", "/v1/names", key=key)).json()["data"] == []
        approve, body = "/v1/names/local/support/approve", {"digest": digest}
        assert error_of(await say("POST", approve, body, 403, key="a"))["code"] == "permission_denied"
        assert error_of(await say("POST", approve, {"digest": "0" * 64}, 404, key="admin"))["code"] == "model_not_found"
        shown = await say("POST", f"{approve}?dry_run=true", body, key="admin")
        assert [row["name"] for row in shown.json()["policy"]["lora"]["adapters"]] == ["local/poet", "local/coder"]
        await say("POST", "/v1/chat/completions", CHAT, 404, key="b")
        await say("POST", approve, body, key="admin")
        for model in ("support", "local/support"):
            answer = await say("POST", "/v1/chat/completions", CHAT | {"model": model}, key="b")
            assert [row["name"] for row in answer.json()["lora"]["adapters"]] == ["local/poet", "local/coder"]
        assert [row["id"] for row in (await say("GET", "/v1/names", key="b")).json()["data"]] == ["local/support"]
        assert (await say("GET", "/v1/names/support", key="b")).json()["actor"] == ""
        await say("DELETE", "/v1/names/support", status=404, key="b")
        await say("PUT", "/v1/names/support", {"model": "coder"}, key="a")
        answer = await say("POST", "/v1/chat/completions", CHAT, key="b")
        assert len(answer.json()["lora"]["adapters"]) == 2  # the new version is not approved
        answer = await say("POST", "/v1/chat/completions", CHAT, key="a")
        assert len(answer.json()["lora"]["adapters"]) == 1


@dataclass
class WithOlder(FakeRetriever):
    """Keeps a private version of each adapter beside the live one."""

    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]:
        bare = name.partition("@")[0].rpartition("/")[2]
        return 7, [adapter(bare), adapter(bare, version="older", visibility="private")]

    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan:
        older = adapter(choices[0][0].partition("@")[0], version="older")
        return Plan(strategy, (PlannedAdapter(older.ref, older.weights_digest, 1.0),), 7)


SECRET = (adapter("secret", visibility="private"), *POOL)


@pytest.mark.parametrize(
    ("named", "retriever"),
    [("secret", FakeRetriever(SECRET)), ("poet@older", WithOlder())],
    ids=["adapter", "version"],
)
async def test_a_policy_with_a_private_adapter_or_version_cannot_be_approved(
    named: str, retriever: FakeRetriever, tmp_path: Path
) -> None:
    keys = write(tmp_path / "keys.json", entry("a", "local"), entry("admin", "ops"))
    store = FakeStore(pool_of(*SECRET), model_names=retriever.model_names)
    async with asked(retriever=retriever, store=store, keys_file=keys) as (client, _):
        put = await client.put("/v1/names/support", json={"model": named}, headers=bearer("a"))
        body = {"digest": put.json()["digest"]}
        response = await client.post("/v1/names/local/support/approve", json=body, headers=bearer("admin"))
    message = error_of(response)["message"]
    assert response.status_code == 400
    assert f"names 'local/{named.partition('@')[0]}" in message and "which is private" in message
