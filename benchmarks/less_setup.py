"""What the LESS benchmarks share: real text in byte tokens, a small Llama with LoRA, a short training, CSV files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Sample = dict[str, list[int]]
POOL, TARGET = ("alpaca_en_demo", "gsm8k_train"), ("gsm8k_val",)
VOCABULARY = 259
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def real_text(folder: Path, cutoff_len: int, count: int, targets: int) -> tuple[dict[str, list[Sample]], list[Sample]]:
    """``count`` samples drawn from `POOL`, by dataset, and the first ``targets`` of `TARGET`, as a run reads them.

    folder: with a dataset_info.json that names those datasets. Fewer where there are fewer.
    """
    from dataflex.config import load_config
    from dataflex.data.load import load_data
    from dataflex.engine.models.model import load_tokenizer

    settings = {
        "model_name_or_path": str(Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny_llama"),
        "dataset": list(POOL),
        "eval_dataset": list(TARGET),
        "dataset_dir": str(folder.resolve()),
        "cutoff_len": cutoff_len,
        "output_dir": "unused",
        "train_from_scratch": True,
    }
    cfg = load_config(settings)
    data = load_data(cfg, load_tokenizer(cfg))
    draw = np.random.default_rng(0)
    ids = np.sort(draw.permutation(len(data.train))[:count])
    named: dict[str, list[Sample]] = {}
    for i in ids.tolist():
        named.setdefault(data.train.domain_names[data.train.domain_ids[i]], []).append(plain(data.train[i]))
    assert data.eval is not None
    return named, [plain(data.eval[i]) for i in range(min(targets, len(data.eval)))]


def plain(sample: dict[str, Any]) -> Sample:
    return {key: list(map(int, sample[key])) for key in ("input_ids", "labels")}


def synthetic(count: int, targets: int, longest: int, seed: int = 0) -> tuple[dict[str, list[Sample]], list[Sample]]:
    """Random tokens, lengths as in text: log-normal, the first quarter not trained on."""
    draw = np.random.default_rng(seed)

    def make(n: int) -> list[Sample]:
        lengths = np.clip(np.exp(draw.normal(np.log(longest / 3), 0.6, n)), 6, longest).astype(int)
        rows = [draw.integers(3, VOCABULARY, length).tolist() for length in lengths]
        return [{"input_ids": row, "labels": [-100] * (len(row) // 4) + row[len(row) // 4 :]} for row in rows]

    return {"a": make(count // 2), "b": make(count - count // 2)}, make(targets)


def llama(width: int, layers: int, vocabulary: int = VOCABULARY, seed: int = 0, **more: Any) -> Any:
    """A Llama from random weights on the CPU in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        max_position_embeddings=2048,
        use_cache=False,
        **more,
    )
    return LlamaForCausalLM(config)


def with_lora(net: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(net, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM"))


def warm_up(net: Any, samples: Sequence[Sample], steps: int, lr: float, batch: int = 8) -> torch.optim.AdamW:
    """Train what requires grad with plain AdamW; returns the optimizer, which then has moments."""
    from dataflex.data.encoding.collate import Collator

    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    draw, collate = np.random.default_rng(1), Collator(0)
    net.train()
    for _ in range(steps):
        made = collate([samples[i] for i in draw.choice(len(samples), batch, replace=False)])
        labels = made.pop("labels")
        logits = net(**made).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    net.eval()
    return optimizer


def engine_for(
    net: Any, pool: Any, target: Any, *, micro_batch: int, steps: int, lr: float, collator: Any = None, **flex: Any
) -> Any:
    """A dataflex engine at ZeRO-0 over ``net``; bf16 where the model is."""
    import dataflex
    from dataflex.data.encoding.collate import Collator

    half = next(net.parameters()).dtype is torch.bfloat16
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": half},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.0, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "steps_per_print": 2**31,
    }
    return dataflex.initialize(
        model=net,
        config=config,
        train_dataset=pool,
        eval_dataset=target,
        data_collator=collator or Collator(0),
        dataflex={"train_step": steps, **flex},
    )


def overlap(a: Iterable[int], b: Iterable[int]) -> float:
    """Share of ``a`` that is in ``b``."""
    left, right = set(a), set(b)
    return len(left & right) / len(left)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 0 to n - 1; ties by index (scores in float64 have none that matter)."""
    order = np.argsort(values, kind="stable")
    out = np.empty(len(values))
    out[order] = np.arange(len(values))
    return out


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace ``path``; columns in the order in which they first come."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str], say: Callable[[str], None] = print) -> None:
    """A Markdown table of some columns, as the docs have it."""
    say("| " + " | ".join(columns) + " |")
    say("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        say("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")


def no_data(folder: Path | None) -> str | None:
    """Why there is no real text, or None where there is."""
    if folder is None:
        return "no --data FOLDER given (laid out as a dataset_dir with alpaca_en_demo, gsm8k_train and gsm8k_val)"
    if not (folder / "dataset_info.json").is_file():
        return f"{folder} has no dataset_info.json"
    return None
