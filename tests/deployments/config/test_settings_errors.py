from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.config.app import AppConfig
from deployments.config.loading import load_config
from deployments.config.settings_errors import RENAMED_SETTINGS, SettingsInvalid
from deployments.field_problems import field_names


def message_for(folder: Path, text: str) -> str:
    file = folder / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SettingsInvalid) as caught:
        load_config(file)
    return str(caught.value).replace(str(file), "settings.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("worker: {max_batch: 8}", "settings.yaml: worker.max_batch: unknown; did you mean 'max_batch_size'?"),
        ("basemodel: x", "settings.yaml: basemodel: unknown; did you mean 'base_model'?"),
        ("zzzz: 1", "settings.yaml: zzzz: unknown"),
        ("retrieval: {k: 17}", "settings.yaml: retrieval.k: must be at most 16, got 17"),
        ("retrieval: {min_score: 2}", "settings.yaml: retrieval.min_score: must be at most 1, got 2"),
        ("retrieval: {min_score: -1.5}", "settings.yaml: retrieval.min_score: must be at least -1, got -1.5"),
        ("worker: {max_wait_s: 0}", "settings.yaml: worker.max_wait_s: must be above 0, got 0"),
        ("template: jinja", "settings.yaml: template: must be 'auto', 'alpaca' or 'chat', got 'jinja'"),
        ("max_upload_bytes: many", "settings.yaml: max_upload_bytes: must be a whole number, got 'many'"),
        ("worker: 3", "settings.yaml: worker: must be an object with named fields, got 3"),
        ("source_prefixes: 3", "settings.yaml: source_prefixes: must be an object with named fields, got 3"),
        (
            "max_staging_bytes: 5",
            "settings.yaml: max_staging_bytes must be at least max_upload_bytes = 1090519040, got 5",
        ),
        ("device: cuda", "settings.yaml: device: unknown here; worker.device?"),
        ("worker: {base_model: x}", "settings.yaml: worker.base_model: unknown here; base_model?"),
        ("worker: {strategy: fusion}", "settings.yaml: worker.strategy: unknown here; retrieval.strategy?"),
        ("port: 9000", "settings.yaml: port: is an option of the command: serve --port 9000"),
        ("metrics_port: 9464", "settings.yaml: metrics_port: is an option of the command: serve --metrics-port 9464"),
        (
            "worker: {host_cache_bytes: 8GB}",
            "settings.yaml: worker.host_cache_bytes: must be a number of bytes: 8GB is 8000000000",
        ),
        (
            "disk_cache_bytes: 1.5 GiB",
            "settings.yaml: disk_cache_bytes: must be a number of bytes: 1.5 GiB is 1610612736",
        ),
        ("- a\n- b", "settings.yaml: must contain `name: value` lines, got a list"),
    ],
)
def test_a_mistake_is_one_line_with_file_setting_and_remedy(tmp_path: Path, text: str, line: str) -> None:
    assert message_for(tmp_path, text) == line


def test_every_mistake_has_one_line_without_classes_or_websites(tmp_path: Path) -> None:
    message = message_for(tmp_path, "worker: {max_batch: 8, dtype: int4}\nretrieval: {k: 0}\n")
    assert message.count("\n") == 2
    assert not any(word in message for word in ("AppConfig", "http", "pydantic", "input_value"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match=r"nofile\.yaml: no such file$"):
        load_config(tmp_path / "nofile.yaml")


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED_SETTINGS.items()))
def test_a_start_with_an_old_name_gives_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    group, _, name = old.rpartition(".")
    text = f"{group}: {{{name}: 1}}" if group else f"{name}: 1"
    assert message_for(tmp_path, text) == f"settings.yaml: {old}: renamed to {new}"
    group, _, name = new.rpartition(".")
    assert name in field_names(AppConfig, [*([group] if group else []), name])


def test_serve_run_gives_the_new_name_too() -> None:
    with pytest.raises(ValidationError, match="max_in_flight: renamed to max_concurrent_requests"):
        AppConfig.model_validate({"max_in_flight": 5})


@pytest.mark.parametrize("name", ["api_key", "keys_file"])
@pytest.mark.parametrize("value", ["", " ", " # the key", "\n"])
def test_an_empty_key_does_not_start_a_server_without_keys(tmp_path: Path, name: str, value: str) -> None:
    message = message_for(tmp_path, f"template: chat\n{name}:{value}\n")
    assert message == f"settings.yaml: {name} is empty; remove the line to run without a key"


def test_null_is_no_key(tmp_path: Path) -> None:
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
    ],
)
def test_yaml_that_cannot_be_read_is_placed_and_explained(tmp_path: Path, text: str, message: str) -> None:
    assert message_for(tmp_path, text) == f"settings.yaml:{message}"
