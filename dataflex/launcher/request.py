"""The DeepSpeed runner's command line and environment for what the user asked of the launcher."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataflex.launcher.machines import Machines
from dataflex.utils.errors import UserError
from dataflex.worker import DEVICES

_PORTS = (20_000, 32_000)
_DEFAULT_HOSTFILE = Path("/job/hostfile")


@dataclass(frozen=True)
class Request:
    """What the user asked of the launcher: a process count, and flags for the DeepSpeed runner.

    ``flags`` are runner flags without the leading dashes; a switch has the value "".
    """

    num_processes: int | None
    flags: Mapping[str, str]

    @property
    def hostfile(self) -> Path | None:
        """The hostfile in use, if any; DeepSpeed reads /job/hostfile where none is named."""
        named = self.flags.get("hostfile")
        if named is not None:
            return Path(named)
        return _DEFAULT_HOSTFILE if _DEFAULT_HOSTFILE.is_file() else None

    @property
    def uses_ssh(self) -> bool:
        """Whether workers run on other machines, whose marks we cannot read."""
        several = self.hostfile is not None or "force_multi" in self.flags
        return several and "no_ssh" not in self.flags


def gpu_count() -> int:
    """CUDA (or ROCm) devices that torch can use here; torch is asked in a process of its own."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    devices = (*Path("/dev").glob("nvidia[0-9]*"), Path("/dev/kfd"), Path("/dev/dxg"))
    if not any(device.exists() for device in devices):
        return 0
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    env = {**os.environ, "PYTHONPATH": python_path()}
    answer = subprocess.run(ask, capture_output=True, text=True, check=False, cwd=os.sep, env=env)
    return int(answer.stdout.split()[-1]) if answer.returncode == 0 else 0


def free_port() -> int:
    """A TCP port that nothing on this machine listens on, and that no connection is likely to take before we do.

    The kernel hands out ephemeral ports (32768 and up by default) to whoever connects or listens without naming one,
    as gloo does; between our look and the first worker's, seconds later, one of those may be gone.
    """
    numbers = random.SystemRandom()
    for _ in range(100):
        port = numbers.randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(f"no free TCP port from {_PORTS[0]} to {_PORTS[1] - 1} on this machine; name one: --master_port")


def command(module: str, args: Sequence[str], request: Request, gpus: int) -> tuple[list[str], dict[str, str]]:
    """Return the runner's command line and environment. Raises UserError for a request that cannot be met."""
    flags, env = dict(request.flags), dict(os.environ)
    _check_flags(request, gpus)
    if request.hostfile is None:
        flags |= _local_flags(request, gpus, env)
    elif request.num_processes is not None:
        flags["num_gpus"] = str(request.num_processes)
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "critical"]
    for name in ("hostfile", "enable_each_rank_log"):
        if name in flags:
            flags[name] = os.path.abspath(flags[name])
    for name, value in flags.items():
        words.append(f"--{name}={value}" if value else f"--{name}")
    return [*words, "--module", module, *args], env


def _check_flags(request: Request, gpus: int) -> None:
    flags = request.flags
    if request.num_processes is not None and request.num_processes < 1:
        raise UserError(f"--num_processes: expected a whole number >= 1, got {request.num_processes}")
    if "include" in flags and "exclude" in flags:
        raise UserError("--include and --exclude cannot be used together")
    if ("include" in flags or "exclude" in flags) and request.num_processes is not None:
        raise UserError("--num_processes cannot be used together with --include or --exclude")
    if "hostfile" in flags and not Path(flags["hostfile"]).is_file():
        raise UserError(f"--hostfile: '{flags['hostfile']}' does not exist")
    if request.hostfile is None:
        if "num_nodes" in flags and flags["num_nodes"] != "1":
            raise UserError(f"--num_nodes: {flags['num_nodes']} needs a --hostfile that names the machines")
        if gpus == 0 and ("include" in flags or "exclude" in flags):
            raise UserError("--include and --exclude choose GPUs, and there is none here; use --num_processes")
        if ("include" in flags or "exclude" in flags) and not _numbered(os.environ.get("CUDA_VISIBLE_DEVICES")):
            raise UserError("--include and --exclude choose GPUs by number, CUDA_VISIBLE_DEVICES by name; drop one")
        for name in ("include", "exclude"):
            _check_devices(name, flags.get(name, "localhost"), gpus)
        if gpus and request.num_processes is not None and request.num_processes > gpus:
            raise UserError(f"--num_processes: {request.num_processes} processes need as many GPUs, there are {gpus}")


def _check_devices(name: str, wanted: str, gpus: int) -> None:
    """Check a device list for this machine; the numbers are physical where CUDA_VISIBLE_DEVICES is set."""
    match = re.fullmatch(r"localhost(?::(\d+(?:,\d+)*))?", wanted)
    if match is None:
        raise UserError(f"--{name}: expected localhost:0,1,... without a --hostfile, got '{wanted}'")
    numbers = [int(number) for number in (match.group(1) or "0").split(",")]
    if max(numbers) >= gpus > 0 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        raise UserError(f"--{name}: there is no GPU {max(numbers)}, they are 0 to {gpus - 1}")


def _local_flags(request: Request, gpus: int, env: dict[str, str]) -> dict[str, str]:
    """Flags for workers on this machine only: their number or devices, and a port of their own."""
    flags: dict[str, str] = {}
    visible = env.pop("CUDA_VISIBLE_DEVICES", None)
    count = request.num_processes or max(gpus, 1)
    if gpus == 0:
        env.setdefault("DS_ACCELERATOR", "cpu")
    if "include" not in request.flags and "exclude" not in request.flags:
        named = _devices(visible)[:count] if gpus and visible else []
        if named and _numbered(visible):
            flags["include"] = "localhost:" + ",".join(named)
        elif named:  # DeepSpeed passes numbers only: the workers put the names back
            flags["num_gpus"], env[DEVICES] = str(len(named)), ",".join(named)
        else:
            flags["num_gpus"] = str(count)
        env.setdefault("OMP_NUM_THREADS", _threads(count))
    if "master_port" not in request.flags:
        flags["master_port"] = str(free_port())
    return flags


def one_of_several(request: Request, several: Machines, gpus: int, folder: Path) -> tuple[Request, dict[str, str]]:
    """The request of one machine among those of torchrun's environment, and what its workers' environment has more.

    folder: the launch folder, for the hostfile. DeepSpeed numbers a machine's GPUs from 0; where CUDA_VISIBLE_DEVICES
    chooses some, the workers put it back.
    """
    env: dict[str, str] = {}
    if gpus == 0:
        env["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus and visible:
        env[DEVICES] = ",".join(_devices(visible)[: several.processes])
    env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or _threads(several.processes)
    return Request(None, {**request.flags, **several.flags(folder)}), env


def _devices(visible: str) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES: all numbers, or all UUIDs of GPUs or of MIG instances."""
    entries = [part.strip() for part in visible.split(",")]
    if not all(e.isdigit() for e in entries) and not all(e.startswith(("GPU-", "MIG-")) for e in entries):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: expected numbers such as 0,1 or UUIDs (GPU-..., MIG-...), got '{visible}'"
        )
    return entries


def _numbered(visible: str | None) -> bool:
    return not visible or _devices(visible)[0].isdigit()


def _threads(processes: int) -> str:
    """OMP_NUM_THREADS of one of this machine's processes."""
    return str(max(1, _cores() // processes))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python_path() -> str:
    """PYTHONPATH for a process that starts elsewhere; with the working folder where the package itself lies there."""
    named = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    root = Path(__file__).resolve().parents[2]
    return os.pathsep.join([*named, str(root)] if root == Path.cwd() else named)
