"""YAML runs: steps in which no weight counts, and a model whose own config is too small for the data."""

from __future__ import annotations

from pathlib import Path

import transformers

from tests.distributed import run_ranks
from tests.driver.workspace import TEMPLATE, settings
from tests.tiny import byte_tokenizer


def test_samples_of_weight_0_and_a_short_table_of_positions(workspace: Path, tmp_path: Path) -> None:
    """5 of the 40 rows of dataset a have size 0; GPT-2 here has 32 positions."""
    short = tmp_path / "short"
    sizes = {"vocab_size": 259, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(short)
    byte_tokenizer(TEMPLATE).save_pretrained(short)
    base = settings(workspace, output_dir=None, dataset=["a"], finetuning_type="full", save_strategy="no")
    cases = {
        "weights": {
            **base,
            "sample_weight": "size",
            "per_device_train_batch_size": 1,
            "num_train_epochs": 1,
            "max_steps": -1,
        },
        "positions": {**base, "model_name_or_path": str(short)},
    }
    (found,) = run_ranks("tests.driver.ranks:sweep", 1, folder=str(tmp_path), cases=cases)
    assert "losses" in found["weights"], found["weights"]
    losses = found["weights"]["losses"]
    assert (len(losses), losses.count(0.0)) == (40, 5)
    assert found["positions"]["error"].startswith("dataset: sample ") and "(a.json:" in found["positions"]["error"]
    assert found["positions"]["error"].endswith(
        "tokens, the model has 32 positions (max_position_embeddings, the rows of transformer.wpe) and no more; "
        "set cutoff_len: 32"
    )
