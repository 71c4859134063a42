"""An offline run on Ray Data. Each row of the dataset is a part; one actor plans it, another answers and writes it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import ray
from ray.data import ActorPoolStrategy, DataContext

from deployments.auth.ray_token import prepare_own_ray, require_token_mode, start_own_ray
from deployments.batch.answering import PARTS_AT_ONCE, PartAnswerer
from deployments.batch.planning import PartPlanner
from deployments.batch.run import BatchRun


@contextmanager
def cluster(
    num_cpus_each: float, address: str | None, concurrency: int, *, allow_unauthenticated: bool
) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine for the duration of the run.

    `num_cpus_each`: logical CPUs of one engine and of the planner beside it. `allow_unauthenticated`: whether Ray may
    run without its token. Raises: RayUnauthenticated, FolderNotPrivate.
    """
    if address is None:
        sessions = prepare_own_ray(allow_unauthenticated=allow_unauthenticated)
        num_cpus = max(math.ceil(concurrency * num_cpus_each) + 1, os.cpu_count() or 1)
        start_own_ray(
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(sessions),
        )
    else:
        require_token_mode(allow_unauthenticated=allow_unauthenticated)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def answer_parts(run: BatchRun, concurrency: int) -> Iterator[dict[str, int]]:
    """Yield the summary of each remaining part when it is written. `concurrency` engines work on them."""
    _configure_ray_data()
    config = run.settings.config
    parts = ray.data.from_items([asdict(part) for part in run.parts], override_num_blocks=len(run.parts))
    planned = parts.map(
        PartPlanner,
        fn_constructor_args=(run,),
        compute=ActorPoolStrategy(min_size=1, max_size=concurrency),
        num_cpus=config.retriever_scaling.num_cpus,
    )
    answered = planned.map(
        PartAnswerer,
        fn_constructor_args=(run,),
        compute=ActorPoolStrategy(
            size=concurrency,
            max_concurrent_calls_per_actor=PARTS_AT_ONCE,
            max_tasks_in_flight_per_actor=PARTS_AT_ONCE + 1,
        ),
        num_cpus=run.settings.engine_cpus,
        num_gpus=run.settings.engine_gpus,
    )
    for table in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


def _configure_ray_data() -> None:
    """Let a part take as long as it needs, and leave progress and errors to the command."""
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = -1  # Ray Data sees progress only when a whole part is done
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
