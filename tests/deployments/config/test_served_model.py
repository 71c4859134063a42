"""The base model as clients and publishers meet it, made from the settings."""

from __future__ import annotations

from pathlib import Path

from deployments.config.app import AppConfig
from gpu_worker.config import PACKAGED_ALIASES
from lora_store.peft_files import template_digest


def test_the_limits_of_a_request_come_from_the_settings() -> None:
    worker, sampling = {"max_model_len": 77}, {"top_k": 5}
    config = AppConfig(
        base_model="far/away", worker=worker, max_new_tokens=300, max_request_s=9, sampling_defaults=sampling
    )
    model = config.served_model
    assert (model.name, model.base, model.template) == ("away", "far/away", "auto")
    assert (model.max_model_len, model.max_new_tokens, model.max_request_s) == (77, 300, 9)
    assert model.sampling_defaults == {"top_k": 5}
    assert config.served_models.bases.accepted == {"away": model.accepted_names}


def test_the_path_of_the_served_folder_and_its_last_part_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "link").symlink_to("tiny")
    config = AppConfig(base_model=f"{tmp_path}/link/", base_model_name="mine")
    paths = {str(tmp_path / "link"), f"{tmp_path}/link/", str(tmp_path.resolve() / "tiny")}
    assert config.served_model.accepted_names == paths | {"link", "mine"}
    assert str(tmp_path / "gemma-3-270m") in AppConfig(cache_dir=tmp_path).served_model.accepted_names


def test_names_of_the_packaged_model_on_the_hub_are_accepted_with_that_model_only() -> None:
    assert AppConfig().served_model.accepted_names > {"gemma-3-270m", *PACKAGED_ALIASES}
    other = AppConfig(base_model="google/gemma-3-1b").served_model.accepted_names
    assert other == {"google/gemma-3-1b", "gemma-3-1b"} and other.isdisjoint(PACKAGED_ALIASES)


def test_templates_of_the_operator_and_of_the_base_model_are_known(tmp_path: Path) -> None:
    own, given = "{{ messages[0] }}", tmp_path / "own.jinja"
    (tmp_path / "chat_template.jinja").write_text(own)
    given.write_text("{{ messages }}")
    config = AppConfig(base_model=str(tmp_path), chat_template=given)
    assert config.served_model.known_templates == {
        template_digest(own): "chat",
        template_digest("{{ messages }}"): "chat",
    }
    assert AppConfig().served_model.known_templates == {}
    assert AppConfig(base_model="nobody/not-on-this-machine", chat_template=given).served_model.known_templates is None
