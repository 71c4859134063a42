from __future__ import annotations

from pathlib import Path

from deployments.config.app import AppConfig
from deployments.config.loading import load_config


def test_changes_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("template: chat\nretrieval: {k: 5}\npreload: [/a]\n")
    config = load_config(file, preload=["/b"])
    assert (config.template, config.retrieval.k, config.preload) == ("chat", 5, (Path("/b"),))


def test_an_empty_file_and_no_file_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("# nothing\n")
    assert load_config(file) == load_config(None) == AppConfig()


def test_a_keys_file_of_the_file_sets_the_defaults_that_protect_tenants(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("keys_file: keys.yaml\n")
    assert load_config(tmp_path / "settings.yaml").public_requires_approval


def test_a_change_of_a_group_leaves_its_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("worker: {max_batch_size: 8}\nretrieval: {k: 2}\n")
    config = load_config(file, worker={"max_model_len": 512}, retrieval={"k": 4})
    assert (config.worker.max_batch_size, config.worker.max_model_len, config.retrieval.k) == (8, 512, 4)
