"""What the libraries are built with: sources, compilers, CUDA architectures, torch."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

# The oldest torch whose stable ABI has what the bindings use; a library built against any runs with all from here on.
TORCH_TARGET = (2, 10)


def csrc() -> Path:
    """The sources: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def cache_folder() -> Path:
    """$DATAFLEX_CACHE, else dataflex/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DATAFLEX_CACHE") or Path(base) / "dataflex").absolute()


def compiler() -> list[str]:
    """$CXX, which may hold flags or a launcher, else g++."""
    return shlex.split(os.environ.get("CXX") or "g++")


@functools.cache
def version_of(*command: str) -> str:
    """What ``command --version`` prints."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    return result.stdout.strip()


@functools.cache
def nvcc() -> str | None:
    """The compiler of the toolkit itself, also where the nvcc on PATH is a wrapper of it; None without one."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and os.access(f"{home}/bin/nvcc", os.X_OK):
            return f"{home}/bin/nvcc"
    found = shutil.which("nvcc")
    if found is None:
        return None
    dry = subprocess.run([found, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.MULTILINE)
    return str((Path(top[1].strip()) / "bin" / "nvcc").resolve()) if top else found


def cuda_architectures() -> list[str]:
    """Like "9.0" or "10.0+PTX": $DATAFLEX_CUDA_ARCHS, those of the devices here, or all that wheels carry."""
    asked = os.environ.get("DATAFLEX_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return asked.replace(" ", ";").replace(",", ";").split(";")
    import torch

    devices = range(torch.cuda.device_count())
    here = {"{}.{}".format(*torch.cuda.get_device_capability(device)) for device in devices}
    return sorted(here) or ["8.0", "9.0", "10.0+PTX"]


def architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def torch_folder() -> Path:
    """Where torch is installed; does not import it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def torch_too_old() -> str | None:
    """Why this torch cannot load the libraries, one line; None where it can."""
    import torch

    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    wanted = ".".join(map(str, TORCH_TARGET))
    return f"torch {torch.__version__} is older than {wanted}" if found < TORCH_TARGET else None
