"""Write requirements.txt: every package of the image but torch, with its exact version and the hashes of its files.

    python k8s/image/lock.py

Versions are those of constraints.txt. pip reports which wheels it would take from the index it is set up to use, once
for x86-64 and once for aarch64, and nothing is installed. Run it after a change of pyproject.toml or constraints.txt.

torch is left out: its CPU and CUDA builds are different files under one version, and the Dockerfile takes them from an
index that the builder names.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = Path(__file__).with_name("requirements.txt")
LEFT_OUT = "torch"
_PYTHON = "3.11"
_NEWEST_GLIBC = 41  # Debian trixie's is 2.41
_HEADER = """\
# Every package of the image but torch, by version and sha256. Written by `python k8s/image/lock.py`: do not edit.
# The hashes are those of the wheels for CPython 3.11 on x86-64 and aarch64 Linux.
"""

Wheels = Mapping[str, tuple[str, str]]  # version and sha256, by the package's name


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["local"]]
    wanted += project["build-system"]["requires"]
    here = {name: wheel for name, wheel in _resolve(wanted, []).items() if name != LEFT_OUT}
    there = _resolve([f"{name}=={version}" for name, (version, _) in here.items()], _aarch64())
    TARGET.write_text(locked([here, there]))


def locked(platforms: Iterable[Wheels]) -> str:
    """Return the file's text: one package a line, sorted, with the hashes of all platforms."""
    hashes: dict[str, set[str]] = {}
    for wheels in platforms:
        for name, (version, sha256) in wheels.items():
            hashes.setdefault(f"{name}=={version}", set()).add(sha256)
    lines = [" ".join([pin, *(f"--hash=sha256:{h}" for h in sorted(found))]) for pin, found in sorted(hashes.items())]
    return _HEADER + "\n".join(lines) + "\n"


def wheels_of(report: str) -> Wheels:
    """Return the wheels of pip's installation report. Raises: KeyError where one has no sha256."""
    found = {}
    for item in json.loads(report)["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
        found[name] = (item["metadata"]["version"], item["download_info"]["archive_info"]["hashes"]["sha256"])
    return found


def _aarch64() -> list[str]:
    """Return pip's options for wheels of aarch64 instead of this machine's."""
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(17, _NEWEST_GLIBC + 1)]
    platforms = [f"--platform={tag}" for tag in [*tags, "manylinux2014_aarch64"]]
    return ["--no-deps", "--python-version", _PYTHON, "--implementation", "cp", *platforms]


def _resolve(wanted: list[str], options: list[str]) -> Wheels:
    """Return the wheels that pip would install. Raises: CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary=:all:", "--target", folder, "--report", str(report)]
        command += ["-c", str(ROOT / "constraints.txt"), *options, *wanted]
        subprocess.run(command, check=True)
        return wheels_of(report.read_text())


if __name__ == "__main__":
    main()
