"""The same command on each of several machines, by torchrun's environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex.launcher import free_port
from dataflex.launcher.machines import Machines, machines
from dataflex.utils.errors import UserError
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE")
LAUNCH = """
import sys
from dataflex.launcher import Request, launch
sys.exit(launch("tests.launch_worker", ["ok", sys.argv[1]], Request(int(sys.argv[2]), {})))
"""


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def name(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for key, value in values.items():
        monkeypatch.setenv(key, value)


def test_two_launches_are_one_run_of_four_ranks(tmp_path: Path) -> None:
    base = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE")}
    base |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(tmp_path), "2"],
            env={**base, "NODE_RANK": rank, "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=PATIENCE_S)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0] and said == ["", ""]
    for rank in range(4):
        facts = (tmp_path / f"rank{rank}").read_text()
        assert f"'WORLD_SIZE': '4', 'LOCAL_RANK': '{rank % 2}'" in facts
        assert "'DS_ACCELERATOR': 'cpu'" in facts and re.search(r"'OMP_NUM_THREADS': '\d+'", facts)


def test_the_environment_names_one_machine_of_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name(monkeypatch, NNODES="3", NODE_RANK="2", MASTER_ADDR="10.0.0.1")
    found = machines({}, None, gpus=8)
    assert found == Machines(3, 2, 8, "10.0.0.1", 29500)
    assert found.flags(tmp_path) == {
        "hostfile": str(tmp_path / "hostfile"),
        "no_ssh": "",
        "node_rank": "2",
        "master_addr": "10.0.0.1",
        "master_port": "29500",
    }
    hosts = (tmp_path / "hostfile").read_text().splitlines()
    assert hosts == ["machine-0 slots=8", "machine-1 slots=8", "machine-2 slots=8"]
    name(monkeypatch, MASTER_PORT="4711", NPROC_PER_NODE="4")
    assert machines({}, None, gpus=8) == Machines(3, 2, 4, "10.0.0.1", 4711)
    flags = {"node_rank": "1", "master_addr": "b", "master_port": "5"}
    assert machines(flags, 2, gpus=8) == Machines(3, 1, 2, "b", 5)


@pytest.mark.parametrize("values", [{}, {"NNODES": "1"}, {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "a"}])
def test_one_machine_is_no_case_of_several(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    name(monkeypatch, **values)
    assert machines({}, 2, gpus=0) is None


@pytest.mark.parametrize(
    ("values", "flags", "line"),
    [
        ({"NNODES": "two"}, {}, "NNODES: expected a whole number >= 1 in the environment, got two"),
        ({"NNODES": "1:4"}, {}, "NNODES: expected a whole number >= 1 in the environment, got 1:4"),
        ({}, {}, "NODE_RANK: expected a whole number >= 0 and <= 1 in the environment, got none"),
        ({"NODE_RANK": "2"}, {}, "NODE_RANK: expected a whole number >= 0 and <= 1 in the environment, got 2"),
        ({"NODE_RANK": "0"}, {}, "MASTER_ADDR: NNODES=2 needs the address of the machine with NODE_RANK=0"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "a", "NPROC_PER_NODE": "9"}, {},
         "NPROC_PER_NODE: expected a whole number >= 1 and <= 8 in the environment, got 9"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, {},
         "MASTER_PORT: expected a whole number >= 1 and <= 65535 in the environment, got 0"),
        ({"MASTER_ADDR": "a"}, {"node_rank": "2"}, "--node_rank: expected a whole number >= 0 and <= 1, got 2"),
        ({"NODE_RANK": "0"}, {"include": "localhost:0"},
         "--include: cannot be used together with NNODES=2 in the environment"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], flags: dict[str, str], line: str
) -> None:
    name(monkeypatch, **{"NNODES": "2", **values})
    with pytest.raises(UserError) as caught:
        machines(flags, None, gpus=8)
    assert str(caught.value) == line


def test_more_processes_than_gpus_are_told_of_the_flag_that_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    name(monkeypatch, NNODES="2", NODE_RANK="0", MASTER_ADDR="a")
    with pytest.raises(UserError, match=r"^--num_processes: expected a whole number >= 1 and <= 8, got 9$"):
        machines({}, 9, gpus=8)
