"""What PyTorch allocates in a scoring pass under ZeRO-3 with the optimizer and the parameters offloaded, beside a step.

`python benchmarks/offload_memory.py`: one process, a Llama of random weights, full finetuning. On a CPU the host's
memory is the device's, so offloading shows only in what a pass copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from measure import Bench
from process_group import end_process, start_process
from transformers import LlamaConfig, LlamaForCausalLM

import dataflex

SIZES = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}
SAMPLES, TOKENS, BATCH = 16, 128, 4


class Pad:
    pad_token_id = 0


def make_engine(offload: str) -> Any:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    zero |= {f"offload_{what}": {"device": "cpu"} for what in offload.split()}
    draw = np.random.default_rng(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in draw.integers(3, 8000, (SAMPLES, TOKENS)).tolist()]
    torch.manual_seed(0)
    return dataflex.initialize(
        model=LlamaForCausalLM(LlamaConfig(**SIZES)),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        },
        dataflex={"max_steps": 50, "scoring_batch_tokens": BATCH * TOKENS},
        train_dataset=rows,
        tokenizer=Pad(),
    )


def main() -> None:
    bench = Bench(torch.device("cpu"), smoke=True)
    start_process()
    for offload in ("", "optimizer", "optimizer param"):
        engine = make_engine(offload)
        batches = engine.batches()
        for _ in range(2):
            engine.training_step(next(batches))
        trained = sum(p.ds_numel for p in engine.module.parameters() if p.requires_grad)
        found = {
            "step": bench.allocated_mib(lambda e=engine, b=batches: e.training_step(next(b))),
            "losses": bench.allocated_mib(lambda e=engine: e.scorer.losses(e.run.pool)),
        }
        for name, adam in (("gradient features", None), ("features with Adam's moments", "adam_less")):
            how = {"proj_dim": 1024, "seed": 1, "adam": adam}
            found[name] = bench.allocated_mib(lambda e=engine, h=how: e.scorer.gradient_features(e.run.pool, **h))
        print(f"offload {offload or 'nothing'} ({trained:,} trained, fp32 {trained * 4 / 2**20:.0f} MiB): ", end="")
        print(", ".join(f"{name} {mib:.1f} MiB" for name, mib in found.items()), flush=True)
    end_process()


if __name__ == "__main__":
    main()
