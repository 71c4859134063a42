"""Contracts over the real store, catalogue, Retriever and Ingress: from the folder to the job that a Worker gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import yaml

from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Job
from tests.deployments.asking import error_of
from tests.deployments.two_tenants import TENANTS, TwoTenants, two_tenants

OWNER, OTHER = TENANTS
CONTRACT: dict[str, Any] = {
    "instruction": "Judge the mood of: {input}",
    "output_schema": {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]},
    "stop": ["END"],
    "sampling": {"temperature": 0.25},
}
APPLIED = ["instruction", "output_schema", "stop", "temperature"]
TEXT = "I like the sea."
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT}], "lora": {"k": 1, "explain": True}}


def folder(tenants: TwoTenants, name: str = "mood", seed: int = 77, contract: Any = CONTRACT) -> Path:
    path = tenants.folder(name, seed, [TEXT, "I fear the dark.", "The sea is calm."])
    if contract is not None:
        (path / "adapter_io.yaml").write_text(yaml.safe_dump(contract, sort_keys=False))
    return path


async def publish(tenants: TwoTenants, path: Path, status: int = 201, **said: Any) -> dict[str, Any]:
    response = await tenants.publish(OWNER, [path], **({} if "share" in said else {"visibility": "public"}), **said)
    [answer] = response.json()["data"]
    assert answer["status"] == status, response.text
    found: dict[str, Any] = answer
    return found


async def ask(
    tenants: TwoTenants, tenant: str = OWNER, path: str = "/v1/chat/completions", **fields: Any
) -> tuple[Job, Any]:
    before = len(tenants.served.worker.called("stream"))
    response = await tenants.ask(tenant, "POST", path, json=CHAT | fields)
    assert response.status_code == 200, response.text
    [(job,)] = tenants.served.worker.called("stream")[before:]
    return job, response.json()["lora"]


async def contract_of(tenants: TwoTenants) -> Any:
    return (await tenants.ask(OWNER, "GET", "/v1/loras/mood")).json()["contract"]


async def test_auto_finds_by_the_users_text_and_asks_by_the_contract(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        await publish(tenants, folder(tenants))
        plain = (await tenants.ask(OWNER, "POST", "/v1/route", json={"prompt": TEXT, "lora": CHAT["lora"]})).json()
        job, lora = await ask(tenants)
        assert lora["contract"] == plain["data"][0]["contract"] == {"adapter": "mood", "applied": APPLIED}
        asked, found = ({**answer["candidates"][0], "samples": None} for answer in (lora, plain["data"][0]))
        assert asked == found, "its instruction is not searched by"
        assert job.prompt == (Message("user", f"Judge the mood of: {TEXT}"),) and job.plan.contract is None
        assert (job.sampling.temperature, job.sampling.stop) == (0.25, ("END",))
        assert job.sampling.grammar is not None
        assert json.loads(job.sampling.grammar.text) == CONTRACT["output_schema"]
        counted = await tenants.ask(OWNER, "POST", "/tokenize", json={"messages": CHAT["messages"], "model": "mood"})
        [*_, (_, prompt, *_)] = tenants.served.worker.called("tokenize")
        assert counted.status_code == 200 and prompt == job.prompt
        other = tenants.names[OWNER][0]
        for fields in ({"lora": {"contract": False}}, {"lora_path": other}, {"merged_adapters": {"ids": [other]}}):
            for path in ("/tokenize", "/v1/messages/count_tokens"):
                counted = await tenants.ask(OWNER, "POST", path, json={"messages": CHAT["messages"]} | fields)
                [*_, (_, prompt, *_)] = tenants.served.worker.called("tokenize")
                assert counted.status_code == 200 and prompt == (Message("user", TEXT),), (path, fields)
        job, lora = await ask(tenants, OTHER, model=f"{OWNER}/mood", temperature=1.0, lora={"explain": True})
        assert lora["contract"] == {"adapter": f"{OWNER}/mood", "applied": APPLIED[:-1]}
        assert job.sampling.temperature == 1.0
        job, lora = await ask(tenants, lora=CHAT["lora"] | {"contract": False})
        assert (job.prompt, job.sampling.grammar, "contract" in lora) == ((Message("user", TEXT),), None, False)
        tenants.served.ingress.reconfigure({"sampling_defaults": {"temperature": 0.75, "top_p": 0.5}})
        job, _ = await ask(tenants)
        assert (job.sampling.temperature, job.sampling.top_p) == (0.25, 0.5), "the contract's before the server's"
        response = await tenants.ask(OWNER, "POST", "/v1/responses", json={"model": "mood", "input": TEXT})
        assert (response.json()["temperature"], response.json()["top_p"]) == (0.25, 0.5)
        completion = {"model": "mood", "prompt": TEXT, "echo": True}
        answer = await tenants.ask(OWNER, "POST", "/v1/completions", json=completion)
        read = f"Judge the mood of: {TEXT}"
        assert answer.json()["choices"][0]["text"].startswith(read)
        [*_, (job,)] = tenants.served.worker.called("stream")
        assert job.prompt == read


async def test_a_contract_applies_where_its_adapter_has_more_than_half(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        await publish(tenants, folder(tenants))
        name = tenants.names[OWNER][0]
        for weights, applies in (((0.5, 0.5), False), ((0.6, 0.4), True), ((-0.6, 0.4), False), ((0.6, -0.7), False)):
            adapters = [{"name": "mood", "weight": weights[0]}, {"name": name, "weight": weights[1]}]
            named = {"adapters": adapters, "strategy": "fusion", "explain": True}
            job, lora = await ask(tenants, lora=named)
            assert ("contract" in lora) == applies == ("Judge" in job.prompt[0].content)
            again, replayed = await ask(tenants, lora={"plan": lora, "explain": True})
            assert (again.prompt, replayed.get("contract")) == (job.prompt, lora.get("contract"))


async def test_a_new_version_keeps_replaces_and_clears_the_contract(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        await publish(tenants, folder(tenants))
        kept = await publish(tenants, folder(tenants, seed=78, contract=None))
        assert await contract_of(tenants) == kept["kept"]["contract"] == CONTRACT
        other = {"stop": ["X"]}
        refused = await publish(tenants, folder(tenants, seed=79, contract=other), status=400, share=0.5)
        assert "its contract differs" in refused["error"]["message"]
        changed = await publish(tenants, folder(tenants, seed=79, contract=other))
        assert changed["changed"]["contract"] == {"from": CONTRACT, "to": other}
        given = await publish(tenants, folder(tenants, seed=79, contract=other), contract={"stop": "Y"})
        assert await contract_of(tenants) == {"stop": ["Y"]} and given["digest"] != changed["digest"]
        await publish(tenants, folder(tenants, seed=79, contract=other), contract={})
        assert await contract_of(tenants) is None
        back = await tenants.ask(OWNER, "POST", "/v1/loras/mood/rollback", json={"digest": given["digest"]})
        assert back.status_code == 201 and await contract_of(tenants) == {"stop": ["Y"]}


async def test_a_bad_contract_is_refused_with_its_field(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        bad = {"sampling": {"temperature": 3}}
        refused = await publish(tenants, folder(tenants, contract=bad), status=400)
        assert "adapter_io.yaml: sampling.temperature: must be at most 2, got 3" in refused["error"]["message"]
        schema = {"output_schema": {"type": "objec"}}
        refused = await publish(tenants, folder(tenants), status=400, contract=schema)
        assert "contract: output_schema: " in refused["error"]["message"]
        body = {"adapters": [{"path": "/x", "contract": bad}]}
        response = await tenants.ask(OWNER, "POST", "/v1/loras", json=body)
        assert error_of(response)["param"] == "adapters.0.contract.sampling.temperature"
        sent = folder(tenants)
        for text, field in (("{", "contract"), (json.dumps(bad), "contract.sampling.temperature")):
            files = [("files", (path.name, path.read_bytes())) for path in sorted(sent.iterdir())]
            said: httpx.Response = await tenants.ask(
                OWNER, "POST", "/v1/loras", files=files, data={"name": "mood", "contract": text}
            )
            assert (said.status_code, error_of(said)["param"]) == (400, field)


async def test_the_policy_of_a_name_wins_over_the_contract_and_a_request_over_both(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        await publish(tenants, folder(tenants))
        policy = {"model": "mood", "temperature": 1.0, "stop": ["Y"], "response_format": {"type": "json_object"}}
        assert (await tenants.ask(OWNER, "PUT", "/v1/names/support", json=policy)).status_code == 200
        job, lora = await ask(tenants, model="support", lora={"explain": True})
        assert (job.sampling.temperature, job.sampling.stop) == (1.0, ("Y",)) and job.sampling.grammar is not None
        routed = await tenants.ask(OWNER, "POST", "/v1/route", json={"prompt": TEXT, "model": "support"})
        assert routed.json()["data"][0]["contract"] == lora["contract"] == {"adapter": "mood", "applied": APPLIED[:1]}
        body = {"model": "support", "input": TEXT, "text": {"format": {"type": "text"}}}
        assert (await tenants.ask(OWNER, "POST", "/v1/responses", json=body)).status_code == 200
        [*_, (job,)] = tenants.served.worker.called("stream")
        assert job.sampling.grammar is None
