"""Keys of LLaMA-Factory and transformers that are not ours: other spellings, refused ones, ignored ones.

First match wins; patterns are `fnmatch` patterns of keys. A refused or unsupported key set to false or null
asks for nothing, so it is ignored with a note.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

ALIASES: dict[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}

_STAGE = "dataflex trains stages pt and sft only"
_ADAPTER = "dataflex trains plain LoRA (finetuning_type: lora), full and freeze"
_OPTIM = "selection reads the moments of AdamW; use optim: adamw_torch"
_LOSS = "the loss is next-token cross-entropy per sample, which selection and weighting build on"
_BASE = "the base model is kept in bf16, fp16 or fp32; use bf16: true with LoRA or deepspeed: ds_zero3.json"
_ENGINE = "the engine is DeepSpeed; use deepspeed: ds_zero3.json"
_PREDICT = "dataflex-cli train only trains; evaluation is by loss (eval_strategy)"
_DATASET_INFO = "it is an entry of dataset_info.json, and not supported there either"
REFUSED: tuple[tuple[str, str], ...] = (
    *((p, _STAGE) for p in ("pref_*", "dpo_*", "kto_*", "simpo_*", "ppo_*", "ref_model*", "reward_model*", "ld_alpha")),
    *((p, _ADAPTER) for p in ("pissa_*", "use_dora", "use_rslora", "loraplus_*", "oft_*", "use_llama_pro")),
    *((p, _OPTIM) for p in ("*galore*", "*apollo*", "*badam*", "use_adam_mini", "use_muon", "optim_args")),
    *((p, _LOSS) for p in ("*dft_*", "*asft_*", "*eaft_*", "neftune_*", "label_smoothing_factor", "*moe_aux_loss*")),
    *((p, _BASE) for p in ("*quantization*", "double_quantization", "fp8*", "pure_bf16", "load_in_*bit")),
    *((p, _ENGINE) for p in ("fsdp*", "*megatron*", "use_mca", "*unsloth*", "use_ray", "ray_*", "torch_compile*")),
    *((p, _PREDICT) for p in ("predict_with_generate", "do_predict", "generation_*", "compute_accuracy")),
    *((p, _DATASET_INFO) for p in ("script_url", "ranking")),
    ("load_best_model_at_end", "every checkpoint is kept until save_total_limit; choose one afterwards"),
    ("early_stopping_*", "the schedule fixes the number of steps (train_step, max_steps)"),
    ("disable_shuffling", "the order is the plan's, drawn from the seed"),
    ("interleave_probs", "use train_type: dynamic_mix with static_mix: true and init_mixture_proportions"),
    ("mix_strategy", "datasets are concatenated; to mix them use train_type: dynamic_mix"),
    ("lr_scheduler_kwargs", "only schedules without further arguments are supported"),
)
IGNORED: tuple[tuple[str, str], ...] = (
    *((p, "only text is trained on") for p in ("image_*", "video_*", "audio_*", "freeze_vision_tower")),
    *((p, "only text is trained on") for p in ("freeze_multi_modal_projector", "freeze_language_model")),
    *((p, "use report_to: tensorboard, wandb, csv or comet") for p in ("swanlab_*", "use_swanlab")),
    *((p, "nothing is uploaded") for p in ("push_to_hub*", "hub_*", "hf_hub_token")),
    *((p, "no best model is chosen") for p in ("metric_for_best_model", "greater_is_better")),
    ("do_eval", "eval_strategy decides"),
    ("use_fast_tokenizer", "the fast tokenizer is used where there is one"),
    ("ignore_pad_token_for_loss", "padding is never trained on"),
    *((f"dataloader_{p}", "the loader follows the plan") for p in ("pin_memory", "persistent_workers", "drop_last")),
    ("dataloader_prefetch_factor", "the loader follows the plan"),
    *((f"ddp_{p}", "the engine is DeepSpeed") for p in ("find_unused_parameters", "bucket_cap_mb", "backend")),
    ("remove_unused_columns", "only the columns named in dataset_info.json are read"),
    *((f"logging_{p}", "logging_steps decides") for p in ("strategy", "first_step", "dir", "nan_inf_filter")),
    *((f"include_{p}", "the log decides") for p in ("num_input_tokens_seen", "*tokens_per_second")),
    ("log_level*", "set DATAFLEX_LOG_LEVEL"),
    ("disable_tqdm", "plain lines are printed where there is no terminal"),
    ("enable_liger_kernel", "it changes speed only"),
    ("use_cache", "it does not matter in training"),
    ("low_cpu_mem_usage", "the engine decides"),
    ("print_param_status", "the trainable parameters are always printed"),
)
VALUES_REFUSED: dict[tuple[str, str], str] = {
    **{("stage", s): f"'{s}' is not supported: {_STAGE}" for s in ("rm", "ppo", "dpo", "kto")},
    ("finetuning_type", "oft"): f"'oft' is not supported: {_ADAPTER}",
}
_VALUE_PATTERNS: tuple[tuple[str, str, str], ...] = (
    *(("optim", p, _OPTIM) for p in ("*galore*", "*apollo*", "*8bit", "*4bit", "*32bit", "adafactor*", "*lion*")),
    *(("template", p, "vision and audio models are not supported") for p in ("*_vl", "*_audio", "*_omni", "llava*")),
    *(("template", p, "vision and audio models are not supported") for p in ("paligemma*", "mllama*", "pixtral*")),
    ("report_to", "*swanlab*", "use tensorboard, wandb, csv or comet"),
    ("report_to", "*mlflow*", "use tensorboard, wandb, csv or comet"),
)


def asks_nothing(key: str, value: Any) -> bool:
    """Whether a value switches a feature off (false, null, zero, "no") or asks for what is done anyway."""
    return value in (None, False, "no", "off", "none") or (key, value) == ("mix_strategy", "concat")


def refused(key: str) -> str | None:
    """The reason why a foreign key is refused, or None."""
    return _match(REFUSED, key)


def ignored(key: str) -> str | None:
    """The reason why a foreign key may be ignored, or None."""
    return _match(IGNORED, key)


def value_refused(key: str, value: Any) -> str | None:
    """The text for a value of our own key that is refused with a reason of its own, or None."""
    if not isinstance(value, str):
        return None
    exact = VALUES_REFUSED.get((key, value))
    if exact is not None:
        return exact
    for name, pattern, reason in _VALUE_PATTERNS:
        if key == name and fnmatchcase(value, pattern):
            return f"'{value}' is not supported: {reason}"
    return None


def _match(table: tuple[tuple[str, str], ...], key: str) -> str | None:
    for pattern, reason in table:
        if fnmatchcase(key, pattern):
            return reason
    return None
