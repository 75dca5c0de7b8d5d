"""Make or refresh a virtual environment with the pinned versions: ``python3 .ci/make_venv.py .venv``.

Standard library only. Where Python has no `ensurepip` (Debian and Ubuntu package it apart, in
python3-venv), pip itself is fetched from PyPI and checked against the digest below.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP_URL = (
    "https://files.pythonhosted.org/packages/07/25/ee8c38ae72d66b844ce8eb9711ba905dba21ca1a8a0c960057c41cd23337/"
    "pip-26.3-py3-none-any.whl"
)
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def python_of(folder: Path) -> Path:
    """The interpreter of the virtual environment in ``folder``."""
    return folder / "bin" / "python"


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` holds a virtual environment whose interpreter runs and has pip."""
    python = python_of(folder)
    if not python.exists():
        return False
    return subprocess.run([python, "-m", "pip", "-V"], capture_output=True).returncode == 0


def fetch_pip(folder: Path) -> None:
    """Install pip into the environment from its own wheel, which can run unpacked or not."""
    name = PIP_URL.rsplit("/", 1)[1]
    advice = "apt install python3-venv (Debian, Ubuntu)"
    try:
        content = urllib.request.urlopen(PIP_URL, timeout=60).read()
    except OSError as error:
        sys.exit(f"This Python has no ensurepip and pip could not be fetched ({error}): {advice}")
    if hashlib.sha256(content).hexdigest() != PIP_SHA256:
        sys.exit(f"{PIP_URL}: the file is not the expected one (sha256 differs): {advice}")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = Path(temporary) / name
        wheel.write_bytes(content)
        command = [python_of(folder), f"{wheel}/pip", "install", "-q", "--no-index", str(wheel)]
        subprocess.run(command, check=True)


def create(folder: Path, has_ensurepip: bool) -> None:
    """Create the environment with pip in it; whatever was in ``folder`` goes."""
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=has_ensurepip).create(folder)
    if not has_ensurepip:
        fetch_pip(folder)


def install(folder: Path, log: Path) -> None:
    """Install the pinned build tools, then the project with everything it uses; pip's output goes to ``log``.

    Without build isolation nothing outside constraints.txt is installed, not even for building.
    """
    pip = [python_of(folder), "-m", "pip", "install", "--progress-bar", "off", "-c", "constraints.txt"]
    steps = [["setuptools", "wheel"], ["--no-build-isolation", "-e", ".[dev,plot]"]]
    with log.open("w") as out:
        for arguments in steps:
            if subprocess.run([*pip, *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT).returncode:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                sys.exit(f"{tail}\nThe installation failed; the whole log: {os.path.relpath(log)}")


def main(folder: Path) -> None:
    if sys.hexversion < 0x030A0000:
        sys.exit(f"Python {sys.version.split()[0]} is too old (3.10 is needed): make PYTHON=python3.11")
    start = time.monotonic()
    log = folder / "install.log"
    print(f"Installing into {folder} (minutes the first time; torch is large); log: {log}", flush=True)
    if not is_whole(folder):
        create(folder, importlib.util.find_spec("ensurepip") is not None)
    install(folder, log)
    print(f"Installed in {time.monotonic() - start:.0f} s.", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
