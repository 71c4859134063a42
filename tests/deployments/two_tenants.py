"""A whole application except Ray and the model: two tenants with private adapters that no other tenant may learn of.

Store, catalogue, encoder, index and Ingress are real. Secrets are recognisable: every private name has its tenant's
word in it, and every version has its digests.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.store import StoreDeployment
from lora_store import AdapterRecord
from retriever_svc import IndexSettings
from retriever_svc.encoder import Vectors
from tests.deployments.adapter_records import write_random_folder
from tests.deployments.app_fakes import Served
from tests.deployments.key_files import bearer, entry, write
from tests.deployments.real_app import real_app

Request = tuple[str, str, dict[str, Any]]  # method, path, JSON body
WORDS = {"acme": "zebra", "globex": "quokka"}  # part of every private name of the tenant
TENANTS = tuple(WORDS)
_TOPICS = {"acme": ("tax", "patent", "lease", "merger", "audit"), "globex": ("heart", "lung", "liver", "brain", "skin")}
_TASKS = ("Summarise the %s case", "List risks of the %s file", "Translate the %s note", "Rate the %s report")


@dataclass
class TwoTenants:
    """`names`: each tenant's private adapters; `prompts`: prompts for their tasks."""

    served: Served
    client: httpx.AsyncClient
    folders: Path
    names: dict[str, list[str]] = field(default_factory=dict)
    prompts: dict[str, list[str]] = field(default_factory=dict)
    secrets: dict[str, re.Pattern[str]] = field(default_factory=dict)

    async def ask(self, tenant: str, method: str, path: str, **sent: Any) -> httpx.Response:
        return await self.client.request(method, path, headers=bearer(tenant), **sent)

    async def publish(self, tenant: str, folders: Sequence[Path], **said: Any) -> httpx.Response:
        body = {"adapters": [{"path": str(folder), **said} for folder in folders]}
        return await self.ask(tenant, "POST", "/v1/loras", json=body)

    def folder(self, name: str, seed: int, texts: Sequence[str]) -> Path:
        return write_random_folder(self.folders / str(seed) / name, seed, texts)

    async def fill(self, num_private: int) -> None:
        """Give each tenant its private adapters, and one public one."""
        for number, tenant in enumerate(TENANTS):
            tasks = list(_tasks_of(tenant, num_private))
            self.prompts[tenant] = [texts[0] for texts in tasks]
            self.names[tenant] = [f"{WORDS[tenant]}-{i}" for i in range(num_private)]
            pairs = enumerate(zip(self.names[tenant], tasks, strict=True))
            folders = [self.folder(name, 1000 * number + i, texts) for i, (name, texts) in pairs]
            for answer in (
                await self.publish(tenant, folders),
                await self.publish(
                    tenant, [self.folder(f"open-{tenant}", 5000 + number, ["Say hello"])], visibility="public"
                ),
            ):
                assert answer.status_code == 201, answer.text
        snapshot = self.store._store.snapshot()
        for tenant in TENANTS:
            private = [record for record in snapshot.records.values() if _is_private(record, tenant)]
            assert len(private) == num_private
            digests = {digest[:12] for record in private for digest in (record.ref.digest, *record.blobs)}
            self.secrets[tenant] = re.compile("|".join([WORDS[tenant], *sorted(digests)]))

    def assert_no_leak(self, tenant: str, response: httpx.Response) -> None:
        """Check that the response has no secret of another tenant."""
        text = f"{response.status_code} {response.headers!r} {response.text}"
        for owner in TENANTS:
            if owner != tenant:
                assert (found := self.secrets[owner].search(text)) is None, (response.request.url, found, text[:500])

    @property
    def store(self) -> StoreDeployment:
        store: StoreDeployment = self.served.store.replicas[0]
        return store

    def computed_texts(self, patch: pytest.MonkeyPatch) -> list[str]:
        """Record every later text that the encoder's model computes."""
        texts_so_far: list[str] = []
        encoder = self.served.retriever.replicas[0]._pools.current.encoder  # type: ignore[attr-defined]
        compute = encoder._compute

        def counted(texts: list[str]) -> Vectors:
            texts_so_far.extend(texts)
            computed: Vectors = compute(texts)
            return computed

        patch.setattr(encoder, "_compute", counted)
        return texts_so_far

    def num_calls(self) -> int:
        """Return the number of calls over all handles so far, except those that a clock causes."""
        handles = (self.served.retriever, self.served.worker, self.served.store)
        return sum(call.name != "expire" for handle in handles for call in handle.calls)


@asynccontextmanager
async def two_tenants(
    folder: Path, num_private: int = 3, *, index: IndexSettings | None = None, **settings: Any
) -> AsyncIterator[TwoTenants]:
    """Return the application with a filled pool; `index` decides how it is searched."""
    keys = write(folder / "keys.json", *[entry(tenant, tenant) for tenant in TENANTS])
    async with real_app(folder, index=index, keys_file=keys, publish_paths=True, **settings) as (client, served):
        made = TwoTenants(served, client, folder)
        await made.fill(num_private)
        yield made


async def answer_to(tenants: TwoTenants, tenant: str, request: Request) -> httpx.Response:
    method, path, body = request
    return await tenants.ask(tenant, method, path, **({"json": body} if method in ("POST", "PATCH") else {}))


def plans_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Return every plan object of a response."""
    body = json.loads(response.text)
    yield from body["data"] if "data" in body else [body["lora"]]


def _tasks_of(tenant: str, count: int) -> Iterator[list[str]]:
    topics = _TOPICS[tenant]
    for number in range(count):
        task, topic = _TASKS[number % len(_TASKS)] % topics[number // len(_TASKS) % len(topics)], number
        yield [f"{task} number {topic}.", f"{task}, the one numbered {topic}, in short.", f"Please: {task} {topic}."]


def _is_private(record: AdapterRecord, tenant: str) -> bool:
    return record.visibility == "private" and record.ref.tenant == tenant
