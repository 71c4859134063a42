from __future__ import annotations

from pathlib import Path

import pytest

from deployments.api.adapters import PublishItem
from retriever_svc import StaleIndex
from tests.deployments.asking import asked, error_of, post
from tests.deployments.fake_retriever import FakeRetriever

LATE = FakeRetriever(caught_up=StaleIndex(8, 7))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/folders/a", PublishItem(Path("/folders/a"), "singer")),
        ("s3://bucket/a", PublishItem(name="singer", source="s3://bucket/a")),
    ],
)
async def test_loading_publishes_and_answers_with_vllms_text(path: str, expected: PublishItem) -> None:
    async with asked() as (client, served):
        body = {"lora_name": "singer", "lora_path": path, "load_inplace": False, "is_3d_lora_weight": False}
        response = await client.post("/v1/load_lora_adapter", json=body)
        assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'singer' added successfully")
        assert response.headers["content-type"].startswith("text/plain")
        assert [upload for upload, _ in served.store.called("stage")] == [expected]


async def test_a_taken_name_is_refused_unless_it_may_be_replaced() -> None:
    async with asked() as (client, served):
        body = {"lora_name": "poet", "lora_path": "/folders/poet"}
        response = await client.post("/v1/load_lora_adapter", json=body)
        assert (response.status_code, error_of(response)["code"]) == (400, "invalid_request")
        assert "'poet' has already been loaded" in error_of(response)["message"]
        assert served.store.called("stage") == []
        response = await client.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"lora_name": "gone", "lora_path": "/nowhere"}, 404, "adapter_refused"),
        ({"lora_name": "bad", "lora_path": "/folders/bad"}, 400, "adapter_refused"),
        ({"lora_name": "x"}, 400, "invalid_request"),
        ({"lora_path": "/folders/x"}, 400, "invalid_request"),
        ({"lora_name": "x", "lora_path": "/folders/x", "is_3d_lora_weight": True}, 400, "invalid_request"),
    ],
)
def test_a_failed_load_is_an_error_object(body: dict[str, object], status: int, code: str) -> None:
    response = post("/v1/load_lora_adapter", body)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


@pytest.mark.parametrize("body", [{"lora_name": "poet"}, {"lora_name": "local/poet", "lora_int_id": 7}])
def test_unloading_withdraws_and_answers_with_vllms_text(body: dict[str, object]) -> None:
    response = post("/v1/unload_lora_adapter", body)
    assert response.status_code == 200
    assert response.text == f"Success: LoRA adapter '{body['lora_name']}' removed successfully"


@pytest.mark.parametrize("name", ["nobody", "other/poet"])
def test_an_adapter_that_is_not_loaded_cannot_be_unloaded(name: str) -> None:
    response = post("/v1/unload_lora_adapter", {"lora_name": name})
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_a_replica_that_is_behind_changes_the_status() -> None:
    assert post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"}, retriever=LATE).status_code == 202
    assert post("/v1/unload_lora_adapter", {"lora_name": "poet"}, retriever=LATE).status_code == 202


def test_tokenize_counts_a_text_and_a_conversation_with_the_template_of_its_adapter() -> None:
    text = post("/tokenize", {"prompt": "abc", "return_token_strs": True})
    assert text.json() == {"count": 3, "max_model_len": 64, "tokens": [97, 98, 99], "token_strs": ["a", "b", "c"]}
    messages = {"messages": [{"role": "user", "content": "Hi"}]}
    for model in ("auto", "poet"):
        answer = post("/tokenize", messages | {"model": model}, template="alpaca").json()
        assert "".join(map(chr, answer["tokens"])).startswith("alpaca|") and answer["token_strs"] is None


def test_detokenize_returns_the_text_and_ignored_fields_are_listed() -> None:
    answer = post("/detokenize", {"model": "poet", "tokens": [72, 105], "other": 1})
    assert (answer.json(), answer.headers["x-ignored-fields"]) == ({"prompt": "Hi"}, "other")


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_token_routes_refuse_unknown_models_and_missing_roles(path: str) -> None:
    body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [1]}
    missing = post(path, body | {"model": "nobody"})
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")
    strict = post(path, body | {"other": 1}, strict_fields=True)
    assert (strict.status_code, error_of(strict)["param"]) == (400, "other")
    keyed = post(path, body, api_key="long-enough-key")
    assert keyed.status_code == 401
