"""What is installed: the wheel's files, the pinned versions, and pip where Python comes without it."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import dataflex

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NAMES_OF_IMPORTS = {"pyyaml": "yaml", "typing-extensions": "typing_extensions"}


def copy_sources(target: Path) -> None:
    """The checkout without what builds leave behind, plus a csrc/ with a source and what must not travel."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for tree in ("dataflex", "configs"):
        shutil.copytree(ROOT / tree, target / tree, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("csrc/kernels/probe.cu", "csrc/probe.o", "csrc/__pycache__/probe.py"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("probe")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    copy_sources(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(target), str(source)], check=True, capture_output=True, text=True)
    (built,) = target.iterdir()
    return built


def test_the_wheel_holds_the_package_and_the_trees_beside_it(source: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(p.relative_to(source)) for p in (source / "dataflex").rglob("*.py")}
    trees = {f"dataflex/{p.relative_to(source)}" for p in (source / "configs").rglob("*") if p.is_file()}
    trees.add("dataflex/csrc/kernels/probe.cu")
    assert "dataflex/configs/models/tiny_llama/config.json" in trees
    assert {name for name in names if ".dist-info/" not in name} == package | trees


def test_the_wheel_is_pure_and_names_the_command_and_version(wheel: Path) -> None:
    assert wheel.name == f"dataflex-{dataflex.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as content:
        folder = f"dataflex-{dataflex.__version__}.dist-info"
        assert "dataflex-cli = dataflex.cli:main" in content.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in content.namelist()


def test_packaged_files_resolve_from_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from dataflex.config.paths import packaged\n"
        "names = ('ds_zero3.json', 'configs/components.yaml', 'examples/deepspeed/ds_z3_config.json')\n"
        "print(*(packaged(name) for name in names), sep='\\n')\n"
    )
    command = [sys.executable, "-I", "-c", program]
    found = subprocess.check_output(command, cwd=elsewhere, text=True).splitlines()
    configs = site / "dataflex" / "configs"
    expected = ("ds_zero3.json", "components.yaml", "ds_zero3.json")
    assert [Path(line) for line in found] == [configs / name for name in expected]
    assert json.loads((configs / "ds_zero3.json").read_text())["zero_optimization"]["stage"] == 3


def dependencies(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with the named extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in extras for text in optional[extra])]
    return [Requirement(text) for text in texts]


def pins() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt by normalised name."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(re.sub(r"[-_.]+", "-", requirement.name).lower(), []).append(requirement)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_constraints_pin_every_dependency_once_and_within_its_bounds(python: str) -> None:
    pinned = pins()
    for wanted in dependencies("plot", "dev"):
        lines = pinned[wanted.name.lower()]
        (line,) = [p for p in lines if p.marker is None or p.marker.evaluate({"python_version": python})]
        (specifier,) = line.specifier
        assert specifier.operator == "==" and wanted.specifier.contains(specifier.version), wanted


def test_every_dependency_is_imported_somewhere() -> None:
    imported: set[str] = set()
    for path in (ROOT / "dataflex").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    wanted = {NAMES_OF_IMPORTS.get(r.name, r.name) for r in dependencies("plot")}
    assert not wanted - imported


@pytest.fixture
def make_venv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / ".ci" / "make_venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STAND_IN = """\
import sys, sysconfig, zipfile
if "install" in sys.argv:
    zipfile.ZipFile(sys.argv[-1]).extractall(sysconfig.get_path("purelib"))
"""


def test_pip_reaches_an_environment_without_ensurepip(
    make_venv: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, folder = tmp_path / "pip-1-py3-none-any.whl", tmp_path / "environment"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("pip/__init__.py", "")
        content.writestr("pip/__main__.py", STAND_IN)
    monkeypatch.setattr(make_venv, "PIP_URL", wheel.as_uri())
    with pytest.raises(SystemExit, match="sha256 differs.*python3-venv"):
        make_venv.create(folder, has_ensurepip=False)
    assert not make_venv.is_whole(folder)
    monkeypatch.setattr(make_venv, "PIP_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    make_venv.create(folder, has_ensurepip=False)
    assert make_venv.is_whole(folder)


def test_pip_that_cannot_be_fetched_is_said_in_one_line(
    make_venv: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_venv, "PIP_URL", (tmp_path / "missing.whl").as_uri())
    with pytest.raises(SystemExit, match=r"^This Python has no ensurepip .*: apt install python3-venv.*$"):
        make_venv.create(tmp_path / "a", has_ensurepip=False)
