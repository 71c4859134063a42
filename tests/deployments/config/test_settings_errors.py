from __future__ import annotations

from pathlib import Path

import pytest

from deployments.config.loading import load_config
from deployments.config.settings_errors import SettingsInvalid


def message_for(folder: Path, text: str) -> str:
    file = folder / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SettingsInvalid) as caught:
        load_config(file)
    return str(caught.value).replace(str(file), "settings.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("worker: {max_batch: 8}", "worker.max_batch: unknown; did you mean 'max_batch_size'?"),
        ("basemodel: x", "basemodel: unknown; did you mean 'base_model'?"),
        ("zzzz: 1", "zzzz: unknown"),
        ("retrieval: {top_k: 1}", "retrieval.top_k: unknown here; sampling_defaults.top_k?"),
        ("store_scaling: {replicas: 1}", "store_scaling.replicas: unknown; did you mean 'num_replicas'?"),
        ("worker: {bank_rank_rows: 0}", "worker.bank_rank_rows: must be at least 1, got 0"),
        ("worker: {max_batch_size: 0}", "worker.max_batch_size: must be at least 1, got 0"),
        ("worker: {niceness: 20}", "worker.niceness: must be at most 19, got 20"),
        ("worker: {dtype: int4}", "worker.dtype: must be 'auto', 'float32' or 'bfloat16', got 'int4'"),
        ("retrieval: {weights: heavy}", "retrieval.weights: must be 'evidence', 'uniform' or 'softmax', got 'heavy'"),
        (
            "worker_scaling: {autoscaling_config: {min_replicas: -1}}",
            "worker_scaling.autoscaling_config.min_replicas: must be at least 0, got -1",
        ),
        ("scale_from_zero_timeout_s: 0", "scale_from_zero_timeout_s: must be above 0, got 0"),
        (
            "base_model_name: a/b",
            "base_model_name: 'a/b' cannot be the name of a model: use 1 to 64 of A-Za-z0-9._- except 'auto'",
        ),
        ("sampling_defaults: {temperature: 2.1}", "sampling_defaults.temperature: must be at most 2, got 2.1"),
        ("sampling_defaults: {top_p: 0}", "sampling_defaults.top_p: must be above 0, got 0"),
        (
            "sampling_defaults: {presence_penalty: 1}",
            "sampling_defaults.presence_penalty: unknown; did you mean 'repetition_penalty'?",
        ),
        ("max_new_tokens: 255", "max_new_tokens: must be at least 256, got 255"),
        ("max_concurrent_requests: 0", "max_concurrent_requests: must be at least 1, got 0"),
        ("max_request_s: 0", "max_request_s: must be above 0, got 0"),
        (
            "max_request_s: 601",
            "ingress_scaling.graceful_shutdown_timeout_s must be at least max_request_s = 601, got 600",
        ),
        ("retrieval: {k: 17}", "retrieval.k: must be at most 16, got 17"),
        ("retrieval: {min_score: 2}", "retrieval.min_score: must be at most 1, got 2"),
        ("retrieval: {min_score: -1.5}", "retrieval.min_score: must be at least -1, got -1.5"),
        ("worker: {engine: null}", "worker.engine: must be 'native', got null"),
        ("worker: {engine: sglang}", "worker.engine: must be 'native' or 'vllm', got 'sglang'"),
        (
            "worker: {tensor_parallel_size: 2}",
            "worker.tensor_parallel_size: is a setting of the engine 'vllm'; leave it unset, or set"
            " worker.engine to 'vllm'",
        ),
        (
            "worker: {engine: vllm, max_chunk_tokens: 64}",
            "worker.max_chunk_tokens: is a setting of the engine 'native'; leave it unset, or set"
            " worker.engine to 'native'",
        ),
        ("worker: {engine: vllm, max_batch: 8}", "worker.max_batch: unknown; did you mean 'max_batch_size'?"),
        ("enforce_eager: true", "enforce_eager: unknown here; worker.enforce_eager?"),
        (
            "worker_scaling: {num_replicas: 0}",
            "worker_scaling.num_replicas: must be a whole number of at least 1, got 0; for a range set"
            " autoscaling_config",
        ),
        (
            "store_scaling: {num_replicas: 2, autoscaling_config: {max_replicas: 3}}",
            "store_scaling.num_replicas: cannot be combined with autoscaling_config; set one of them",
        ),
        (
            "worker_scaling: {autoscaling_config: {max_replica: 3}}",
            "worker_scaling.autoscaling_config.max_replica: unknown; did you mean 'max_replicas'?",
        ),
        (
            "worker_scaling: {ray_actor_options: {num_cpus: much}}",
            "worker_scaling.ray_actor_options.num_cpus: must be a number, got 'much'",
        ),
        (
            "worker_scaling: {ray_actor_options: 3}",
            "worker_scaling.ray_actor_options: must be an object with named fields, got 3",
        ),
        ("worker_scaling: {max_ongoing_requests: 0}", "worker_scaling.max_ongoing_requests: must be above 0, got 0"),
        ("worker: {max_wait_s: 0}", "worker.max_wait_s: must be above 0, got 0"),
        ("template: jinja", "template: must be 'auto', 'alpaca' or 'chat', got 'jinja'"),
        ("max_request_s: long", "max_request_s: must be a number, got 'long'"),
        ("admission: {max_rank: many}", "admission.max_rank: must be a whole number, got 'many'"),
        ("worker: 3", "worker: must be an object with named fields, got 3"),
        ("source_prefixes: 3", "source_prefixes: must be an object with named fields, got 3"),
        (
            "max_upload_total_bytes: 5",
            "max_upload_total_bytes must hold one upload, which has admission.max_weights_bytes"
            " + 17825792 = 1091567616 bytes, got 5",
        ),
        ("device: cuda", "device: unknown here; worker.device?"),
        (
            "worker_scaling: {min_replicas: 1}",
            "worker_scaling.min_replicas: unknown here; autoscaling_config.min_replicas?",
        ),
        (
            "worker_scaling: {look_back_s: 1}",
            "worker_scaling.look_back_s: unknown here; autoscaling_config.look_back_period_s?",
        ),
        ("worker_scaling: {num_cpus: 1}", "worker_scaling.num_cpus: unknown here; ray_actor_options.num_cpus?"),
        ("worker: {base_model: x}", "worker.base_model: unknown here; base_model?"),
        ("worker: {strategy: fusion}", "worker.strategy: unknown here; retrieval.strategy?"),
        ("port: 9000", "port: is an option of the command: serve --port 9000"),
        ("metrics_port: 9464", "metrics_port: is an option of the command: serve --metrics-port 9464"),
        ("worker: {host_cache_bytes: 8GB}", "worker.host_cache_bytes: must be a number of bytes: 8GB is 8000000000"),
        ("disk_cache_bytes: 1.5 GiB", "disk_cache_bytes: must be a number of bytes: 1.5 GiB is 1610612736"),
        ("- a\n- b", "must contain `name: value` lines, got a list"),
        ("SECRET", "must contain `name: value` lines, got a single value"),
        ("max_concurrent_requests: true", "max_concurrent_requests: must be a number, got true or false"),
        ("worker: {max_batch_size: yes}", "worker.max_batch_size: must be a number, got true or false"),
        (
            "models: [{worker: {max_batch_size: yes}}]",
            "models.0.worker.max_batch_size: must be a number, got true or false",
        ),
        ("store_uri: ''", "store_uri: is empty; name a folder, s3://… or gs://…"),
        ("store_uri: http://a:SECRET@x", "store_uri: a store must be a folder, s3://… or gs://…, got http://…"),
        (
            "store_uri: s3://b/x?endpoint_override=a:SECRET@x",
            "store_uri: endpoint_override must be host:port, without credentials",
        ),
        (
            "store_uri: /pools/a%20b",
            "store_uri: the path of a store cannot have '%20'; name another folder",
        ),
        (
            "store_uri: file:///pools/a%2520b",
            "store_uri: the path of a store cannot have '%20'; name another folder",
        ),
        (
            "source_prefixes: ['s3://AKIA:SECRET@bucket/x']",
            "source_prefixes: source prefix 's3://…@bucket/x' must name a bucket, or with file:// an absolute path,"
            " without credentials",
        ),
        (
            "source_prefixes: ['s3://b/x?secret_key=SECRET']",
            "source_prefixes: source prefix 's3://b/x?…' unknown parameter 'secret_key' of a s3:// store; allowed:"
            " endpoint_override, region, scheme",
        ),
    ],
)
def test_a_mistake_is_one_line_with_file_setting_and_remedy(tmp_path: Path, text: str, line: str) -> None:
    assert message_for(tmp_path, text) == f"settings.yaml: {line}"


@pytest.mark.parametrize("name", ["store_uri", "cache_dir", "keys_file", "preload", "chat_template"])
def test_a_home_folder_that_this_machine_lacks_is_refused(tmp_path: Path, name: str) -> None:
    value = "[~nobody-here/x]" if name == "preload" else "~nobody-here/x"
    line = f"{name}: ~nobody-here/x: this machine has no home folder for '~nobody-here'; write the whole path"
    assert message_for(tmp_path, f"{name}: {value}") == f"settings.yaml: {line}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "api_key: a-key-of-mine\nusage_days: 3\napi_key: ~\n",
            "settings.yaml:3:1: 'api_key' is given in line 1 already",
        ),
        (
            "worker: {device: cpu}\nworker:\n  num_threads: 1\n",
            "settings.yaml:2:1: 'worker' is given in line 1 already",
        ),
        ("worker: {device: cpu, device: cuda}\n", "settings.yaml:1:23: 'device' is given in line 1 already"),
    ],
)
def test_a_setting_that_is_given_twice_is_refused_with_both_lines(tmp_path: Path, text: str, line: str) -> None:
    assert message_for(tmp_path, text) == f"{line}: remove one of the two"


def test_a_file_in_another_encoding_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes("usage_days: 3 # Tage für Müller".encode("latin-1"))
    with pytest.raises(SettingsInvalid, match=r"settings\.yaml: is not text in UTF-8; save it as UTF-8$"):
        load_config(file)


def test_every_mistake_has_one_line_without_classes_or_websites(tmp_path: Path) -> None:
    message = message_for(tmp_path, "worker: {max_batch: 8, dtype: int4}\nretrieval: {k: 0}\n")
    assert message.count("\n") == 2
    assert not any(word in message for word in ("AppConfig", "http", "pydantic", "input_value"))
    with pytest.raises(SettingsInvalid, match=r"nofile\.yaml: no such file$"):
        load_config(tmp_path / "nofile.yaml")


@pytest.mark.parametrize("name", ["api_key", "keys_file"])
@pytest.mark.parametrize("value", ["", " ", " # the key", "\n"])
def test_an_empty_key_does_not_start_a_server_without_keys(tmp_path: Path, name: str, value: str) -> None:
    message = message_for(tmp_path, f"template: chat\n{name}:{value}\n")
    assert message == f"settings.yaml: {name} is empty; remove the line to run without a key"
    (tmp_path / "settings.yaml").write_text("api_key: null\nkeys_file: ~\n")
    assert not load_config(tmp_path / "settings.yaml").has_keys


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ('""', "must have at least 8 characters"),
        ("short-1", "must have at least 8 characters"),
        ("x" * 513, "must have at most 512 characters"),
        ("12345678", "must be a string"),
        ("${KEY}", "${…} is not replaced here; write the key itself, or use keys_file"),
        ("${THE_KEY_OF_THIS_SERVER}", "${…} is not replaced here; write the key itself, or use keys_file"),
        ("schlüssel-1", "must be of ASCII, without space around it, because clients send it in a header"),
        ("'         '", "must be of ASCII, without space around it, because clients send it in a header"),
        ("'**********'", "is the mask that --print-config prints; write the key itself"),
    ],
)
def test_a_bad_api_key_is_refused_without_printing_it(tmp_path: Path, value: str, line: str) -> None:
    assert message_for(tmp_path, f"api_key: {value}") == f"settings.yaml: api_key: {line}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker:\n  dtype: auto\n engine: native\n", "3:2: indentation does not match the lines above"),
        ("worker:\n  dtype: auto\n    engine: native\n", "3:11: indentation does not match the lines above"),
        ("template: chat\n  store_uri: x\n", "2:12: indentation does not match the lines above"),
        ("  template: chat\nstore_uri: x\n", "2:1: indentation does not match the lines above"),
        ("worker:\n\tdtype: auto\n", "2:1: there is a tab; use spaces"),
        ("template: a: b\n", "1:12: put quotes around a value that has a colon and a space"),
        ("template: 'chat\nstore_uri: x\n", "3:1: found unexpected end of stream"),
        ("template: chat\nstore_uri: 2026-02-30\n", "2:12: a value cannot be read (day is out of range for month)"),
        ("[\n" * 3000, " invalid YAML: it nests too deep"),
    ],
)
def test_yaml_that_cannot_be_read_is_placed_and_explained(tmp_path: Path, text: str, message: str) -> None:
    assert message_for(tmp_path, text).startswith(f"settings.yaml:{message}")
