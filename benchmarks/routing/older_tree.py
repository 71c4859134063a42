"""Measure an older source tree, for `benchmarks.routing.costs`, which starts this file with that tree's Python.

So it imports from the tree only what commits since 9813db0 have. Each result is a line after the word `result`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import typer

_RESULT = "result "


class OlderTree:
    """A process that measures an older tree. `tree`: a checkout with its virtual environment `.venv`."""

    def __init__(self, tree: Path, *arguments: str) -> None:
        """Start the process; it loads its data. `arguments`: `search COUNT QUERIES` or `publish ROUNDS`."""
        tree = tree.resolve()
        command = [str(tree / ".venv" / "bin" / "python"), str(Path(__file__).resolve()), *arguments]
        env = os.environ | {"PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(
            command, cwd=tree, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> OlderTree:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()  # the process ends
        self._process.wait(timeout=120)
        self._process.stdout.close()

    def result(self, request: str = "") -> list[float]:
        """Return the next result. `request`: a line for the process, if it waits for one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if request:
            print(request, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(_RESULT):
                return [float(value) for value in json.loads(line.removeprefix(_RESULT))]
        raise SystemExit(f"the older tree ended without a result: exit status {self._process.wait()}")


def answer_searches(count: int, num_queries: int) -> None:
    """Build a pool of `count` adapters. For each line `start stop`, report the seconds of these queries."""
    scale, retriever_svc = import_module("benchmarks.pool_scale"), import_module("retriever_svc")
    data, rebuilds = scale.Data.load(), scale.Rebuilds()
    source = scale.Source(data.records(count, scale.SIBLING_COSINE))
    pools = retriever_svc.LivePool(lambda _: data.encoder, source, background=rebuilds)
    rebuilds.run()
    queries, pool = data.queries(num_queries), pools.current
    pool.nearest(queries[:1], scale.TOP_K, "local")
    _report([])
    for line in sys.stdin:
        start, stop = map(int, line.split())
        seconds = []
        for query in queries[start:stop]:
            began = time.perf_counter()
            pool.nearest(query[None], scale.TOP_K, "local")
            seconds.append(time.perf_counter() - began)
        _report(seconds)


def measure_publishes(rounds: int) -> None:
    """Report the seconds from each upload to its answer, as `benchmarks.publish.publish_singles` does."""
    publish, settings = import_module("benchmarks.publish"), import_module("deployments.config")
    two = {"min_replicas": 2, "max_replicas": 2}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings.AppConfig(
            store_uri=str(folder / "pool"),
            preload=(publish.POOL,),
            worker=settings.WorkerSettings(num_threads=1),
            retriever_scaling=settings.ScalingSettings(**two, max_ongoing_requests=128),
            worker_scaling=settings.ScalingSettings(**two, num_cpus=1, max_ongoing_requests=2112),
        )
        prompts = [publish.variant(folder / f"single-{n}", n) for n in range(rounds + 1)]
        with import_module("deployments.server").Server(config, port=0) as server:
            server.prepare(lambda _: None)
            url = server.start()
            server.wait_ready(timeout_s=600)
            asked = [publish.publish_and_ask(url, folder / f"single-{n}", text) for n, text in enumerate(prompts)]
    _report([answered for _, answered in asked[1:]])  # the first is a warm-up


def _report(values: list[float]) -> None:
    print(f"{_RESULT}{json.dumps(values)}", flush=True)


if __name__ == "__main__":
    commands = typer.Typer(help=__doc__)
    commands.command("search")(answer_searches)
    commands.command("publish")(measure_publishes)
    commands()
