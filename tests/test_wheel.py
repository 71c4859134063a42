"""The wheel contains every file that the program reads, and runs with only its declared dependencies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGES = ("deployments", "gpu_worker", "lora_store", "retriever_svc")
DATA_SUFFIXES = {".cpp", ".css", ".h", ".html", ".js", ".jsonl", ".md", ".safetensors", ".svg", ".typed"}


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, cwd="/")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that no build folder of an older layout takes part."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "prebuilt"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, source)
    [path] = built.glob("*.whl")
    return path


def test_the_wheel_holds_every_source_and_data_file_and_the_licence(wheel: Path) -> None:
    in_repository = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in DATA_SUFFIXES | {".py"}
    }
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
        [licence] = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert in_wheel == in_repository
    assert {path.suffix for path in map(Path, in_wheel)} == DATA_SUFFIXES | {".py"}


def dependencies(name: str, extra: str = "") -> Iterator[tuple[str, str]]:
    """Yield (distribution, extra) for every direct requirement that applies to this interpreter."""
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield from ((requirement.name, chosen) for chosen in ("", *requirement.extras))


def closure(requirements: Iterator[tuple[str, str]]) -> set[str]:
    """Return the names of all distributions that these requirements install."""
    seen: set[tuple[str, str]] = set()
    to_visit = list(requirements)
    while to_visit:
        item = to_visit.pop()
        if item not in seen:
            seen.add(item)
            to_visit += dependencies(*item)
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (the wheel's own folder, a folder with links to its declared dependencies only)."""
    target, libraries = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("libraries")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    [metadata] = target.glob("*.dist-info/METADATA")
    declared = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata.read_text(), re.MULTILINE)
    requirements = [Requirement(line) for line in declared]
    direct = ((item.name, chosen) for item in requirements for chosen in ("", *item.extras))
    names = closure(direct)
    assert "fastapi" in names and "pytest" not in names
    for name in names:
        files = distribution(name).files or []
        for first in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            link = libraries / first
            if not link.exists():  # several distributions provide parts of one namespace
                link.symlink_to(Path(str(distribution(name).locate_file(first))))
    return target, libraries


def run_installed(installed: tuple[Path, Path], folder: Path, *arguments: object) -> str:
    """Run code in an interpreter without site-packages and return its output. Fail if it fails."""
    environment = {"PYTHONPATH": os.pathsep.join(map(str, installed)), "HOME": str(folder), "PATH": os.defpath}
    command = [sys.executable, "-S", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_command_knows_its_version_and_reads_adapters_and_settings(
    wheel: Path, installed: tuple[Path, Path], tmp_path: Path
) -> None:
    script, adapter = installed[0] / "bin" / "loraretriever", ROOT / "examples" / "starter_pool" / "date_format"

    def run(*arguments: object) -> str:
        return run_installed(installed, tmp_path, script, *arguments)

    assert wheel.name.split("-")[1] in run("--version").split()
    commands = {"ask", "batch", "keys", "publish", "route", "serve", "pool"}
    assert commands <= set(re.findall(r"[a-z-]+", run("--help")))
    assert "fit to publish" in run("publish", "--dry-run", "--config", "/dev/null", adapter)
    printed = run("serve", "--print-config", "--store", "own-pool")
    assert f"store_uri: {tmp_path / 'own-pool'}" in printed


def test_the_installed_application_imports_nothing_from_the_clone(installed: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys, deployments.app, deployments.cli, deployments.batch.offline\n"
        f"found = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in {PACKAGES} and m.__file__]\n"
        "print('\\n'.join(found))"
    )
    files = run_installed(installed, tmp_path, "-c", code).splitlines()
    assert len(files) > 100
    assert [file for file in files if not Path(file).is_relative_to(installed[0])] == []
