"""The image, built by buildah on Debian's packages and the Python that runs the test: `make image-test`.

BUILD_OPTIONS has more options for `buildah build`, such as `--build-arg TORCH_INDEX=URL` or the volumes that pip needs.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from deployments.cli.client import free_port
from retriever_svc.encoder_files import DEFAULT_MODEL
from tests.e2e.live import command_of, eventually, is_ready
from tests.k8s.image import BAKED_MODEL, IMAGE, ROOT
from tests.soak import Scale

PYTHON, BUILT = "localhost/loraretriever-python", "localhost/loraretriever-cpu"
PROGRAMS = ("buildah", "debootstrap")
# What Python's own modules load.
LIBRARIES = "libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8t64,libsqlite3-0,libssl3t64,libuuid1,zlib1g"
START_S = 900.0


def test_the_image_is_built_and_answers_as_user_1000(scale: Scale, tmp_path: Path) -> None:
    if not scale.is_full:
        pytest.skip("a build takes a quarter of an hour: make image-test")
    if sys.version_info[:2] != (3, 11) or os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)):
        needed = f"this needs root, Python 3.11, and Debian's packages {' and '.join(PROGRAMS)}"
        (pytest.fail if os.environ.get("CI_REQUIRES_BUILDAH") else pytest.skip)(needed)
    if not buildah("images", "--quiet", "--filter", f"reference={PYTHON}"):
        build_python()
    file, ignored = IMAGE / "Dockerfile", IMAGE / "Dockerfile.dockerignore"
    more = shlex.split(os.environ.get("BUILD_OPTIONS", ""))
    base = ("--build-arg", f"PYTHON_IMAGE={PYTHON}", "--pull=never")
    buildah("build", "--layers", *limits(), *base, *more, "-f", file, "--ignorefile", ignored, "-t", BUILT, ROOT)

    settings = tmp_path / "settings.yaml"
    encoder = str(BAKED_MODEL.with_name(DEFAULT_MODEL))
    settings.write_text(yaml.safe_dump({"base_model": str(BAKED_MODEL), "retrieval": {"encoder": encoder}}))
    tmp_path.chmod(0o755)
    with container(BUILT) as name:
        assert buildah("run", name, "--", "id", "-u") == "1000"
        port = free_port("127.0.0.1")
        serve = ("loraretriever", "serve", "--config", "/settings.yaml", "--port", str(port))
        command = ["buildah", "run", "--volume", f"{settings}:/settings.yaml:ro", name, "--", *serve]
        server = subprocess.Popen(command, env=environment())
        try:
            url = f"http://127.0.0.1:{port}"
            eventually(lambda: server.poll() is not None or is_ready(url), within_s=START_S)
            body = {"model": "gemma-3-270m", "prompt": "The sea", "max_tokens": 4}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=START_S)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4, answer.text
            assert {process.uids().real for process in processes(server, "ray::ServeReplica")} == {1000}
        finally:
            for process in processes(server, "loraretriever serve"):
                process.terminate()
            server.wait(START_S)


def buildah(*arguments: object) -> str:
    """Run a command of buildah and return what it prints. Raises: CalledProcessError."""
    command = ["buildah", *map(str, arguments)]
    return subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def environment() -> dict[str, str]:
    return {"BUILDAH_ISOLATION": "chroot", **os.environ}


def limits() -> tuple[str, ...]:
    """Return the options that keep this process's limits. buildah asks for higher ones, which root may lack."""
    options = list[str]()
    for name, limit in (("nproc", resource.RLIMIT_NPROC), ("nofile", resource.RLIMIT_NOFILE)):
        _, most = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            options += ["--ulimit", f"{name}={most}:{most}"]
    return tuple(options)


@contextmanager
def container(image: str) -> Iterator[str]:
    name = buildah("from", "--pull=never", *limits(), image)
    try:
        yield name
    finally:
        buildah("rm", name)


def build_python() -> None:
    """Build an image like Docker's `python:3.11-slim-trixie`: the smallest Debian, with this Python in /usr/local."""
    with container("scratch") as name:
        root = Path(buildah("mount", name))
        packages = f"--include=ca-certificates,{LIBRARIES}"
        subprocess.run(["debootstrap", "--variant=minbase", packages, "trixie", root], check=True)
        installed, local = Path(sys.base_prefix), root / "usr" / "local"
        ignored = shutil.ignore_patterns("site-packages", "test", "__pycache__", "config-*")
        shutil.copytree(installed / "lib/python3.11", local / "lib/python3.11", symlinks=True, ignore=ignored)
        for library in (installed / "lib").glob("libpython3.11.so*"):
            shutil.copy2(library, local / "lib", follow_symlinks=False)
        shutil.copy2(installed / "bin/python3.11", local / "bin")
        (local / "bin/python").symlink_to("python3.11")
        finish = "apt-get clean && rm -rf /var/lib/apt/lists/* && ldconfig && python -m ensurepip --default-pip"
        buildah("run", name, "--", "sh", "-c", finish)
        buildah("commit", name, PYTHON)


def processes(server: subprocess.Popen[bytes], part: str) -> list[psutil.Process]:
    """Return the container's processes with these words in their command."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(server.pid).children(recursive=True)
        return [each for each in found if part in command_of(each) and "buildah" not in command_of(each)]
    return []
