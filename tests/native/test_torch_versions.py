"""The native libraries with the oldest torch that the project asks for and with others: built, loaded, right numbers.

Other torches are other environments: $DATAFLEX_TORCHES names the interpreters of some, separated by colons, whose
other packages are the project's. Each builds into a folder of its own, which is kept for the session.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex.ops.native.toolchain import TORCH_TARGET
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
INTERPRETERS = list(filter(None, os.environ.get("DATAFLEX_TORCHES", "").split(":")))
# What torch defines by macro is not held back by TORCH_TARGET_VERSION: these are in the headers of the oldest one.
MACROS = {"STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK"}
PROGRAM = """
import sys, torch
from dataflex.ops.native import _ext
from tests.native.emulation import emulated
from tests.native.test_project import compare, fixed_cases
from dataflex.ops import per_sample_loss
from tests.ops.loss_cases import Case, by_hand, within_budget
from tests.ops.project_cases import project
assert isinstance(_ext.load("cpu"), _ext.Loaded), _ext.load("cpu")
logits, labels = torch.randn(5, 70).requires_grad_(), torch.tensor([1, 2, -100, 4, 69])
case = Case(logits, labels, torch.tensor([0, 2, 5]), {})
exact, plain = by_hand(case), by_hand(case, torch.float32)
some = fixed_cases()[::9]

def check():
    loss = per_sample_loss(case.logits, case.labels, case.cu_seqlens).loss
    (gradient,) = torch.autograd.grad(loss.sum(), case.logits)
    within_budget(loss, exact[0], plain[0])
    within_budget(gradient, exact[1], plain[1])
    for each in some:
        compare(each, project(each))

check()
if "emulated" in sys.argv:
    some = some[:2]
    with emulated():
        check()
print(torch.__version__)
"""


def floor() -> str:
    (found,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return str(found)


def test_the_floor_is_the_oldest_torch_that_the_libraries_load_with() -> None:
    assert floor() == ".".join(map(str, TORCH_TARGET))


def test_the_bindings_use_no_macro_that_the_oldest_torch_lacks() -> None:
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "bindings").iterdir())
    used = set(re.findall(r"\b(?:STABLE_|STD_)?TORCH_[A-Z_]+\b", text))
    assert used and used <= MACROS, used - MACROS


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETERS, reason="DATAFLEX_TORCHES names no interpreter with another torch")
@pytest.mark.parametrize("python", INTERPRETERS or [sys.executable])
def test_the_libraries_build_and_load_with_another_torch(python: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    kept = os.environ.get("DATAFLEX_TORCHES_CACHE") or tmp_path_factory.getbasetemp() / "torches"
    env = os.environ | {"PYTHONPATH": str(ROOT), "DATAFLEX_CACHE": f"{kept}/{python.replace('/', '-')}"}
    command = [python, "-c", PROGRAM, "emulated"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+\.\d+", done.stdout), done.stdout
