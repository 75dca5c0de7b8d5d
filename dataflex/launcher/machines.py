"""Several machines as torchrun's environment names them: the same command on each, with a rank of its own.

NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE are what LLaMA-Factory's multi-node launch sets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dataflex.utils.errors import UserError

PORT = 29500  # torchrun's and DeepSpeed's; a free one of this machine's would be unknown to the others
_LOCAL = ("include", "exclude", "num_nodes", "force_multi")


@dataclass(frozen=True)
class Machines:
    """count machines, of which this one is number ``rank`` (from 0), with ``processes`` each; rank 0 is at address."""

    count: int
    rank: int
    processes: int
    address: str
    port: int

    def flags(self, folder: Path) -> dict[str, str]:
        """The runner's flags; the hostfile that it wants is written into ``folder``. Nothing is reached by ssh."""
        hosts = folder / "hostfile"
        lines = [f"machine-{number} slots={self.processes}\n" for number in range(self.count)]
        hosts.write_text("".join(lines), encoding="utf-8")
        return {
            "hostfile": str(hosts),
            "no_ssh": "",
            "node_rank": str(self.rank),
            "master_addr": self.address,
            "master_port": str(self.port),
        }


def machines(flags: Mapping[str, str], num_processes: int | None, gpus: int) -> Machines | None:
    """What the environment says of several machines, or None for one. Flags of the command line win over it.

    UserError where a variable is missing or is no number: a machine that starts alone would train by itself.
    """
    count = _number("NNODES", os.environ.get("NNODES") or "1", 1)
    if count == 1:
        return None
    for name in _LOCAL:
        if name in flags:
            raise UserError(f"--{name}: cannot be used together with NNODES={count} in the environment")
    address = flags.get("master_addr") or os.environ.get("MASTER_ADDR")
    rank = _number(*_given("NODE_RANK", flags.get("node_rank")), 0, count - 1)
    if not address:
        raise UserError(f"MASTER_ADDR: NNODES={count} needs the address of the machine with NODE_RANK=0")
    asked = None if num_processes is None else str(num_processes)
    processes = _number(*_given("NPROC_PER_NODE", asked, "num_processes", str(max(gpus, 1))), 1, gpus or None)
    port = _number(*_given("MASTER_PORT", flags.get("master_port"), default=str(PORT)), 1, 65535)
    return Machines(count, rank, processes, address, port)


def _given(name: str, by_flag: str | None, flag: str = "", default: str | None = None) -> tuple[str, str | None]:
    """What a value is called where it was given, and the value: of the flag, else of the environment."""
    if by_flag is not None:
        return f"--{flag or name.lower()}", by_flag
    return name, os.environ.get(name) or default


def _number(name: str, value: str | None, low: int, high: int | None = None) -> int:
    expected = f"a whole number >= {low}" + (f" and <= {high}" if high is not None else "")
    if value is None or not value.strip().isdecimal() or int(value) < low or (high is not None and int(value) > high):
        where = "" if name.startswith("--") else " in the environment"
        raise UserError(f"{name}: expected {expected}{where}, got {value if value is not None else 'none'}")
    return int(value)
