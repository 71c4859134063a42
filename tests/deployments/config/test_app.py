from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray import serve

from deployments.config.app import AppConfig
from deployments.scaling.adapter_affinity_router import AdapterAffinityRouter
from deployments.scaling.autoscaling_policy import RetrieverScaling, WorkerScaling
from gpu_worker.config import NativeSettings, NativeWorkerConfig, VllmSettings, VllmWorkerConfig
from gpu_worker.errors import WorkerConfigInvalid


@pytest.mark.parametrize("settings", [{"base_model_name": "auto"}, {"base_model": "org/my:model"}, {"base_model": "/"}])
def test_the_served_base_name_is_a_valid_name_other_than_auto(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AppConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("base_model", "name", "served"),
    [
        ("gemma-3-270m", "", "gemma-3-270m"),
        ("google/gemma-3-270m-it", "", "gemma-3-270m-it"),
        ("/models/tiny/", "", "tiny"),
        ("/models/tiny", "mine", "mine"),
    ],
)
def test_the_base_is_served_under_its_last_path_part_or_its_given_name(base_model: str, name: str, served: str) -> None:
    config = AppConfig(base_model=base_model, base_model_name=name, accepts_base=("other",))
    assert config.served_model.name == served
    assert {base_model, served, "other"} <= config.served_model.accepted_names


def test_a_base_model_may_be_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert AppConfig(base_model="~/models/tiny").base_model == "/home/somebody/models/tiny"
    assert AppConfig(base_model="org/tiny").base_model == "org/tiny"


def test_relative_folders_are_resolved_where_the_application_is_built() -> None:
    config = AppConfig(store_uri="pool", preload=("adapters", "/abs"))
    assert config.store_uri == str(Path.cwd() / "pool")
    assert config.preload == (Path.cwd() / "adapters", Path("/abs"))


def test_default_pools_of_two_folders_have_usage_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        configs.append(AppConfig(cache_dir=tmp_path))
    assert [config.store_uri for config in configs] == [str(tmp_path / name / "loraretriever-pool") for name in "ab"]
    assert configs[0].usage_folder != configs[1].usage_folder


@pytest.mark.parametrize(
    "uri", ["s3://bucket/pool", "s3://bucket/pool?endpoint_override=127.0.0.1:9000&scheme=http&region=x", "gs://b/pool"]
)
def test_a_remote_store_uri_is_unchanged_and_cached_on_disk(uri: str) -> None:
    config = AppConfig(store_uri=uri, cache_dir=Path("/c"), disk_cache_bytes=7)
    assert config.store_uri == uri
    assert config.weights_cache == (Path("/c/weights"), 7)
    assert AppConfig(store_uri=uri, disk_cache_bytes=0).weights_cache is None
    for folder in ("pool", "/data/pool", "file:///data/pool"):
        assert AppConfig(store_uri=folder).weights_cache is None


@pytest.mark.parametrize("uri", ["ftp://host/pool", "s3://key:secret@bucket/pool", "s3://bucket/pool?anonymous=true"])
def test_a_store_that_cannot_be_opened_stops_the_start(uri: str) -> None:
    with pytest.raises(ValidationError, match="store"):
        AppConfig(store_uri=uri)


def test_source_prefixes_are_given_by_tenant_or_explicitly_for_all() -> None:
    by_tenant = {"acme": ("s3://acme",), "globex": ("s3://globex/a", "gs://globex"), "*": ("s3://open",)}
    config = AppConfig(source_prefixes=by_tenant, keys_file=Path("keys.json"))
    assert config.find_source_prefixes("acme") == ("s3://acme", "s3://open")
    assert config.find_source_prefixes("globex") == ("s3://globex/a", "gs://globex", "s3://open")
    assert config.find_source_prefixes("initech") == ("s3://open",)
    assert AppConfig(source_prefixes={"acme": ["s3://acme"]}).find_source_prefixes("globex") == ()
    assert AppConfig(source_prefixes=["s3://bucket"]).find_source_prefixes("local") == ("s3://bucket",)
    for bad in ({"acme": ["/data"]}, {"a/b": ["s3://x"]}, {"": ["s3://x"]}):
        with pytest.raises(ValidationError, match=r"data|neither the name of a tenant"):
            AppConfig(source_prefixes=bad)


def test_with_keys_a_list_of_source_prefixes_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValidationError, match=r"source_prefixes.*by tenant.*'\*'"):
        AppConfig(source_prefixes=["s3://bucket"], keys_file=Path("keys.json"))
    assert AppConfig(source_prefixes=[], keys_file=Path("keys.json")).find_source_prefixes("acme") == ()


TWO_GPUS = {"engine": "vllm", "device": "cuda", "tensor_parallel_size": 2}
COMMON = {
    "device": "cpu",
    "dtype": "bfloat16",
    "num_threads": 3,
    "bank_rank_rows": 11,
    "max_batch_size": 12,
    "max_model_len": 13,
    "kv_tokens": 130,
    "max_step_tokens": 14,
    "max_waiting": 15,
    "max_wait_s": 17.5,
    "host_cache_bytes": 16,
    "prefix_cache": False,
    "prefix_cache_shares_base": True,
    "step_timeout_s": 18.0,
    "niceness": 4,
}


@pytest.mark.parametrize(
    ("kind", "config_kind", "own"),
    [
        (
            NativeSettings,
            NativeWorkerConfig,
            {"max_chunk_tokens": 13, "prompt_lookup_tokens": 5, "quantization": "int8"},
        ),
        (
            VllmSettings,
            VllmWorkerConfig,
            {"tensor_parallel_size": 2, "enforce_eager": True, "fusion_rank_rows": 9, "model_check_max_parameters": 7},
        ),
    ],
)
def test_worker_settings_reach_the_engine_field_by_field(kind: Any, config_kind: Any, own: dict[str, Any]) -> None:
    settings = COMMON | own
    config = AppConfig(base_model="a/b", cache_dir=Path("/c"), worker=kind(**settings))
    worker = config.worker_config()
    assert type(worker) is config_kind
    assert {name: getattr(worker, name) for name in settings} == settings
    assert (worker.base_model, worker.cache_dir) == ("a/b", Path("/c"))
    assert {*settings, "engine"} == {field.name for field in fields(kind)}, "a setting without a case here"


@pytest.mark.parametrize(("num_gpus", "share"), [(0.5, 0.5), (0.25, 0.25), (1, 1.0), (2, 1.0)])
def test_a_worker_plans_with_its_share_of_the_gpu(num_gpus: float, share: float) -> None:
    scaling = {"ray_actor_options": {"num_gpus": num_gpus}}
    config = AppConfig(worker=NativeSettings(device="cuda"), worker_scaling=scaling)
    assert config.worker_config().device_share == share
    assert AppConfig().worker_config().device_share == 1.0
    assert AppConfig().worker_config().num_threads is None, "they are counted on the worker's machine"


def test_a_worker_that_could_not_start_is_refused_before_anything_starts() -> None:
    with pytest.raises(
        ValidationError, match=r"worker\.native\n.*max_step_tokens must be at least max_batch_size \(8\), got 4"
    ):
        AppConfig.model_validate({"worker": {"max_batch_size": 8, "max_step_tokens": 4}})
    with pytest.raises(WorkerConfigInvalid, match=r"kv_tokens must be at least max_model_len \(100\), got 99"):
        NativeSettings(max_model_len=100, kv_tokens=99)
    with pytest.raises(ValidationError, match="kv_tokens must be at least"):
        AppConfig.model_validate({"worker": {"max_model_len": 100, "kv_tokens": 99}})


@pytest.mark.parametrize(
    ("worker", "num_gpus", "problem"),
    [
        ({"device": "cuda"}, 0, "num_gpus"),
        ({"device": "cpu"}, 1, "num_gpus"),
        ({"device": "cpu"}, 0.5, "num_gpus"),
        ({"device": "cuda"}, 1, None),
        (TWO_GPUS, 1, "set num_gpus to 2"),
        (TWO_GPUS, 0.5, "set num_gpus to 2"),
        (TWO_GPUS, 4, "set num_gpus to 2"),
        (TWO_GPUS, 2, None),
    ],
)
def test_a_worker_reserves_a_gpu_for_each_process_that_shares_the_model(
    worker: dict[str, Any], num_gpus: float, problem: str | None
) -> None:
    with nullcontext() if problem is None else pytest.raises(ValidationError, match=problem):
        config = AppConfig(worker=worker, worker_scaling={"ray_actor_options": {"num_gpus": num_gpus}})
        assert config.worker_config().device == "cuda"
        options = config.worker_options()
        assert options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": num_gpus}
        assert not any(name.startswith("placement_group") for name in options), "one actor sees all its GPUs"


@pytest.mark.parametrize("name", ["ingress_scaling", "retriever_scaling", "store_scaling", "worker_scaling"])
def test_serve_takes_the_scaling_of_every_deployment(name: str) -> None:
    settings = {
        "min_replicas": 1,
        "max_replicas": 3,
        "initial_replicas": 2,
        "target_ongoing_requests": 9,
        "upscale_delay_s": 4,
        "downscale_delay_s": 40,
        "look_back_period_s": 20,
        "metrics_interval_s": 10,
    }
    config = AppConfig.model_validate({name: {"autoscaling_config": settings}})
    own = {"worker_scaling": config.worker_options, "retriever_scaling": config.retriever_options}
    options = own[name]() if name in own else getattr(config, name).root
    assert "num_replicas" not in options
    taken = serve.deployment(AppConfig, **options)._deployment_config.autoscaling_config
    assert {name: getattr(taken, name) for name in settings} == settings
    assert taken.policy.is_default_policy_function() == (name not in own)


def test_workers_and_retrievers_have_their_own_scaling_policies_and_workers_a_router() -> None:
    scaling = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}}
    config = AppConfig(worker_scaling=scaling, retriever_scaling=scaling)
    taken = serve.deployment(AppConfig, **config.retriever_options())._deployment_config
    assert taken.autoscaling_config.policy.get_policy().__name__ == RetrieverScaling.__name__
    assert AppConfig().retriever_options() == AppConfig().retriever_scaling.root
    taken = serve.deployment(AppConfig, **config.worker_options())._deployment_config
    assert taken.autoscaling_config.policy.get_policy().__name__ == WorkerScaling.__name__
    assert taken.request_router_config.get_request_router_class().__name__ == AdapterAffinityRouter.__name__
    policy = {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"}
    config = AppConfig(worker_scaling={"autoscaling_config": {"max_replicas": 2, "policy": policy}})
    assert config.worker_options()["autoscaling_config"]["policy"] == policy, "an operator's own"


def test_only_workers_may_scale_to_zero() -> None:
    none = {"autoscaling_config": {"min_replicas": 0}}
    assert AppConfig(worker_scaling=none).workers_scale_to_zero and not AppConfig().workers_scale_to_zero
    for name in ("ingress_scaling", "retriever_scaling", "store_scaling"):
        with pytest.raises(ValidationError, match=name):
            AppConfig.model_validate({name: none})


@pytest.mark.parametrize("name", ["ingress_scaling", "worker_scaling"])
def test_a_removed_replica_has_time_for_the_longest_request(name: str) -> None:
    settings = {name: {"graceful_shutdown_timeout_s": 99}}
    assert AppConfig.model_validate(settings | {"max_request_s": 99}).max_request_s == 99
    with pytest.raises(ValidationError, match="graceful_shutdown_timeout_s"):
        AppConfig.model_validate(settings | {"max_request_s": 100})


def test_the_worker_deployment_accepts_as_many_requests_as_its_engine() -> None:
    worker = AppConfig().worker
    most = AppConfig().worker_scaling.root["max_ongoing_requests"]
    assert most >= worker.max_batch_size + worker.max_waiting


def test_a_relative_keys_file_is_resolved_at_the_start_and_keeps_its_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real.json").write_text("[]")
    (tmp_path / "keys.json").symlink_to("real.json")
    monkeypatch.chdir(tmp_path)
    assert AppConfig(keys_file=Path("keys.json")).keys_file == tmp_path / "keys.json"


def test_keys_set_the_defaults_that_protect_tenants_and_settings_override_them() -> None:
    """With keys, adapters are private and named with their owner, public ones need approval, and paths are refused."""
    open_, keyed = AppConfig(), AppConfig(keys_file=Path("/keys.json"))
    assert (open_.default_visibility, keyed.default_visibility) == ("public", "private")
    assert (open_.public_requires_approval, keyed.public_requires_approval) == (False, True)
    assert (open_.owner_names, keyed.owner_names) == (False, True)
    assert (open_.may_publish_paths, keyed.may_publish_paths) == (True, False)
    assert (open_.allow_remote_publish, open_.source_prefixes) == (False, ())
    chosen = AppConfig(keys_file=Path("/keys.json"), public_requires_approval=False, publish_paths=True)
    assert (chosen.public_requires_approval, chosen.may_publish_paths) == (False, True)
    chosen = AppConfig(public_requires_approval=True, publish_paths=False)
    assert (chosen.public_requires_approval, chosen.may_publish_paths) == (True, False)


def test_an_operators_chat_template_reaches_the_workers(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}")
    config = AppConfig(chat_template=path)
    assert config.worker_config().chat_template == "{{ messages }}"
    assert (config.template, config.served_model.template_in_use) == ("auto", "chat")
    assert AppConfig().worker_config().chat_template is None


@pytest.mark.parametrize("source", [None, "{% for %}"])
def test_a_chat_template_that_cannot_be_used_stops_the_start(tmp_path: Path, source: str | None) -> None:
    path = tmp_path / "own.jinja"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ValueError, match=r"chat_template\n.*own\.jinja"):
        AppConfig(chat_template=path)


def test_a_scaling_group_changes_only_what_it_names() -> None:
    config = AppConfig.model_validate(
        {"worker_scaling": {"num_replicas": 3}, "store_scaling": {"ray_actor_options": {"resources": {"l4": 1}}}}
    )
    assert config.worker_scaling.root == AppConfig().worker_scaling.root | {"num_replicas": 3}
    actor = {"num_cpus": 0.2, "resources": {"l4": 1}}
    assert config.store_scaling.root == AppConfig().store_scaling.root | {"ray_actor_options": actor}


def test_cuda_implies_the_gpus_of_a_worker() -> None:
    assert AppConfig.model_validate({"worker": {"device": "cuda"}}).worker_scaling.num_gpus == 1
    assert AppConfig.model_validate({"worker": TWO_GPUS}).worker_scaling.num_gpus == 2
    half = {"worker": {"device": "cuda"}, "worker_scaling": {"ray_actor_options": {"num_gpus": 0.5}}}
    assert AppConfig.model_validate(half).worker_scaling.num_gpus == 0.5


def test_each_of_several_models_has_settings_of_its_own_and_shares_the_others() -> None:
    models = [
        {"base_model": "org/a", "worker": {"device": "cuda", "max_model_len": 512}},
        {"base_model": "org/b", "worker_scaling": {"autoscaling_config": {"min_replicas": 0}}, "accepts_base": ["x/b"]},
    ]
    config = AppConfig(models=models, max_new_tokens=300)
    first, second = config.by_model.values()
    assert list(config.by_model) == [model.name for model in config.served_models] == ["a", "b"]
    found = [(c.worker_config().device, c.worker_scaling.num_gpus, c.workers_scale_to_zero) for c in (first, second)]
    assert found == [("cuda", 1, False), ("cpu", 0, True)]
    assert {each.worker_config().max_new_tokens for each in (first, second)} == {300}
    assert (config.served_models.first.max_model_len, config.served_models.widest.name) == (512, "b")
    assert (config.served_models.made_for("x/b").name, config.served_models.made_for(None).name) == ("b", "a")
    assert [config.served_models.split(name) for name in ("b", "b:auto", "b:", "c:auto", "poet")] == [
        ("b", ""), ("b", "auto"), ("", "b:"), ("", "c:auto"), ("", "poet")
    ]  # fmt: skip
    assert AppConfig().by_model == {"gemma-3-270m": AppConfig()}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"models": [{}], "template": "chat"}, "models: cannot be combined with template; move it into a model"),
        ({"models": [{"base_model": "x/a"}, {"base_model": "y/a"}]}, "'a' is the name of two"),
        ({"models": [{}, {"base_model": "/models/base"}]}, "the name 'base' has a special meaning in lora.fallback"),
        ({"models": [{"base_model": "x/a"}, {"accepts_base": ["x/a"]}]}, "both accept adapters of 'x/a'"),
        (
            {"models": [{"worker": {"device": "cuda"}, "worker_scaling": {"ray_actor_options": {"num_gpus": 0}}}]},
            "cuda",
        ),
        ({"models": [{"worker_scaling": {"graceful_shutdown_timeout_s": 1}}]}, "at least max_request_s"),
    ],
)
def test_models_that_cannot_be_told_apart_or_started_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        AppConfig(**settings)
