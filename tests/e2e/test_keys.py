"""Keys and tenants in the real application: Serve's routing, replicas, and the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from ray import serve

from deployments.app import build_app
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig, RetrievalSettings
from gpu_worker.config import NativeSettings
from gpu_worker.model.base_model import load_base_model
from lora_store import Sample, write_peft_folder
from tests.deployments.key_files import bearer, entry, write
from tests.e2e.live import BASE, completion, eventually
from tests.tiny import linear_shapes, random_adapter, tiny_config

APP = "keyed"
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Keyed:
    """The running application, its keys file, and an adapter to publish."""

    url: str
    keys: Path
    adapter: Path

    def call(self, key: str, method: str, path: str, **request: object) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=120, headers=bearer(key), **request)  # type: ignore[arg-type]

    def ask(self, key: str, model: str) -> httpx.Response:
        return self.call(key, "POST", "/v1/completions", json=completion(model, "The sea is", 8))

    def publish(self, key: str) -> httpx.Response:
        files = [("files", (path.name, path.read_bytes())) for path in sorted(self.adapter.iterdir())]
        return self.call(key, "POST", "/v1/loras", files=files, data={"name": "poet"})

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def keyed(
    server: Server, tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Keyed]:
    """Yield a second, small application with a key for each of two tenants."""
    folder, model = tmp_path_factory.mktemp("keyed"), tiny_folders["gemma3"]
    keys = write(folder / "keys.json", entry("acme-key"), entry("globex-key", "globex"))
    config = AppConfig(
        base_model=str(model),
        base_model_name=BASE,
        store_uri=str(folder / "pool"),
        keys_file=keys,
        retrieval=RetrievalSettings(encoder_threads=1),
        worker=NativeSettings(dtype="float32", num_threads=1, bank_rank_rows=32, max_model_len=512, max_batch_size=4),
    )
    modules = random_adapter(linear_shapes(load_base_model(tiny_config(model))), 5, rank=4).modules
    write_peft_folder(folder / "poet", modules, base_model=BASE, samples=[Sample("Rhyme."), Sample("Write a poem.")])
    serve.run(build_app(config), name=APP, route_prefix=f"/{APP}", logging_config={"enable_access_log": False})
    running = Keyed(f"{server.proxy_url}/{APP}", keys, folder / "poet")
    eventually(lambda: httpx.get(f"{running.url}/ready", timeout=30).status_code == 200, within_s=READY_TIMEOUT_S)
    yield running
    serve.delete(APP)


def test_the_openai_client_needs_only_its_key(keyed: Keyed) -> None:
    answer = keyed.client("acme-key").completions.create(model=BASE, prompt="Hi", max_tokens=4)
    assert answer.usage is not None
    for key in ("wrong", "acme-keys"):
        with pytest.raises(openai.AuthenticationError):
            keyed.client(key).completions.create(model=BASE, prompt="Hi", max_tokens=4)
    assert httpx.get(f"{keyed.url}/v1/loras").status_code == 401


def test_tenants_publish_the_same_bytes_and_withdraw_independently(
    keyed: Keyed,
) -> None:
    assert keyed.publish("acme-key").status_code == 201
    assert keyed.ask("acme-key", "poet").status_code == 200
    assert keyed.ask("globex-key", "poet").status_code == keyed.ask("globex-key", "acme/poet").status_code == 404
    assert [model.id for model in keyed.client("globex-key").models.list()] == ["auto", BASE]
    assert keyed.publish("globex-key").status_code == 201
    before = keyed.ask("globex-key", "poet").json()["choices"][0]["text"]
    assert keyed.call("acme-key", "DELETE", "/v1/loras/poet").status_code == 200
    assert keyed.ask("acme-key", "poet").status_code == 404
    assert keyed.ask("globex-key", "poet").json()["choices"][0]["text"] == before
    shown = keyed.call("globex-key", "GET", "/v1/loras/poet").json()
    assert (shown["tenant"], shown["visibility"], shown["versions"][0]["actor"]) == (
        "globex",
        "private",
        "id-globex-key",
    )


def test_a_new_key_is_valid_at_once(keyed: Keyed) -> None:
    assert keyed.ask("next-key", BASE).status_code == 401
    write(keyed.keys, entry("acme-key"), entry("globex-key", "globex"), entry("next-key"))
    assert [keyed.ask(key, BASE).status_code for key in ("next-key", "acme-key")] == [200, 200]
    write(keyed.keys, entry("next-key"), entry("globex-key", "globex"))
    assert [keyed.ask(key, BASE).status_code for key in ("next-key", "acme-key")] == [200, 401]
    write(keyed.keys, entry("acme-key"), entry("globex-key", "globex"))
