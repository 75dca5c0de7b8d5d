"""`dataflex-cli export` and `eval`: a merged model is the trained one, and loads as a user would; losses by domain."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dataflex.cli import main
from dataflex.config import load_config
from dataflex.driver.exporting import export_model
from dataflex.utils.errors import UserError
from tests.distributed import run_ranks
from tests.driver.test_export import CHATML, make_sources
from tests.driver.workspace import settings

IDS = torch.tensor([[5, 9, 70, 33, 200, 90]])


def make_run(workspace: Path, folder: Path) -> Path:
    """A finished LoRA run in ``folder``: template and new tokens, and the embeddings with them; its config.yaml."""
    make_sources(folder)
    keys = settings(
        workspace,
        model_name_or_path=str(folder / "bare"),
        template="qwen",
        new_special_tokens=CHATML,
        output_dir=str(folder / "run"),
        max_steps=2,
        learning_rate=0.05,
        eval_dataset=["target", "a"],
        eval_strategy="steps",
        eval_steps=2,
        deepspeed=None,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(keys))
    run_ranks("tests.driver.test_merge:train_and_evaluate", 1, folder=str(folder))
    return folder / "run/config.yaml"


def train_and_evaluate(folder: str) -> None:
    from dataflex.driver.evaluating import evaluate
    from dataflex.driver.training import train

    train(load_config(Path(folder) / "run.yaml", quiet=True))
    evaluate(load_config(Path(folder) / "run/config.yaml", quiet=True, command="eval"))
    (Path(folder) / "run/eval_results.json").rename(Path(folder) / "exported.json")
    for engine in (["deepspeed=ds_zero3.json"], ["deepspeed=ds_zero2.json", "bf16=true"]):
        untrained = [f"output_dir={folder}/none", "eval_dataset=target", *engine]
        evaluate(load_config(Path(folder) / "run.yaml", untrained, quiet=True, command="eval"))
    step2 = [f"output_dir={folder}/none", f"resume_from_checkpoint={folder}/run/checkpoint-2"]
    evaluate(load_config(Path(folder) / "run.yaml", step2, quiet=True, command="eval"))


@pytest.fixture(scope="module")
def run(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(workspace, tmp_path_factory.mktemp("merge"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_a_merged_run_is_the_trained_model_in_files_with_all_that_its_export_has(run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged, adapter = tmp_path / "merged", run.parent
    assert main(["export", str(run), f"export_dir={merged}", "export_size=1e-5"]) == 0
    base = AutoModelForCausalLM.from_pretrained(run.parent.parent / "bare", dtype=torch.float32)
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        right = logits(PeftModel.from_pretrained(base, adapter))
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(model) - right).abs().max() < 1e-4
    assert len(list(merged.glob("model-*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (merged / name).read_bytes() == (adapter / name).read_bytes(), name
    tokenizer = AutoTokenizer.from_pretrained(merged)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**asked, max_new_tokens=2).shape[1] > asked["input_ids"].shape[1]
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    card = (merged / "README.md").read_text()
    assert f"with the LoRA adapter `{adapter}` merged into it; weights in float32." in card


def test_an_adapter_from_elsewhere_brings_its_tokenizer(run: Path, tmp_path: Path) -> None:
    """Its folder has no config of ours that would name the new tokens."""
    from transformers import AutoTokenizer

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir()
    for file in (*run.parent.glob("adapter_*"), *run.parent.glob("tokenizer*"), run.parent / "chat_template.jinja"):
        shutil.copy(file, adapter)
    keys = {"model_name_or_path": str(run.parent.parent / "bare"), "adapter_name_or_path": str(adapter)}
    keys |= {"finetuning_type": "lora", "export_dir": str(merged)}
    (tmp_path / "export.yaml").write_text(yaml.safe_dump(keys))
    assert main(["export", str(tmp_path / "export.yaml")]) == 0
    found, own = (AutoTokenizer.from_pretrained(folder) for folder in (merged, adapter))
    assert found.get_vocab() == own.get_vocab() and set(CHATML) < set(own.get_vocab())
    assert found.chat_template == own.chat_template


def test_half_precision_rounds_once(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    cfg = [f"export_dir={tmp_path / 'half'}", "infer_dtype=bfloat16"]
    export_model(load_config(run, cfg, quiet=True, command="export"))
    export_model(load_config(run, [f"export_dir={tmp_path / 'whole'}"], quiet=True, command="export"))
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert half.keys() == whole.keys()
    assert all(torch.equal(half[name], value.to(torch.bfloat16)) for name, value in whole.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_model_and_a_named_template_need_no_run(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    keys = {
        "model_name_or_path": str(run.parent.parent / "chatml"),
        "template": "qwen",
        "finetuning_type": "lora",
        "export_dir": str(tmp_path / "out"),
        "export_size": 5,
        "export_device": "cpu",
        "export_legacy_format": False,
    }
    export_model(load_config(keys, quiet=True, command="export"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model_name_or_path", "export_dir: .* is also model_name_or_path, which would be written over"),
        ("adapter_name_or_path", "export_dir: .* is also adapter_name_or_path, which would be written over"),
    ],
)
def test_a_source_is_never_written_over(run: Path, key: str, text: str) -> None:
    folder = run.parent if key.startswith("adapter") else run.parent.parent / "bare"
    with pytest.raises(UserError, match=text):
        export_model(load_config(run, [f"export_dir={folder}"], quiet=True, command="export"))


def test_an_adapter_on_random_weights_cannot_be_merged(run: Path, tmp_path: Path) -> None:
    keys = [f"export_dir={tmp_path / 'out'}", "train_from_scratch=true"]
    with pytest.raises(UserError, match="train_from_scratch: the weights below the adapter were random"):
        export_model(load_config(run, keys, quiet=True, command="export"))


def test_an_adapter_needs_lora_to_be_merged(run: Path, tmp_path: Path) -> None:
    keys = [f"export_dir={tmp_path / 'out'}", "finetuning_type=full", f"adapter_name_or_path={run.parent}"]
    with pytest.raises(UserError, match="adapter_name_or_path: needs finetuning_type: lora"):
        export_model(load_config(run, keys, quiet=True, command="export"))
    assert not (tmp_path / "out").exists()


def test_keys_that_export_and_eval_cannot_do_without(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export_dir: missing, this key is required"):
        load_config({"model_name_or_path": "org/m"}, quiet=True, command="export")
    with pytest.raises(UserError, match="dataset: missing, this key is required"):
        load_config({"model_name_or_path": "org/m"}, quiet=True, command="eval")
    load_config({"model_name_or_path": "org/m", "eval_dataset": "a", "do_train": False}, quiet=True, command="eval")


def test_the_losses_of_a_run_are_those_that_it_logged_at_its_end(run: Path) -> None:
    """Of its exported weights, and of its last checkpoint; of two domains, which together make the logged loss."""
    results = json.loads((run.parent / "all_results.json").read_text())
    exported = json.loads((run.parent.parent / "exported.json").read_text())
    for found in (exported, json.loads((run.parent / "eval_results.json").read_text())):
        domains = found["domains"]
        assert list(domains) == ["target", "a", "all"]
        assert domains["all"]["loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
        assert domains["target"]["loss"] == pytest.approx(results["eval_target_loss"], rel=1e-5)
        assert [row["samples"] for row in domains.values()] == [8, 40, 48]
        tokens = [row["tokens"] for row in domains.values()]
        assert tokens[2] == tokens[0] + tokens[1]
    assert exported["weights"].endswith(f"bare with {run.parent}")
    assert not (run.parent.parent / "none").exists()
