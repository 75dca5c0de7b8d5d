"""Instructions of the kernels' loops in the machine code of nvcc: `python -m tests.native.sass [SOURCE...]`.

Prints for each kernel of the sources (all of csrc/kernels without any) the instructions of the whole and of each loop:
in all, of the special function unit, tensor products, loads and calls of slow paths. nvdisasm is looked for in $PATH
and $NVDISASM (on PyPI: nvidia-cuda-nvdisasm); $SASS_ARCH is the architecture, 90 without it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dataflex.ops.native.toolchain import csrc, nvcc

KINDS = {"special": "MUFU", "products": "HMMA", "global loads": "LDG|LDGSTS", "calls": "CALL"}
HEADER = ",".join(["kernel", "from", "to", "instructions", *KINDS])
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L_x_\d+)\)")


def listing(source: Path, folder: Path) -> str:
    """The machine code of a source as nvdisasm prints it."""
    cubin, architecture = folder / f"{source.stem}.cubin", os.environ.get("SASS_ARCH", "90")
    command = [str(nvcc()), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", f"-I{csrc() / 'include'}"]
    subprocess.run([*command, str(source), "-o", str(cubin)], check=True)
    return subprocess.check_output([os.environ.get("NVDISASM", "nvdisasm"), "-c", str(cubin)], text=True)


def loops(instructions: list[str], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """First and last instruction of each loop, one for each place that is jumped back to."""
    ends: dict[int, int] = {}
    for at, text in enumerate(instructions):
        to = _BRANCH.search(text)
        if to and labels.get(to[1], len(instructions)) <= at:
            ends[labels[to[1]]] = at
    yield from sorted(ends.items())


def rows(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        name = subprocess.check_output(["c++filt", "-p", block.split(",")[0]], text=True).strip()
        name = name.replace("(anonymous namespace)::", "").replace("dataflex::", "")
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in block.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            if instruction := _INSTRUCTION.match(line):
                instructions.append(instruction[1])
        for first, last in [(0, len(instructions) - 1), *loops(instructions, labels)]:
            part = instructions[first : last + 1]
            counts = [sum(bool(re.search(rf"\b(?:{kind})\b", each)) for each in part) for kind in KINDS.values()]
            yield ",".join(map(str, [f'"{name}"', first, last, len(part), *counts]))


if __name__ == "__main__":
    wanted = [Path(name) for name in sys.argv[1:]] or sorted((csrc() / "kernels").glob("*.cu"))
    print(HEADER)
    with tempfile.TemporaryDirectory() as place:
        for each in wanted:
            print(*rows(listing(each, Path(place))), sep="\n", flush=True)
