"""Ask mypy whether deployments and fakes satisfy the Protocols by which the clients call them."""

from __future__ import annotations

from deployments.calls.catalogue_clients import RetrieverReplica, StoreReplica
from deployments.calls.worker_client import WorkerReplica
from deployments.retriever import RetrieverDeployment
from deployments.store import StoreDeployment
from deployments.worker import WorkerDeployment
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import FakeWorker

RETRIEVERS: list[type[RetrieverReplica]] = [RetrieverDeployment, FakeRetriever]
STORES: list[type[StoreReplica]] = [StoreDeployment, FakeStore]
WORKERS: list[type[WorkerReplica]] = [WorkerDeployment, FakeWorker]
