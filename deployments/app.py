"""The application graph: every deployment and every handle, on one screen.

Serve reads `build_app`'s annotation to turn a YAML file's args into an AppConfig: it must be the class, not its name.
"""

import os

from ray import serve
from ray.serve import Application

from deployments.private_names import check_libraries

check_libraries(
    of_engine=False
)  # before the imports that need private names, whose own errors would not say what to do

from deployments.auth.ray_token import require_token_mode
from deployments.calls.catalogue_clients import RetrieverReplica, StoreReplica
from deployments.calls.proxy_limits import require_own_proxy
from deployments.calls.serve_calls import returning_refusals
from deployments.calls.worker_client import WorkerReplica
from deployments.config.app import AppConfig
from deployments.config.loading import require_set_keys
from deployments.ingress import Ingress
from deployments.retriever import RetrieverDeployment
from deployments.store import StoreDeployment
from deployments.worker import WorkerDeployment


def build_app(args: AppConfig) -> Application:
    """Return the application behind Serve's proxies. Raises: SettingsInvalid, RayUnauthenticated, ProxyUnsafe."""
    require_set_keys(args)
    return application(args)


def application(args: AppConfig, address: tuple[str, int] | None = None) -> Application:
    """Bind Store; a Worker(Store) for each base model; Retriever(catalogue); Ingress(all), which may listen itself.

    Raises: RayUnauthenticated, ProxyUnsafe.
    """
    require_own_proxy(os.environ, has_keys=args.has_keys)
    require_token_mode(allow_unauthenticated=args.allow_unauthenticated_ray)
    store_class = returning_refusals(StoreDeployment, StoreReplica)
    worker_class = returning_refusals(WorkerDeployment, WorkerReplica)
    retriever_class = returning_refusals(RetrieverDeployment, RetrieverReplica)
    store = serve.deployment(store_class, name="Store", **args.store_scaling.root)
    retriever = serve.deployment(retriever_class, name="Retriever", **args.retriever_options())
    ingress = serve.deployment(serve.ingress()(Ingress), name="Ingress", **args.ingress_scaling.root)

    store_handle = store.bind(args)
    workers = {}
    for name, model in args.by_model.items():
        deployment = f"Worker-{name}" if args.models else "Worker"
        workers[name] = serve.deployment(worker_class, name=deployment, **model.worker_options()).bind(
            model.worker_config(),
            store_handle,
            args.weights_cache,
            allow_unauthenticated_ray=args.allow_unauthenticated_ray,
        )
    # Serve starts replicas in this order, and a Worker takes longest.
    return ingress.bind(args, workers=workers, retriever=retriever.bind(args), store=store_handle, address=address)
