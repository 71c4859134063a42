"""The image's Dockerfile: what it copies, installs and runs is there."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import PurePosixPath

import pytest

from gpu_worker.packaged_model import PACKAGED_MODEL
from tests.k8s.image import BAKED_MODEL, IMAGE, ROOT, bases, copied, instructions, is_ignored

DOCKERFILE = (IMAGE / "Dockerfile").read_text()
IGNORED = (IMAGE / "Dockerfile.dockerignore").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNS = [i.rest for i in instructions(DOCKERFILE) if i.keyword == "RUN"]


@pytest.mark.parametrize("source", copied(DOCKERFILE))
def test_what_is_copied_is_there_and_reaches_the_builder(source: str) -> None:
    assert (ROOT / source).exists()
    assert not is_ignored(source, IGNORED)


def test_nothing_else_reaches_the_builder() -> None:
    let_in = {line.removeprefix("!") for line in IGNORED.splitlines() if line.startswith("!")}
    assert let_in == set(copied(DOCKERFILE))
    for path in (
        "keys.yaml",
        ".venv/bin/python",
        "loraretriever-pool/x",
        "deployments/__pycache__/app.pyc",
        ".git/config",
    ):
        assert is_ignored(path, IGNORED)
    assert not is_ignored("deployments/console/index.html", IGNORED)


def test_all_that_the_package_is_made_of_is_copied() -> None:
    project = PROJECT["project"]
    needed = {
        *PROJECT["tool"]["setuptools"]["packages"],
        project["readme"],
        *project["license-files"],
        "pyproject.toml",
    }
    assert needed <= set(copied(DOCKERFILE))


def test_the_image_has_the_python_that_is_tested() -> None:
    images = [image for image in bases(DOCKERFILE) if image.startswith("python:")]
    assert images != []
    for image in images:
        assert image.startswith(f"python:{sys.version_info.major}.{sys.version_info.minor}.")


def test_the_base_image_is_an_exact_version_and_can_be_given_a_digest() -> None:
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", bases(DOCKERFILE)[-1])
    assert [i.rest for i in instructions(DOCKERFILE) if i.keyword == "FROM"][-1].startswith("${PYTHON_IMAGE}")


def test_every_package_is_pinned() -> None:
    installs = [run for run in RUNS if "pip install" in run]
    assert len(installs) == 2
    for run in installs:
        assert "-c constraints.txt" in run
    order = [i.rest for i in instructions(DOCKERFILE) if i.keyword in ("COPY", "RUN")]
    assert order.index("constraints.txt ./") < order.index(installs[0])


def test_the_extra_that_brings_the_models_is_installed() -> None:
    [extras] = re.findall(r"'\.\[([a-z,]+)\]'", DOCKERFILE)
    assert set(extras.split(",")) == {"local"} <= set(PROJECT["project"]["optional-dependencies"])


def test_the_model_is_baked_where_the_overlay_expects_it() -> None:
    [run] = [run for run in RUNS if run.startswith("python -c")]
    code = shlex.split(run)[2]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
    [folder] = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert PurePosixPath(folder) / PACKAGED_MODEL == BAKED_MODEL


def test_the_image_runs_as_nobody_special() -> None:
    [user] = [i.rest for i in instructions(DOCKERFILE) if i.keyword == "USER"]
    uid, _, gid = user.partition(":")
    assert f"groupadd --gid {gid} " in DOCKERFILE
    assert f"useradd --uid {uid} --gid {gid} " in DOCKERFILE
    assert int(uid) > 0


def test_the_command_is_one_the_package_installs() -> None:
    [command] = [ast.literal_eval(i.rest) for i in instructions(DOCKERFILE) if i.keyword == "CMD"]
    module, _, name = PROJECT["project"]["scripts"][command[0]].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_pattern_decides_for_what_is_below_it() -> None:
    patterns = "*\n!kept\n**/cache\n"
    ignored = {
        path: is_ignored(path, patterns) for path in ("other", "kept", "kept/a.py", "kept/a/cache/b", "other/kept")
    }
    assert ignored == {"other": True, "kept": False, "kept/a.py": False, "kept/a/cache/b": True, "other/kept": True}
