"""`python benchmarks/gpu/build.py cuda|cpu`: build and load the native ops of the device; an error says why not."""

from __future__ import annotations

import sys

from dataflex.ops.native import _ext


def main(device: str) -> None:
    group = "cuda" if device == "cuda" else "cpu"
    print(f"{group}: {_ext.describe(group)}")
    if not isinstance(_ext.load(group), _ext.Loaded):
        raise SystemExit(f"the native {group} ops are not there")


if __name__ == "__main__":
    main(sys.argv[1])
