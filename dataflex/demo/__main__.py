"""``python -m dataflex.demo``: writes demo_data/ and trains configs/demo/less.yaml into demo_run/."""

from __future__ import annotations

import sys
from pathlib import Path

from dataflex.cli import main as cli
from dataflex.config.paths import packaged_folder
from dataflex.demo.generate import generate


def main() -> int:
    """Generate the data, then train on two processes; returns the exit code of the run."""
    generate(Path("demo_data"))
    configs = packaged_folder()
    model = f"model_name_or_path={configs / 'models' / 'tiny_llama'}"
    return cli(["train", str(configs / "demo" / "less.yaml"), model, "--num_processes", "2"])


if __name__ == "__main__":
    sys.exit(main())
