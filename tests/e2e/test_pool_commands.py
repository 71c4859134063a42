"""The commands that manage a pool, against the live application."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.config.app import AppConfig
from deployments.retriever_factory import live_pool, retriever_over
from lora_store import LoraStore
from retriever_svc import Route, RouteRequest
from retriever_svc.encoder_files import DEFAULT_MODEL, ENGLISH_MODEL, model_folder
from tests.deployments.scripted import run as command
from tests.e2e.live import Live, eventually, run
from tests.e2e.starter_pool import Heldout
from tests.soak import Scale

TOPICS = ("lighthouses", "volcanoes", "violins")


@pytest.fixture
def pool(live: Live) -> Iterator[list[Path]]:
    """Publish three adapters with one command, and withdraw them with another."""
    folders = [live.folder(topic, 9000 + number, topic) for number, topic in enumerate(TOPICS)]
    run(live, "publish", *map(str, folders))
    yield folders
    said = run(live, "withdraw", *TOPICS)
    assert all(topic in said for topic in TOPICS)
    assert "lighthouses" not in run(live, "list")


def test_publish_show_and_roll_back(live: Live, pool: list[Path]) -> None:
    first = live.call("GET", "/v1/loras/volcanoes").json()
    run(live, "publish", str(live.folder("volcanoes", 9100, "volcanoes")))
    second = live.call("GET", "/v1/loras/volcanoes").json()
    shown = run(live, "show", "volcanoes")
    assert first["digest"][:12] in shown
    assert second["digest"][:12] in shown
    run(live, "rollback", "volcanoes")
    assert live.call("GET", "/v1/loras/volcanoes").json()["digest"] == first["digest"]
    run(live, "rollback", "volcanoes", "--to", second["digest"][:12])
    assert live.call("GET", "/v1/loras/volcanoes").json()["digest"] == second["digest"]


def test_a_pool_exported_from_a_server_and_restored_gives_the_same_plans(
    url: str, config: AppConfig, heldout: list[Heldout], tmp_path: Path
) -> None:
    archive, store = str(tmp_path / "pool.tar"), str(tmp_path / "restored")
    assert command("pool", "export", archive, "--url", url).exit_code == 0
    assert command("pool", "import", archive, "--store", store).exit_code == 0
    prompts = [row.input for row in heldout]
    restored = plans_of(config.model_copy(update={"store_uri": store}), prompts)
    assert restored == plans_of(config, prompts)
    served = [served_plan(url, prompt) for prompt in prompts]  # one by one, as the encoder may round to bfloat16
    assert [[row["digest"] for row in plan["adapters"]] for plan in served] == [
        [digest for digest, _ in plan] for plan in restored
    ]
    assert len({str(plan) for plan in restored}) > 5


def served_plan(url: str, prompt: str) -> dict[str, Any]:
    """Return the plan that the server makes for the prompt."""
    body = {"prompt": [prompt], "lora": {"strategy": "mixture", "k": 3}}
    [plan] = httpx.post(f"{url}/v1/route", json=body, timeout=120).json()["data"]
    found: dict[str, Any] = plan
    return found


def plans_of(config: AppConfig, prompts: list[str]) -> list[list[tuple[str, float]]]:
    """Return the digests and weights that a Retriever of this store plans for each prompt."""
    store = LoraStore(config.store_uri, accepts_base=())
    retriever = retriever_over(live_pool(config, store.snapshot), config)
    routes = [one for prompt in prompts for one in retriever.route([RouteRequest(prompt)])]
    return [[(each.ref.digest, each.weight) for each in one.plan.adapters] for one in routes if isinstance(one, Route)]


def test_verify_finds_a_damaged_blob_and_publishing_again_repairs_it(live: Live, pool: list[Path]) -> None:
    run(live, "pool", "verify")
    digest = live.call("GET", "/v1/loras/violins").json()["weights_digest"]
    [damaged] = [path for path in live.stored("blobs") if path.endswith(digest)]
    live.overwrite(damaged, b"not what was stored")
    said = run(live, "pool", "verify", code=1)
    assert "violins" in said
    run(live, "publish", str(pool[2]))
    run(live, "pool", "verify")


def test_doctor_and_measured_routing(live: Live, pool: list[Path], tmp_path: Path) -> None:
    said = run(live, "pool", "doctor")
    assert all(topic in said for topic in TOPICS) or "100" in said
    lines = [json.dumps({"input": f"Tell me about {topic}, quickly.", "adapter": topic}) for topic in TOPICS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    output = run(live, "route", "--file", str(tmp_path / "prompts.jsonl"))
    assert "hit@1" in output
    assert "1.000" in output or "100" in output


@pytest.fixture
def only_in_soak(scale: Scale) -> None:
    if not scale.is_full:
        pytest.skip("each replica converts an encoder twice: in make soak")


def test_reindex_swaps_the_encoder_on_every_replica(
    only_in_soak: None, live: Live, pool: list[Path], tmp_path: Path
) -> None:
    before = {stats.encoder for stats in live.on_all("Retriever", "index_stats")}
    other = other_encoder(tmp_path / "encoder")
    try:
        run(live, "pool", "reindex", "--encoder", str(other))
        eventually(lambda: before.isdisjoint(stats.encoder for stats in live.on_all("Retriever", "index_stats")))
        assert [live.chosen(f"Tell me about {topic}, quickly.") for topic in TOPICS] == list(TOPICS)
        live.publish(live.folder("late", 9300, "latecomers"))
        assert live.chosen("Explain latecomers, please.") == "late"
    finally:
        run(live, "pool", "reindex", "--encoder", DEFAULT_MODEL)
    eventually(lambda: {stats.encoder for stats in live.on_all("Retriever", "index_stats")} == before)
    assert live.chosen("Explain latecomers, please.") == "late"
    run(live, "withdraw", "late")


def other_encoder(target: Path) -> Path:
    """The packaged English encoder with slightly different weights."""
    shutil.copytree(model_folder(ENGLISH_MODEL), target)
    [weights] = target.rglob("model.safetensors")
    tensors = load_file(weights)
    random = torch.Generator().manual_seed(0)
    key = next(name for name in tensors if "word_embeddings" in name)
    tensors[key] = tensors[key] + torch.randn(tensors[key].shape, generator=random) * 1e-3
    weights.chmod(0o644)
    save_file(tensors, weights, metadata={"format": "pt"})
    return target
