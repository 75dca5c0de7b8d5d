"""Packaging: all facts are in pyproject.toml; here the trees beside the package join the wheel.

``configs/`` and ``csrc/`` lie at the top of a checkout and at ``dataflex/configs`` and ``dataflex/csrc`` in a wheel.
Nothing is compiled and torch is not imported, but for ``DATAFLEX_BUILD=1 pip install --no-build-isolation .``: the
wheel then carries the native libraries in ``dataflex/_lib`` and fits this platform only. ``DATAFLEX_BUILD=cpu,cuda``
names them; 1 is those that torch here can use. An editable install builds on first use all the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TREES = ("configs", "csrc")
SKIPPED_SUFFIXES = {".pyc", ".o", ".so"}


def tree_files(tree: str) -> list[Path]:
    """Files of a top-level tree that travel, relative to the repository root; none if it does not exist."""
    paths = [path.relative_to(ROOT) for path in sorted((ROOT / tree).rglob("*")) if path.is_file()]
    hidden = [path for path in paths if any(part.startswith((".", "__pycache__")) for part in path.parts)]
    return [path for path in paths if path.suffix not in SKIPPED_SUFFIXES and path not in hidden]


def wanted() -> list[str]:
    """The groups of libraries that DATAFLEX_BUILD asks for."""
    asked = os.environ.get("DATAFLEX_BUILD", "0")
    if asked in ("0", ""):
        return []
    sys.path.insert(0, str(ROOT))
    try:
        import torch

        from dataflex.ops.native.builder import CudaBuilder
    except ImportError as e:
        raise SystemExit(f"DATAFLEX_BUILD: torch is needed, with pip install --no-build-isolation ({e})") from None
    if asked == "1":
        return ["cpu", "host", *(["cuda"] if torch.version.cuda and CudaBuilder().is_compatible() else [])]
    groups = asked.split(",")
    if set(groups) - {"cpu", "cuda"}:
        raise SystemExit(f"DATAFLEX_BUILD: expected 1, cpu, cuda or cpu,cuda, got '{asked}'")
    return [*groups, "host"]


class NativeDistribution(Distribution):
    """Not pure where libraries are in it: the wheel is tagged for this Python and platform."""

    def has_ext_modules(self) -> bool:
        return os.environ.get("DATAFLEX_BUILD", "0") not in ("0", "")


class BuildWithTrees(build_py):
    """`build_py`, then the trees and libraries are copied into the package; an editable install reads them in place."""

    libraries: list[Path] = []

    def _targets(self) -> dict[Path, Path]:
        if self.editable_mode:
            return {}
        package = Path(self.build_lib) / "dataflex"
        return {file: package / file for tree in TREES for file in tree_files(tree)}

    def run(self) -> None:
        super().run()
        for source, target in self._targets().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(ROOT / source), str(target))
        if not self.editable_mode:
            self.libraries = self._build(wanted(), Path(self.build_lib) / "dataflex" / "_lib")

    def _build(self, groups: list[str], folder: Path) -> list[Path]:
        files: list[Path] = []
        for group in groups:
            from dataflex.ops.native.builder import BUILDERS, BuildError
            from dataflex.ops.native.trust import hash_file

            builder, stamp = BUILDERS[group](), folder / f"{group}.sources"
            try:
                built = builder.build()
            except BuildError as e:
                raise SystemExit(f"DATAFLEX_BUILD: {builder.file_name()} could not be built: {e}") from None
            self.mkpath(str(folder))
            for file in (built, hash_file(built)):
                self.copy_file(str(file), str(folder / file.name))
                files.append(folder / file.name)
            stamp.write_text(builder.source_digest())
            files.append(stamp)
        return files

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *map(str, [*self._targets().values(), *self.libraries])]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(str(file) for tree in TREES for file in tree_files(tree))]


setup(cmdclass={"build_py": BuildWithTrees}, distclass=NativeDistribution)
