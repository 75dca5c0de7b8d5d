"""Tiny models, samples and DeepSpeed configs for tests that run in `tests.distributed` ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from tests.tiny import tiny_llama, tiny_mixtral

VOCABULARY = 259
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# For runs in which it does not matter what is adapted: under ZeRO-3 a step's time goes with the number of modules.
FEW_TARGETS = ["q_proj", "down_proj"]


class PadZero:
    """Stands in for a tokenizer where only the pad token matters."""

    pad_token_id = 0


def samples(count: int, seed: int, shortest: int = 6, longest: int = 24) -> list[dict[str, list[int]]]:
    """Random token samples of mixed length; the first one to three tokens are not trained on."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = draw.integers(3, VOCABULARY, draw.integers(shortest, longest + 1)).tolist()
        prompt = int(draw.integers(1, 4))
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def model(
    kind: str = "full", dtype: torch.dtype = torch.float32, targets: list[str] = LORA_TARGETS, **overrides: Any
) -> torch.nn.Module:
    """A tiny Llama; ``kind`` is ``full`` or ``lora`` (random adapters, so that both factors have gradients).

    ``moe``: a tiny Mixtral of four experts. targets: the layers that are adapted.
    """
    if kind == "moe":
        return tiny_mixtral(VOCABULARY, **overrides).to(dtype)
    net: Any = tiny_llama(VOCABULARY, initializer_range=0.08, **overrides)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            config = LoraConfig(
                r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM"
            )
            net = get_peft_model(net, config)
    return net.to(dtype)


def ds_config(stage: int, micro_batch: int = 2, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config in which even tiny models exercise ZeRO-3's fetches.

    For each module ZeRO-3 goes through all that follow, for the parameters that are used again; here it ends after one
    layer, which takes a third off runs that score.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 4096,
            "stage3_max_reuse_distance": 4096,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "steps_per_print": None,
        **more,
    }


def checkpoint_activations(net: Any, kind: str | None) -> None:
    """Turn on activation checkpointing: ``reentrant``, ``non-reentrant`` or None."""
    if kind is None:
        return
    net.enable_input_require_grads()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})


def parameter_hash(engine: Any) -> str:
    """Hash of the full fp32 values of all trained parameters; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    digest = hashlib.sha256()
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            value = parameter if full is None else full
            digest.update(value.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
