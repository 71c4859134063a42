from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deployments.config.app import AppConfig
from deployments.config.loading import load_config, require_base_model, require_keys_file
from deployments.config.settings_errors import SettingsInvalid
from gpu_worker.config import NativeSettings


def test_changes_override_the_file_and_leave_other_settings_of_a_group(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("template: chat\nworker: {max_batch_size: 8}\nretrieval: {k: 2}\npreload: [/a]\n")
    config = load_config(file, preload=["/b"], worker={"max_model_len": 512}, retrieval={"k": 4})
    assert (config.template, config.retrieval.k, config.preload) == ("chat", 4, (Path("/b"),))
    assert (config.worker.max_batch_size, config.worker.max_model_len) == (8, 512)
    file.write_text("learning: off\n")  # false, in YAML
    assert load_config(file).learning == "off"
    file.write_text("# nothing\n")
    assert load_config(file) == load_config(None) == AppConfig()


@pytest.mark.parametrize(("strategy", "options"), [("selection", {}), ("top_p_mixture", {"kept_weight": 0.8})])
def test_options_of_the_files_strategy_stay_with_that_strategy(
    strategy: str, options: dict[str, float], tmp_path: Path
) -> None:
    file, change = tmp_path / "settings.yaml", {"retrieval": {"strategy": strategy}}
    file.write_text("retrieval: {strategy: top_p_mixture, strategy_options: {kept_weight: 0.8}}\n")
    for changed in (load_config(file, **change).retrieval, load_config(file).retrieval.changed(change)[0]):
        assert (changed.strategy, changed.strategy_options) == (strategy, options)


@pytest.mark.parametrize("changes", [{"base_model": "org/other"}, {"worker": {"device": "cuda"}}])
def test_another_base_model_or_device_is_not_rounded_as_the_files_own(changes: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("worker: {quantization: int8, max_batch_size: 8}\n")
    worker = load_config(file, **changes).worker
    assert isinstance(worker, NativeSettings)
    assert (worker.quantization, worker.max_batch_size) == ("none", 8)
    kept = load_config(file, worker={"device": "cpu"}).worker
    assert isinstance(kept, NativeSettings) and kept.quantization == "int8"


@pytest.mark.parametrize("base_model", ["gemma-3-270m", "org/model", "gpt2"])
def test_a_base_model_of_a_hub_need_not_be_on_this_machine(base_model: str) -> None:
    require_base_model(base_model, "vllm")


@pytest.mark.parametrize("base_model", ["/nosuch/model", "./nosuch", "../a/b", "models/of/mine"])
def test_a_path_of_a_base_model_must_be_a_folder(base_model: str) -> None:
    with pytest.raises(SettingsInvalid, match=rf"^base_model: {re.escape(base_model)}: no such folder or GGUF file$"):
        require_base_model(base_model, "native")


@pytest.mark.parametrize("name", ["config.json", "params.json", "model.gguf"])
def test_the_folder_of_a_base_model_must_hold_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match=r"has neither config\.json, nor params\.json, nor a GGUF file"):
        require_base_model(str(tmp_path), "native")
    (tmp_path / name).touch()
    require_base_model(str(tmp_path), "native")


def test_a_base_model_may_be_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(SettingsInvalid, match="no such folder or GGUF file"):
        require_base_model(str(file), "native")
    file.touch()
    require_base_model(str(file), "native")


def test_vllm_refuses_a_gguf_file_and_a_folder_with_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.gguf").touch()
    monkeypatch.chdir(tmp_path / "models")
    for base in ("x.gguf", str(tmp_path / "models"), "../models"):
        with pytest.raises(SettingsInvalid, match=rf"^base_model: {re.escape(base)} is a GGUF file .*engine to native"):
            require_base_model(base, "vllm")
    (tmp_path / "models" / "config.json").touch()
    require_base_model("../models", "vllm")


def test_a_keys_file_must_exist(tmp_path: Path) -> None:
    require_keys_file(None)
    config = AppConfig(keys_file=tmp_path / "keys.yaml")
    with pytest.raises(SettingsInvalid, match=r"keys\.yaml: no such file"):
        require_keys_file(config.keys_file)
    (tmp_path / "keys.yaml").touch()
    require_keys_file(config.keys_file)
