"""The template that `auto` means, found in a model's files, is the one that its tokenizer renders with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gpu_worker.front.request.model_files import (
    chat_templates_of_files,
    read_chat_template,
    sampling_defaults_of_files,
    template_of_files,
)
from gpu_worker.front.request.prompts import resolve_template
from tests.tiny import byte_tokenizer

SOURCE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(("source", "template"), [(None, "alpaca"), (SOURCE, "chat")])
def test_a_saved_tokenizer_means_what_it_means_when_it_is_loaded(
    tmp_path: Path, source: str | None, template: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    tokenizer.save_pretrained(tmp_path)
    assert template_of_files(str(tmp_path)) == template
    assert resolve_template("auto", AutoTokenizer.from_pretrained(tmp_path)) == template


def test_the_templates_within_the_tokenizers_config_are_found(tmp_path: Path) -> None:
    named = [{"name": "default", "template": SOURCE}, {"name": "tool_use", "template": "{{ tools }}"}]
    for written, found in ((SOURCE, (SOURCE,)), (named, (SOURCE, "{{ tools }}"))):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": written}))
        assert template_of_files(str(tmp_path)) == "chat"
        assert chat_templates_of_files(str(tmp_path)) == found


@pytest.mark.parametrize("base_model", ["nobody/never-fetched", "/no/such/folder", "no-such-name"])
def test_a_model_that_is_not_here_or_broken_stays_auto(base_model: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert template_of_files(base_model) == template_of_files(str(tmp_path)) == "auto"


def test_an_operators_file_is_read_whole_and_a_broken_one_is_refused_by_its_line(tmp_path: Path) -> None:
    good, broken = tmp_path / "good.jinja", tmp_path / "broken.jinja"
    good.write_text(SOURCE)
    broken.write_text("{{ 1 }}\n{% for %}")
    assert read_chat_template(good) == SOURCE
    with pytest.raises(ValueError, match=r"broken\.jinja: line 2: "):
        read_chat_template(broken)


def test_the_models_own_sampling_is_read_and_what_is_not_supported_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sampling_defaults_of_files(str(tmp_path)) == {}
    declared = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": None,
        "min_p": 3,
        "repetition_penalty": "x",
        "eos_token_id": 1,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(declared))
    assert sampling_defaults_of_files(str(tmp_path)) == {"temperature": 0.7, "top_k": 20}
    assert "min_p must be between 0 and 1, got 3" in caplog.text
    for broken in ("[]", "{", "3"):
        (tmp_path / "generation_config.json").write_text(broken)
        assert sampling_defaults_of_files(str(tmp_path)) == {}
