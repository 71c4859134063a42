"""One real application for all end-to-end tests: real models, the starter pool, HTTP on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from ray import serve
from ray.serve._private.constants import DEFAULT_TRACING_EXPORTER_IMPORT_PATH

from deployments.app import build_app
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig, RetrievalSettings
from gpu_worker.model.base_model import load_base_model
from tests.e2e.live import APP, BASE, CONTEXT, PATIENT_PROXIES, Live, eventually
from tests.e2e.starter_pool import EXAMPLES, POOL, Heldout
from tests.s3 import S3Endpoint
from tests.served_engine import START_S, WORKER, save_served_model
from tests.tiny import linear_shapes, tiny_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> AppConfig:
    """Return settings whose workers compute in float32, so that rows of a batch can be compared with rows alone.

    Where a request sets no temperature it is 0, as with `make serve`: answers of examples are the same each time.
    On one thread: next to other processes that compute, two threads mostly wait for each other, and busily.
    """
    return AppConfig(
        store_uri=str(tmp_path_factory.mktemp("pool")),
        preload=(POOL,),
        worker={"dtype": "float32", "num_threads": 1, "max_batch_size": 16, **WORKER},  # type: ignore[arg-type]  # of either engine
        ingress_scaling={"health_check_period_s": 1},  # type: ignore[arg-type]
        sampling_defaults={"temperature": 0},  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def server(config: AppConfig) -> Iterator[Server]:
    """Yield the server. Its Ingress listens itself; other applications of its Ray are behind Serve's proxy."""
    with tell_often(), Server(config, port=0, num_cpus=8, uses_proxy=False) as server:
        server.prepare(print)
        server.start()
        ready = server.wait_ready(timeout_s=START_S)
        assert ready["num_adapters"] == len(list(POOL.glob("*/adapter_config.json")))
        yield server


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    return server.url


@contextmanager
def tell_often() -> Iterator[None]:
    """Ray exports metrics every second instead of every tenth; a request is traced where it asks for it, in files.

    A proxy may take a minute to answer its controller.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", DEFAULT_TRACING_EXPORTER_IMPORT_PATH)
        patch.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "0")
        for name, value in PATIENT_PROXIES.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def heldout() -> list[Heldout]:
    """Return two held-out prompts of every task, tasks in turn."""
    tasks = sorted((EXAMPLES / "starter_heldout").glob("*.jsonl"))
    rows = [(path.stem, [json.loads(line) for line in path.read_text().splitlines()[:2]]) for path in tasks]
    return [Heldout(task, lines[turn]["input"], lines[turn]["output"]) for turn in range(2) for task, lines in rows]


def with_context(model: Path, num_tokens: int) -> None:
    """Change how many tokens a saved model can read and write."""
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": num_tokens}))


@pytest.fixture(scope="session")
def live(
    server: Server, s3_endpoint: S3Endpoint, tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Live:
    """Return a second application, behind the proxy: tiny, replicated, on S3, without a cache to hide the store."""
    model = save_served_model(tiny_folders, tmp_path_factory.mktemp("talkative"))
    with_context(model, CONTEXT)
    config = AppConfig(
        base_model=str(model),
        base_model_name=BASE,
        store_uri=s3_endpoint.uri("live"),
        disk_cache_bytes=0,
        max_concurrent_requests=32,
        # In bfloat16 a text's vector depends on the length of the texts that are encoded with it.
        retrieval=RetrievalSettings(encoder_dtype="float32"),
        worker={  # type: ignore[arg-type]  # of either engine
            "dtype": "float32",
            "num_threads": 1,
            "bank_rank_rows": 32,
            "max_model_len": CONTEXT,
            "max_batch_size": 16,
            "host_cache_bytes": 0,
            **WORKER,
        },
        store_scaling={"health_check_period_s": 1},
        retriever_scaling={"num_replicas": 2, "health_check_period_s": 1},
        worker_scaling={"num_replicas": 2},
    )
    logging_config = {"enable_access_log": False, "encoding": "JSON"}
    serve.run(build_app(config), name=APP, route_prefix=f"/{APP}", logging_config=logging_config)
    shapes = linear_shapes(load_base_model(tiny_config(model)))
    running = Live(f"{server.proxy_url}/{APP}", config, s3_endpoint, shapes, tmp_path_factory.mktemp("live-adapters"))
    eventually(lambda: running.call("GET", "/ready").status_code == 200, within_s=START_S)
    return running  # it ends with the server
