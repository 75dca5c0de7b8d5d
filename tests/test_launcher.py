# ruff: noqa: E501 - whole lines of text are easier to search for
"""The launcher: its command, and real launches of two workers (no torch in them) that end in every way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataflex import worker
from dataflex.launcher import Request, command, free_port, gpu_count, processes
from dataflex.launcher.outcome import outcome
from dataflex.launcher.processes import Ended
from dataflex.utils import launch_folder
from dataflex.utils.errors import UserError
from dataflex.utils.launch_folder import LAUNCH_DIR
from dataflex.worker import DEVICES, run_worker
from tests.processes import PATIENCE_S, all_end, parent_of, runs

ROOT = Path(__file__).resolve().parent.parent
REQUEST = "dataflex.launcher.request"
LAUNCH = """
import sys
from dataflex.launcher import Request, launch
sys.exit(launch("tests.launch_worker", sys.argv[1:], Request(2, {})))
"""
ORPHAN = """
import subprocess, sys
child = "import time; from dataflex.worker import end_with_parent; end_with_parent(); print('up', flush=True); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", child], stdout=sys.stdout).pid, flush=True)
sys.stdin.read()
"""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells of a parent's death")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "DS_ACCELERATOR",
        "OMP_NUM_THREADS",
        "RANK",
        "WORLD_SIZE",
        LAUNCH_DIR,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(f"{REQUEST}._DEFAULT_HOSTFILE", Path("/no/hostfile"))


def start(what: str, folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "TMPDIR": str(folder)}
    words = [sys.executable, "-c", LAUNCH, what, str(folder)]
    out: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=env, cwd=ROOT, preexec_fn=heed_ctrl_c, **out)


def heed_ctrl_c() -> None:
    """A shell starts its background jobs with SIGINT ignored, and the launcher leaves it so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(path: Path, process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.05)
    return path.read_text()


def pids(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    return [int(wait_for(folder / f"rank{rank}", process).split()[0]) for rank in (0, 1)]


@pytest.fixture
def killed_at_the_end() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_bad_input_seen_by_one_worker_is_printed_once_and_ends_all(tmp_path: Path) -> None:
    process = start("refuse", tmp_path)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert out.splitlines() == [
        "dataflex: error: pool.json:3: instruction is missing",
        "dataflex: error: pool.json:9: output is missing",
    ]
    assert not any(runs(pid) for pid in pids(tmp_path, process))


def test_the_workers_exit_code_comes_out(tmp_path: Path) -> None:
    process = start("exit3", tmp_path)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert "ended with exit code 3" in out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_a_signal_ends_every_rank_within_seconds(
    tmp_path: Path, number: signal.Signals, killed_at_the_end: list[subprocess.Popen[str]]
) -> None:
    process = start("sleep", tmp_path)
    killed_at_the_end.append(process)
    workers = pids(tmp_path, process)
    assert all(runs(pid) for pid in workers)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == f"dataflex: error: stopped by {number.name}\n"
    assert not any(runs(pid) for pid in workers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_every_rank_is_sent_the_signal_that_the_command_got(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (0, 1):
        (tmp_path / f"pid.{rank}").write_text(f"{rank + 1000} 2")
    before, sent, received = signal.getsignal(number), list[tuple[int, int]](), list[int]()
    kill = os.kill
    with processes._forwarding(4711, processes.Workers(tmp_path), received):
        monkeypatch.setattr(processes.os, "kill", lambda *args: sent.append(args))
        kill(os.getpid(), number)
    assert sorted(sent) == [(1000, number), (1001, number)] and received == [number]
    assert signal.getsignal(number) is before
    assert outcome(Ended(1, received), tmp_path, ssh=False) == 128 + number


def test_what_follows_a_signal_at_once_is_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `timeout` sends it: to the command, and to the command's group."""
    asked: list[int] = []
    killed: list[tuple[int, int]] = []
    received: list[int] = []
    monkeypatch.setattr(processes, "_ask", lambda group, workers, number: asked.append(number))
    monkeypatch.setattr(processes.os, "killpg", lambda *args: killed.append(args))
    with processes._forwarding(4711, processes.Workers(tmp_path), received):
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert (asked, received, killed) == ([signal.SIGUSR1], [signal.SIGUSR1], [])
        monkeypatch.setattr(processes, "SAME_SIGNAL_S", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (asked, received) == ([signal.SIGUSR1], [signal.SIGUSR1, signal.SIGTERM])
    assert killed == [(4711, signal.SIGKILL)]


@LINUX
def test_a_killed_launcher_is_not_a_complete_run(
    tmp_path: Path, killed_at_the_end: list[subprocess.Popen[str]]
) -> None:
    process = start("sleep", tmp_path)
    killed_at_the_end.append(process)
    workers = pids(tmp_path, process)
    parent = int((tmp_path / "rank0").read_text().split()[1])
    os.kill(parent, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == "dataflex: error: the launcher ended before the training was complete (was it killed?)\n"
    assert not any(runs(pid) for pid in workers)


@LINUX
@pytest.mark.parametrize("who", ["command", "runner"])
def test_all_processes_end_with_the_command_and_with_the_runner(
    tmp_path: Path, who: str, killed_at_the_end: list[subprocess.Popen[str]]
) -> None:
    process = start("sleep", tmp_path)
    killed_at_the_end.append(process)
    workers = pids(tmp_path, process)
    (launch,) = {parent_of(pid) for pid in workers}
    everyone = [*workers, launch, parent_of(launch)]
    assert parent_of(parent_of(launch)) == process.pid and all(runs(pid) for pid in everyone)
    os.kill(process.pid if who == "command" else parent_of(launch), signal.SIGKILL)
    assert all_end(everyone, 60), "a process outlived its launcher"
    assert process.wait(10) == (-9 if who == "command" else 137)
    assert not list(tmp_path.glob("dataflex-*"))


@LINUX
def test_a_worker_ends_when_its_parent_is_killed() -> None:
    words = [sys.executable, "-c", ORPHAN]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        child = int((said - {"up"}).pop())
        assert runs(child)
        parent.kill()
        deadline = time.monotonic() + 60
        while runs(child):
            assert time.monotonic() < deadline, "the worker outlived its parent"
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("code", "received", "marks", "ssh", "expected", "line"),
    [
        (0, [], {"done.0": "2", "done.1": "2"}, False, 0, ""),
        (0, [], {"done.0": "2"}, False, 1, "the launcher ended before the training was complete (was it killed?)"),
        (0, [], {}, True, 0, ""),
        (0, [15], {"done.0": "1"}, False, 0, ""),
        (1, [], {"error.10": "late", "error.2": "early"}, False, 2, "early"),
        (-9, [], {}, False, 137, "the launcher was killed by SIGKILL"),
        (247, [], {"done.0": "1"}, False, 247, "a worker was killed by SIGKILL (out of memory?)"),
        (1, [15], {}, False, 143, "stopped by SIGTERM"),
        (75, [15], {}, False, 75, ""),
        (-15, [15], {"stopped.1": ""}, False, 75, ""),
        (75, [], {"stopped.0": ""}, False, 75, ""),
        (75, [15, 2], {"stopped.0": ""}, False, 130, "stopped by SIGINT"),
        (-9, [], {"hung.3": "rank 1 hung", "hung.0": "rank 1 is silent"}, False, 69, "rank 1 is silent"),
        (247, [], {"lost.2": "rank 1 is gone"}, False, 247, "a worker was killed by SIGKILL (out of memory?): rank 1 is "
         "gone"),
        (7, [], {"lost.2": "rank 1 is gone", "lost.0": "rank 1 has ended"}, False, 7, "rank 1 has ended"),
        (1, [], {"hung.0": "rank 1 is gone", "error.1": "a.json:1: bad"}, False, 2, "a.json:1: bad"),
        (1, [], {"failed.1": "", "stopped.0": ""}, False, 1, "a worker, or the launcher, ended with exit code 1; its "
         "messages are above"),
    ],
)  # fmt: skip
def test_outcome(
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
    code: int, received: list[int], marks: dict[str, str], ssh: bool, expected: int, line: str,
) -> None:  # fmt: skip
    for name, text in marks.items():
        (tmp_path / name).write_text(text)
    assert outcome(Ended(code, received), tmp_path, ssh) == expected
    assert capfd.readouterr().err == (f"dataflex: error: {line}\n" if line else "")


def flags_of(words: list[str]) -> list[str]:
    return [word for word in words[words.index("critical") + 1 : words.index("--module")]]


def test_command_on_cpus_counts_processes_and_shares_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{REQUEST}._cores", lambda: 8)
    words, env = command("dataflex.cli", ["train", "a.yaml"], Request(3, {}), gpus=0)
    assert words[:7] == [
        sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "critical", "--num_gpus=3",
    ]  # fmt: skip
    assert words[-4:] == ["--module", "dataflex.cli", "train", "a.yaml"]
    assert re.fullmatch(r"--master_port=\d+", words[7])
    assert (env["DS_ACCELERATOR"], env["OMP_NUM_THREADS"]) == ("cpu", "2")
    words, env = command("m", [], Request(None, {"master_port": "5000"}), gpus=0)
    assert flags_of(words) == ["--master_port=5000", "--num_gpus=1"]


def test_command_on_gpus_takes_all_or_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    words, env = command("m", [], Request(None, {}), gpus=8)
    assert flags_of(words)[0] == "--num_gpus=8"
    assert env["OMP_NUM_THREADS"] == "5" and "DS_ACCELERATOR" not in env
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    words, env = command("m", [], Request(2, {}), gpus=3)
    assert flags_of(words)[0] == "--include=localhost:2,3"
    assert flags_of(command("m", [], Request(3, {}), gpus=3)[0])[0] == "--include=localhost:2,3,5", "all of them"
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_command_with_a_hostfile_leaves_the_count_to_it(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=4\nb slots=4\n")
    flags = {"hostfile": str(hosts), "num_nodes": "1", "no_ssh": "", "node_rank": "0"}
    words, _ = command("m", [], Request(None, flags), gpus=4)
    assert flags_of(words) == [f"--hostfile={hosts}", "--num_nodes=1", "--no_ssh", "--node_rank=0"]
    words, _ = command("m", [], Request(2, flags), gpus=4)
    assert flags_of(words)[-1] == "--num_gpus=2"


@pytest.mark.parametrize(
    ("processes", "flags", "gpus", "line"),
    [
        (0, {}, 0, "--num_processes: expected a whole number >= 1, got 0"),
        (9, {}, 8, "--num_processes: 9 processes need as many GPUs, there are 8"),
        (None, {"include": "localhost:1", "exclude": "localhost:2"}, 4, "--include and --exclude cannot be used together"),
        (2, {"include": "localhost:1"}, 4, "--num_processes cannot be used together with --include or --exclude"),
        (None, {"include": "localhost:4"}, 4, "--include: there is no GPU 4, they are 0 to 3"),
        (None, {"exclude": "worker-1"}, 4, "--exclude: expected localhost:0,1,... without a --hostfile, got 'worker-1'"),
        (None, {"include": "localhost:0"}, 0, "--include and --exclude choose GPUs, and there is none here; use "
         "--num_processes"),
        (None, {"hostfile": "/no/hosts"}, 4, "--hostfile: '/no/hosts' does not exist"),
        (None, {"num_nodes": "2"}, 4, "--num_nodes: 2 needs a --hostfile that names the machines"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met(processes: int | None, flags: dict[str, str], gpus: int, line: str) -> None:
    with pytest.raises(UserError) as caught:
        command("m", [], Request(processes, flags), gpus)
    assert str(caught.value) == line


def test_gpus_named_by_uuid_are_passed_on_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a1f, GPU-77b0,GPU-01")
    words, env = command("m", [], Request(2, {}), gpus=3)
    assert flags_of(words)[0] == "--num_gpus=2"
    assert env[DEVICES] == "GPU-5a1f,GPU-77b0" and "CUDA_VISIBLE_DEVICES" not in env
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1e5c/3/0")
    words, env = command("m", [], Request(None, {}), gpus=1)
    assert (flags_of(words)[0], env[DEVICES]) == ("--num_gpus=1", "MIG-1e5c/3/0")
    monkeypatch.setenv(DEVICES, "GPU-5a1f,GPU-77b0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as DeepSpeed numbers them
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    seen: list[str | None] = []
    assert run_worker(lambda: seen.extend(map(os.environ.get, ("CUDA_VISIBLE_DEVICES", DEVICES))) or 0) == 0
    assert seen == ["GPU-5a1f,GPU-77b0", None]


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_gpus_by_name_are_not_chosen_by_number(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a1f,GPU-77b0")
    with pytest.raises(UserError, match="--include and --exclude choose GPUs by number, CUDA_VISIBLE_DEVICES by name"):
        command("m", [], Request(None, {flag: "localhost:0"}), gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    words, _ = command("m", [], Request(None, {flag: "localhost:3"}), gpus=2)
    assert f"--{flag}=localhost:3" in flags_of(words)


@pytest.mark.parametrize("visible", ["GPU-5a1f,1", "gpu0", "0,,1"])
def test_device_names_that_cuda_does_not_know(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=f"expected numbers such as 0,1 or UUIDs .*, got '{visible}'"):
        command("m", [], Request(None, {}), gpus=1)


LIBRARIES = ("random", "numpy", "datasets", "deepspeed", "torch", "types")


def test_two_ranks_complete_in_silence_and_the_working_folder_hides_no_library(tmp_path: Path) -> None:
    """The workers start, take the library's modules, and find the folder and what lies in it all the same."""
    work = tmp_path / "work"
    work.mkdir()
    for name in LIBRARIES:
        (work / f"{name}.py").write_text(f"raise ImportError('{name} of the working folder')\n")
    (work / "beside.py").write_text("HERE = 'found'\n")
    script = tmp_path / "start.py"  # as dataflex-cli, which lies elsewhere too
    script.write_text(LAUNCH)
    env = {**os.environ, "PYTHONPATH": os.path.relpath(ROOT, work), "DS_ACCELERATOR": "cpu", "TMPDIR": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, str(script), "imports", str(tmp_path)], cwd=work, env=env, capture_output=True, text=True
    )
    assert (out.returncode, out.stdout + out.stderr) == (0, "")
    for rank in (0, 1):
        facts = (tmp_path / f"rank{rank}").read_text()
        assert f"'WORLD_SIZE': '2', 'LOCAL_RANK': '{rank}'" in facts
        assert re.search(r"'OMP_NUM_THREADS': '\d+', 'DS_ACCELERATOR': 'cpu'", facts)
        folder, beside, *libraries = (tmp_path / f"imported{rank}").read_text().splitlines()
        assert (folder, beside) == (str(work), "found")
        assert len(libraries) == 2 and not [file for file in libraries if Path(file).is_relative_to(work)]
    assert not list(tmp_path.glob("dataflex-*"))


def test_python_m_takes_libraries_before_the_working_folder(tmp_path: Path) -> None:
    """As `deepspeed --module dataflex.cli` starts a worker."""
    (tmp_path / "pydantic.py").write_text("raise ImportError('mine')\n")
    words = [sys.executable, "-m", "dataflex.cli", "--version"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "")


def test_gpus_are_counted_whatever_the_working_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('mine')\n")
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "lib"
    (other / "torch").mkdir(parents=True)
    (other / "torch/__init__.py").write_text("class cuda:\n    device_count = lambda: 3\n")
    monkeypatch.setenv("PYTHONPATH", "lib")
    monkeypatch.setattr(f"{REQUEST}.Path.exists", lambda path: True)
    assert gpu_count() == 3


def test_gpus_hidden_by_the_environment_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_count() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert gpu_count() == 0


def test_a_free_port_is_outside_the_range_that_linux_hands_out() -> None:
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 1  # two runs that start together get two ports
    assert min(ports) >= 20_000 and max(ports) < 32_768


def test_a_port_that_is_taken_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", free_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(f"{REQUEST}._PORTS", (port, port + 1))
        with pytest.raises(UserError, match=f"no free TCP port from {port} .* name one: --master_port"):
            free_port()


def refuse() -> int:
    raise UserError("x.json:1: bad")


def test_worker_started_by_hand_prints_its_error_itself(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    monkeypatch.setattr(worker.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_worker(refuse) == 2
        assert capfd.readouterr().err == "dataflex: error: x.json:1: bad\n"
    assert waited == [0, 3]


def test_a_launch_folder_that_was_cleaned_up_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals reach the workers that were there, and what these leave at their end is found."""
    folder = tmp_path / "dataflex-launch"
    folder.mkdir()
    monkeypatch.setenv(LAUNCH_DIR, str(folder))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        launch_folder.mark("pid", f"{1000 + int(rank)} 2")
    workers = processes.Workers(folder)
    assert sorted(workers.pids()) == [1000, 1001]
    shutil.rmtree(folder)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(processes.os, "kill", lambda *args: asked.append(args))
    processes._ask(4711, workers, signal.SIGUSR1)
    assert sorted(asked) == [(1000, signal.SIGUSR1), (1001, signal.SIGUSR1)]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        launch_folder.mark("done", "2")
    assert outcome(Ended(0, []), folder, ssh=False) == 0
    monkeypatch.setenv(LAUNCH_DIR, str(tmp_path / "on another machine"))
    assert launch_folder.launch_folder() is None


def test_worker_marks_only_a_good_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    monkeypatch.setenv(LAUNCH_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    before = signal.getsignal(signal.SIGINT)
    try:
        assert run_worker(lambda: 1) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["pid.3"]
        assert (tmp_path / "pid.3").read_text() == f"{os.getpid()} 4"
        assert run_worker(lambda: 75) == 75
        assert (tmp_path / "stopped.3").exists() and not (tmp_path / "done.3").exists()
        assert run_worker(lambda: 0) == 0
        assert (tmp_path / "done.3").read_text() == "4"
    finally:
        signal.signal(signal.SIGINT, before)
