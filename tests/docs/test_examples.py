"""The examples of the pages are well formed, and name only commands, options, targets and settings that exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from deployments.api.names import NamePolicy
from deployments.cli.pool_file import PoolFile
from deployments.config.app import AppConfig
from deployments.config.loading import load_config
from deployments.config.parts import AdmissionSettings, RetrievalSettings
from deployments.publishing.contract_files import read_contract
from docs.generate.settings import ENGINES
from lora_store.contract_files import CONTRACT_FILE
from retriever_svc.competence import NEAR
from retriever_svc.preferences import NEAR_OUTCOME
from tests.conftest import ON_A_CLUSTER
from tests.deployments.scripted import COMMAND
from tests.docs.pages import ROOT, CodeBlock, blocks_of, pages

BLOCKS = [block for page in pages() for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language in ("sh", "console")]


def of_language(*languages: str) -> list[CodeBlock]:
    """Return the blocks of these languages below `docs` and in README.md."""
    return [b for b in BLOCKS if b.language in languages and (b.page.startswith("docs/") or b.page == "README.md")]


def name_of(block: CodeBlock) -> str:
    return f"{block.page}:{block.text[:30].splitlines()[0]}"


def test_shell_python_and_json_are_well_formed() -> None:
    shell, python = of_language("sh", "console"), of_language("python")
    assert len(SHELL) > 50 and len(python) > 8 and len(of_language("yaml")) > 10
    for block in shell:
        run = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
        assert run.returncode == 0, f"{name_of(block)}: {run.stderr}"
    for block in python:
        ast.parse(block.text, name_of(block))
    for block in of_language("json"):
        json.loads(block.text)


@pytest.mark.parametrize("block", of_language("yaml"), ids=name_of)
def test_settings_and_policies_are_valid(block: CodeBlock) -> None:
    settings = yaml.safe_load(block.text)
    if block.page == "docs/how-to/model-names.md":
        NamePolicy.model_validate(settings)
        return
    if "of LiteLLM's proxy" in block.text:
        assert {row["model_name"] for row in settings["model_list"]} == {"auto"}
        return
    if block.text.startswith(f"# {CONTRACT_FILE}"):
        read_contract(CONTRACT_FILE, block.text.encode())
        return
    if "metric_relabel_configs" in settings:  # tests/test_monitoring.py
        return
    if block.text.startswith("# pool.yaml"):
        PoolFile.model_validate(settings)
        return
    for deployment in settings.get("deployments", []):
        DeploymentSchema.model_validate(deployment)
    if "deployments" in settings:
        return
    if "applications" in settings:  # Serve's own file, with our settings as the arguments
        [application] = ServeDeploySchema.model_validate(settings).applications
        settings = application.args
    if settings.get("worker", {}).get("device") == "cuda":
        settings.setdefault("worker_scaling", {"num_gpus": 1})
    AppConfig.model_validate(settings)


def test_settings_that_pages_name_exist() -> None:
    spans = {"queue", "load", "prefill", "decode"}  # in traces of a Worker
    known = {
        "admission": AdmissionSettings.model_fields.keys(),
        "retrieval": RetrievalSettings.model_fields.keys(),
        "worker": {field.name for engine in ENGINES for field in fields(engine)} | spans,
    }
    texts = [page.read_text(encoding="utf-8") for page in pages() if page.name != "CHANGELOG.md"]
    named = {found for text in texts for found in re.findall(r"`(admission|retrieval|worker)\.(\w+)", text)}
    assert len(named) > 25
    assert [f"{group}.{name}" for group, name in named if name not in known[group]] == []


def test_loraretriever_is_called_with_commands_and_options_that_exist() -> None:
    calls = list(command_lines("loraretriever"))
    assert len(calls) > 50
    wrong = [f"{page}: {' '.join(words)}" for page, words in calls if not exists(words)]
    assert wrong == []


def test_make_is_called_with_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = [(page, word) for page, words in command_lines("make") for word in words[1:] if word.islower()]
    assert len(called) > 8
    assert [(page, word) for page, word in called if word not in targets] == []


def test_make_runs_the_tests_of_every_folder_that_starts_a_server() -> None:
    [listed] = re.findall(r"^E2E_TESTS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    marked = {path.parent for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name in ON_A_CLUSTER}
    assert {ROOT / folder for folder in listed.split()} == marked != set()


def test_the_files_of_failed_tests_outlive_the_parts_of_make_test_that_end_later() -> None:
    [recipe] = re.findall(r"^test:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    num_parts = recipe.count("-m pytest")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert settings["tmp_path_retention_count"] >= num_parts > 1


def test_the_documents_name_the_cosines_from_which_prompts_and_adapters_are_near() -> None:
    folder, prompts = ROOT / "docs", f"a cosine of {NEAR_OUTCOME} or more"
    routing = (folder / "explanation/how-routing-works.md").read_text()
    assert prompts in (folder / "how-to/learn-from-traffic.md").read_text() and prompts in routing
    assert f"a cosine of at least {NEAR} to it" in routing


def test_modules_that_are_run_exist() -> None:
    modules = {words[2] for _, words in command_lines("python") if words[1] == "-m"} - {"pip"}
    assert len(modules) >= 2
    assert [m for m in modules if not any(Path(ROOT, *m.split(".")).with_suffix(s).exists() for s in ("", ".py"))] == []


def command_lines(program: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (page, words) of each call of a program in a shell block, without environment variables before it."""
    for block in SHELL:
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|", line.partition(" #")[0]):
                words = shlex.split(part, comments=True) if program in part else []
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words and words[0].rpartition("/")[2] == program:
                    yield block.page, words


def exists(words: list[str]) -> bool:
    """Return whether the command and all its options exist."""
    command = COMMAND
    position = 1
    while position < len(words) and (children := getattr(command, "commands", None)):
        word = words[position]
        if word.startswith("--"):
            if word.partition("=")[0] not in {*options(command), "--help"}:
                return False
            position += 1 if "=" in word or word == "--help" else 2
            continue
        if word not in children:
            return False
        command, position = children[word], position + 1
    given = {word.partition("=")[0] for word in words[position:] if word.startswith("--")}
    return given <= {*options(command), "--help"}


def options(command: Any) -> set[str]:
    """Return the names of a command's options."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def serve_line(*arguments: str) -> list[str]:
    """Return the words of the command that `make serve` would run."""
    command = ["make", "--dry-run", *arguments]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = printed.replace("\\\n", "").splitlines()
    [words] = [shlex.split(line)[1:] for line in lines if "loraretriever serve" in line]
    assert exists(["loraretriever", *words])
    return words


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_make_serve_answers_without_chance_where_a_request_sets_nothing(engine: str) -> None:
    words = serve_line("serve", f"ENGINE={engine}")
    config = load_config(ROOT / words[words.index("--config") + 1])
    assert config.served_model.sampling_defaults == {"temperature": 0, "max_repeats": 2}
    assert config.worker.engine == engine


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_make_serve_has_a_variant_with_two_base_models_and_the_starter_pool(engine: str) -> None:
    [call] = {shlex.join(words) for _, words in command_lines("make") if "several_bases" in " ".join(words)}
    words = serve_line(*shlex.split(call)[1:], f"ENGINE={engine}")
    given = COMMAND.commands["serve"].make_context("serve", words[1:]).params
    config = load_config(ROOT / given["config"], preload=given["preload"])
    assert [model.name for model in config.served_models] == ["gemma-3-270m", "qwen"]
    assert config.served_models.first.sampling_defaults == {"temperature": 0, "max_repeats": 2}
    assert [path.name for path in config.preload] == ["starter_pool"]


@pytest.mark.parametrize(("engine", "changes"), [("native", {}), ("vllm", {"engine": "vllm", "step_timeout_s": 300})])
def test_make_serve_with_a_base_model_begins_with_an_empty_pool(engine: str, changes: dict[str, object]) -> None:
    words = serve_line("serve", f"ENGINE={engine}", "BASE=/models/my-base/", "ARGS=--port 8001")
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert (given.pop("--base-model"), given.pop("--store")) == ("/models/my-base/", "my-base-pool")
    settings = yaml.safe_load((ROOT / given.pop("--config")).read_text()) if changes else {}
    assert (settings, given) == ({"worker": changes} if changes else {}, {"--port": "8001"})
