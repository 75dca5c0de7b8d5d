# ruff: noqa: E501 - whole lines of text are easier to search for
"""Wrong configs for test_load.py: YAML text -> the one line that it gets."""

SELECT = "train_type: dynamic_select\ncomponent_name: random\nupdate_step: 2\n"
MIX = "train_type: dynamic_mix\ncomponent_name: random\nupdate_step: 2\n"
WEIGHT = "train_type: dynamic_weight\ncomponent_name: loss\n"
BEST = "load_best_model_at_end: true\neval_strategy: epoch\neval_dataset: c\n"

TYPES = [
    ("learning_rat: 1", "learning_rat: unknown key (did you mean 'learning_rate'?)"),
    ("banana: 1", "banana: unknown key"),
    ("learning_rate: fast", "learning_rate: expected a number >= 0, got 'fast'"),
    ("learning_rate: -1", "learning_rate: expected a number >= 0, got -1"),
    ("learning_rate: .nan", "learning_rate: expected a number >= 0, got nan"),
    ("learning_rate: .inf", "learning_rate: expected a number >= 0, got inf"),
    ("learning_rate: true", "learning_rate: expected a number >= 0, got True"),
    ("per_device_train_batch_size: 0", "per_device_train_batch_size: expected a whole number >= 1, got 0"),
    ("gradient_accumulation_steps: 1.5", "gradient_accumulation_steps: expected a whole number >= 1, got 1.5"),
    ("cutoff_len: [1]", "cutoff_len: expected a whole number >= 1, got list"),
    ("max_steps: 0", "max_steps: expected a whole number >= 1 or -1, got 0"),
    ("update_times: 0", "update_times: expected a whole number >= 1 or -1, got 0"),
    ("warmup_step: -1", "warmup_step: expected a whole number >= 0, got -1"),
    ("train_step: 0", "train_step: expected a whole number >= 1, got 0"),
    ("num_train_epochs: 0", "num_train_epochs: expected a number > 0, got 0"),
    ("warmup_ratio: 1.5", "warmup_ratio: expected a number >= 0 and <= 1, got 1.5"),
    ("adam_beta1: 1", "adam_beta1: expected a number >= 0 and < 1, got 1"),
    ("lora_dropout: 1.0", "lora_dropout: expected a number >= 0 and < 1, got 1.0"),
    ("freeze_trainable_layers: 0", "freeze_trainable_layers: expected a whole number of layers, > 0 counted "
     "from the end, < 0 from the start, got 0"),
    ("bf16: maybe", "bf16: expected true or false, got 'maybe'"),
    ("bf16: 1", "bf16: expected true or false, got 1"),
    ("run_name: 1.10", "run_name: expected text, got 1.1 (put it in quotes)"),
    ("template: ''", "template: expected text, got an empty string"),
    ("template: q.txt#mine", "template: 'q.txt' does not exist"),
    ("dataset: a,,b", "dataset: expected names, got an empty one (a comma too many?)"),
    ("dataset: {a: 1}", "dataset: expected names (a list, or text with commas), got mapping"),
    ("dataset: a,b,a", "dataset: 'a' is listed twice"),
    ("stage: stf", "stage: expected one of sft, pt, got 'stf' (did you mean 'sft'?)"),
    ("flash_attn: fa9", "flash_attn: expected one of auto, disabled, sdpa, fa2, got 'fa9' (did you mean 'fa2'?)"),
    ("eval_strategy: step", "eval_strategy: expected one of no, steps, epoch, got 'step' (did you mean 'steps'?)"),
    ("lr_scheduler_type: cosin", "lr_scheduler_type: expected one of linear, cosine, cosine_with_restarts, "
     "cosine_with_min_lr, cosine_warmup_with_min_lr, polynomial, inverse_sqrt, warmup_stable_decay, constant, "
     "constant_with_warmup, got 'cosin' (did you mean 'cosine'?)"),
    ("report_to: wandbb", "report_to: expected one of none, all, tensorboard, wandb, csv, comet, swanlab, mlflow, trackio, got 'wandbb' "
     "(did you mean 'wandb'?)"),
    ("tracker_options: {swanlab: {api_key: x}}", "tracker_options: swanlab.api_key is a secret, which config.yaml would "
     "hold: set it in the environment"),
    ("tracker_options: {mlflow: {Password: x}}", "tracker_options: mlflow.Password is a secret, which config.yaml would "
     "hold: set it in the environment"),
    ("tracker_options: {wandbb: {}}", "tracker_options: unknown tracker 'wandbb', expected tensorboard, wandb, csv, "
     "comet, swanlab, mlflow, trackio"),
    ("save_steps: 1.5", "save_steps: expected a whole number >= 1, or a share of all steps > 0 and < 1, got 1.5"),
    ("save_steps: 0", "save_steps: expected a whole number >= 1, or a share of all steps > 0 and < 1, got 0"),
    ("train_type: dynamic_selct", "train_type: expected one of static, dynamic_select, dynamic_mix, "
     "dynamic_weight, got 'dynamic_selct' (did you mean 'dynamic_select'?)"),
    ("train_type: [dynamic_weight, dynamic_weight]", "train_type: 'dynamic_weight' is listed twice"),
    ("component_name: {selct: less}", "component_name: unknown kind 'selct', expected select, mix or weight "
     "(did you mean 'select'?)"),
    ("init_mixture_proportions: [0.7, -0.3]", "init_mixture_proportions: expected proportions >= 0, got -0.3"),
    ("init_mixture_proportions: [0, 0]", "init_mixture_proportions: expected at least one proportion > 0, "
     "got all zero"),
    ("init_mixture_proportions: [.inf, 1]", "init_mixture_proportions: expected finite proportions, got inf"),
    ("init_mixture_proportions: 0.5", "init_mixture_proportions: expected a list of proportions, one per "
     "dataset, got 0.5"),
    ("val_size: 1", "val_size: expected a fraction >= 0 and < 1, or a whole number of samples >= 2, got 1"),
    ("val_size: 2.5", "val_size: expected a fraction >= 0 and < 1, or a whole number of samples >= 2, got 2.5"),
    ("select_fraction: 0", "select_fraction: expected a number > 0 and <= 1, got 0"),
    ("select_weights: [a]", "select_weights: expected numbers, one for each folder of select_from, got ['a']"),
    ("select_quotas: equl", "select_quotas: expected proportional, equal or a mapping of datasets to shares, "
     "got 'equl' (did you mean 'equal'?)"),
    ("select_quotas: {a: -1}", "select_quotas: expected a share >= 0 for 'a', got -1"),
    ("select_quotas: {a: 0}", "select_quotas: expected at least one share > 0"),
    ("val_size: -0.1", "val_size: expected a fraction >= 0 and < 1, or a whole number of samples >= 2, got -0.1"),
    ("seed: 9223372036854775808", "seed: expected a whole number <= 9,223,372,036,854,775,807, got <a whole number of 64 bits>"),
    ("ddp_timeout: 100000000000000", "ddp_timeout: expected a whole number <= 1,000,000,000, got 100000000000000"),
    ("cutoff_len: 2147483648", "cutoff_len: expected a whole number <= 2,147,483,647, got 2147483648"),
    ("num_train_epochs: 1e300", "num_train_epochs: expected a number <= 1e+06, got 1e+300"),
    (f"learning_rate: 1{'0' * 400}", "learning_rate: expected a number >= 0, got <a whole number of 1,329 bits>"),
    (f"learning_rate: {'x' * 500}", f"learning_rate: expected a number >= 0, got '{'x' * 29}...{'x' * 28}'"),
    (f"output_dir: {'x' * 300}", f"output_dir: expected a path or a name, got '{'x' * 29}...{'x' * 28}': a name in it has 300 bytes, files can have 255"),
    (f"output_dir: {'x/' * 2040}", f"output_dir: expected a path or a name, got '{'x/' * 14}x...{'x/' * 14}': it has 4,080 bytes, paths can have 4,000"),
    (f"run_name: {'x' * 5000}", "run_name: expected at most 4,096 characters, got 5,000"),
    ('run_name: "a\\0b"', "run_name: expected printable text on one line, got 'a\\x00b'"),
    ("model_name_or_path: ~no-such-user/x", "model_name_or_path: expected a path or a name, got '~no-such-user/x': there is no such user"),
]  # fmt: skip

RULES = [
    # A wrong key keeps its default, which must not lead to a second line.
    (SELECT.replace("update_step: 2", "update_step: x"), "update_step: expected a whole number >= 0, got 'x'"),
    (
        "layer_lr_multipliers: {layers.0: 2}\ndeepspeed: {optimizer: {type: AdamW}}",
        "layer_lr_multipliers: has no effect where the DeepSpeed config has an optimizer of its own; drop one of them",
    ),
    (
        "lr_scheduler_kwargs: {power: 1}\ndeepspeed: {scheduler: {type: WarmupLR}}",
        "lr_scheduler_kwargs: has no effect where the DeepSpeed config has a scheduler of its own; drop one of them",
    ),
    ("lr_scheduler_kwargs: 3", "lr_scheduler_kwargs: expected a mapping such as {min_lr: 1.0e-6}, got 3"),
    (
        "lr_scheduler_kwargs: {num_cycle: 1}",
        "lr_scheduler_kwargs: unknown option 'num_cycle' (did you mean "
        "'num_cycles'?); valid: num_cycles, min_lr, min_lr_rate, warmup_lr_rate, min_lr_ratio, lr_end, power, timescale, num_decay_steps, num_stable_steps, warmup_type, decay_type",
    ),
    ("lr_scheduler_kwargs: {power: 0}", "lr_scheduler_kwargs: power: expected a number > 0, got 0"),
    (
        "lr_scheduler_kwargs: {num_decay_steps: 0.5}",
        "lr_scheduler_kwargs: num_decay_steps: expected a whole number >= 0, got 0.5",
    ),
    (
        "lr_scheduler_kwargs: {decay_type: line}",
        "lr_scheduler_kwargs: decay_type: expected one of linear, cosine, 1-sqrt, got 'line' (did you mean 'linear'?)",
    ),
    (
        "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {min_lr: 0.1}",
        "lr_scheduler_kwargs: polynomial has no option 'min_lr'; it has lr_end, power",
    ),
    ("lr_scheduler_kwargs: {num_cycles: 1}", "lr_scheduler_kwargs: linear has no option 'num_cycles'; it has none"),
    (
        "lr_scheduler_type: cosine_with_min_lr",
        "lr_scheduler_kwargs: cosine_with_min_lr needs one of min_lr and min_lr_rate, such as lr_scheduler_kwargs: {min_lr: 1.0e-6}",
    ),
    (
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0, min_lr_rate: 0}",
        "lr_scheduler_kwargs: cosine_with_min_lr needs one of min_lr and min_lr_rate, such as lr_scheduler_kwargs: {min_lr: 1.0e-6}",
    ),
    (
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0}\nlearning_rate: 0",
        "lr_scheduler_kwargs: min_lr needs a learning_rate > 0",
    ),
    (
        "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1e-3}\nlearning_rate: 1e-3",
        "lr_scheduler_kwargs: lr_end 0.001 is not below learning_rate 0.001",
    ),
    (
        "mix_strategy: interleave_one",
        "mix_strategy: expected one of concat, interleave_under, interleave_over, interleave_once, got 'interleave_one' (did you mean 'interleave_once'?)",
    ),
    (
        "finetuning_type: full\nloraplus_lr_ratio: 16",
        "loraplus_lr_ratio: needs finetuning_type: lora",
    ),
    ("output_dir: null", "output_dir: missing, this key is required"),
    ("do_train: false", "do_train: false is not supported: dataflex-cli train only trains"),
    (
        "val_size: 0.1\neval_dataset: c",
        "val_size: cannot be used together with eval_dataset; keep one of them",
    ),
    (
        "mask_history: true\ntrain_on_prompt: true",
        "mask_history: cannot be used together with train_on_prompt",
    ),
    (
        "neat_packing: true\npacking: false",
        "neat_packing: needs packing: true, or drop packing: false",
    ),
    ("eval_strategy: steps", "eval_strategy: 'steps' needs eval_dataset or val_size"),
    (
        "subtask_column: task",
        "subtask_column: is a column of what is evaluated: set eval_dataset (or val_size)",
    ),
    (
        "subtask_column: labels\neval_dataset: c",
        "subtask_column: 'labels' is a column of ours; give the target's another name",
    ),
    (
        "load_best_model_at_end: true",
        "load_best_model_at_end: true chooses by an evaluation; set eval_strategy: steps or epoch",
    ),
    (
        BEST + "save_strategy: no",
        "load_best_model_at_end: true chooses among checkpoints; set save_strategy: steps or epoch",
    ),
    (
        BEST + "metric_for_best_model: eval_accuracy",
        "metric_for_best_model: 'eval_accuracy' is not evaluated; there are eval_loss",
    ),
    (
        BEST.replace("dataset: c", "dataset: c,d") + "metric_for_best_model: d_los",
        "metric_for_best_model: 'd_los' is not evaluated (did you mean 'eval_d_loss'?); there are eval_loss, eval_c_loss, "
        "eval_d_loss",
    ),
    (
        "interleave_probs: 0.5,0.5",
        "interleave_probs: needs mix_strategy: interleave_under or interleave_over",
    ),
    (
        "mix_strategy: interleave_over\ninterleave_probs: [0.5, 0]",
        "mix_strategy: interleave_over ends when every dataset is used up, and one has the proportion 0",
    ),
    (
        "mix_strategy: interleave_over\ninterleave_probs: [0.5, 0.3, 0.2]",
        "interleave_probs: expected one proportion per dataset (2: a, b), got 3",
    ),
    (
        "mix_strategy: interleave_over\ninterleave_probs: [0.5, 0.5]\ninit_mixture_proportions: [1, 1]",
        "interleave_probs: means the same as init_mixture_proportions, which is set too; keep one",
    ),
    ("bf16: true\nfp16: true", "fp16: cannot be used together with bf16; keep one of them"),
    ("adam_beta2: 0", "adam_beta2: expected a number > 0, got 0"),
    (
        "max_steps: 5\ntrain_step: 6",
        "train_step: 6 contradicts max_steps: 5; both mean the total number of steps",
    ),
    (
        SELECT + "warmup_step: 5\nmax_steps: 5",
        "warmup_step: 5 leaves no step after the warm-up: the run ends after 5 steps",
    ),
    (
        SELECT.replace("update_step: 2", "update_step: 0"),
        "update_step: dynamic_select needs a whole number of steps > 0 between decisions, got 0",
    ),
    (
        MIX.replace("update_step: 2\n", ""),
        "update_step: dynamic_mix needs a whole number of steps > 0 between decisions, it is missing",
    ),
    (
        "train_type: [static, dynamic_weight]\ncomponent_name: loss",
        "train_type: static cannot be combined with a dynamic type",
    ),
    (
        "train_type: dynamic_select,dynamic_mix\nupdate_step: 1\ncomponent_name: {select: random}",
        "component_name: missing, dynamic_mix needs a component",
    ),
    (
        MIX + "init_mixture_proportions: [1, 1, 1]",
        "init_mixture_proportions: expected one proportion per dataset (2: a, b), got 3",
    ),
    (
        MIX + "mixture_sample_rule: uniform",
        "mixture_sample_rule: 'uniform' fixes the proportions, so no mixer can act; "
        "use mixture, or drop component_name",
    ),
    (
        "train_type: dynamic_mix\nmixture_sample_rule: stratified\ninit_mixture_proportions: [1, 1]",
        "init_mixture_proportions: is not used with mixture_sample_rule: stratified; use mixture, or drop it",
    ),
    (
        "train_type: [dynamic_select, dynamic_weight]\ncomponent_name: random\nupdate_step: 1",
        "component_name: expected one name per type: {select: ..., weight: ...}",
    ),
    (
        "train_type: dynamic_weight",
        "component_name: missing, dynamic_weight needs a component",
    ),
    (
        SELECT.replace("random", "less"),
        "component_name: less needs a target to select for: set eval_dataset (or val_size)",
    ),
    (
        SELECT + "component_modules: ./mine.py",
        "component_modules: './mine.py' does not exist",
    ),
    ("components_cfg_file: q.txt", "components_cfg_file: 'q.txt' does not exist"),
    ("deepspeed: ds_zero9.json", "deepspeed: 'ds_zero9.json' does not exist (did you mean 'ds_zero3.json'?)"),
    ("model_name_or_path: /no/such/model", "model_name_or_path: the path '/no/such/model' does not exist"),
    ("resume_from_checkpoint: ./no", "resume_from_checkpoint: the path './no' does not exist"),
]

FOREIGN = [
    *((f"stage: {s}", f"stage: '{s}' is not supported: dataflex trains stages pt and sft only")
      for s in ("rm", "ppo", "dpo", "kto")),
    ("finetuning_type: oft", "finetuning_type: 'oft' is not supported: dataflex trains plain LoRA "
     "(finetuning_type: lora), full and freeze"),
    *((f"{key}: true", f"{key}: not supported: selection reads the moments of AdamW; use optim: adamw_torch")
      for key in ("use_galore", "use_apollo", "use_badam")),
    ("optim: galore_adamw", "optim: 'galore_adamw' is not supported: selection reads the moments of AdamW; "
     "use optim: adamw_torch"),
    *((f"{key}: true", f"{key}: not supported: the engine is DeepSpeed; use deepspeed: ds_zero3.json")
      for key in ("use_unsloth", "use_megatron", "use_mca", "fsdp")),
    *((f"{key}: 4", f"{key}: not supported: the base model is kept in bf16, fp16 or fp32; use bf16: true "
       "with LoRA or deepspeed: ds_zero3.json") for key in ("quantization_bit", "quantization_method", "fp8")),
    ("pissa_init: true", "pissa_init: not supported: dataflex trains plain LoRA (finetuning_type: lora), full "
     "and freeze"),
    *((f"use_{key}_loss: true", f"use_{key}_loss: not supported: the loss is next-token cross-entropy per "
       "sample, which selection and weighting build on") for key in ("asft",)),
    ("predict_with_generate: true", "predict_with_generate: not supported: dataflex-cli train only trains; "
     "evaluation is by loss (eval_strategy)"),
    ("template: qwen2_vl", "template: 'qwen2_vl' is not supported: vision and audio models are not supported"),
    ("script_url: x.py", "script_url: not supported: it is an entry of dataset_info.json, and not supported "
     "there either"),
    ("ranking: true", "ranking: not supported: it is an entry of dataset_info.json, and not supported there "
     "either"),
    ("evaluation_strategy: no\neval_strategy: no", "eval_strategy: another spelling of "
     "'evaluation_strategy', which is set too; keep one"),
    ("packin: true", "packin: unknown key (did you mean 'packing'?)"),
    ("dataset_dir: ONLINE", "dataset_dir: 'ONLINE' is not supported: give each dataset of the hub an entry in "
     "dataset_info.json: its hf_hub_url"),
    ("dataset_dir: REMOTE:org/data", "dataset_dir: 'REMOTE:org/data' is not supported: download that folder, and give "
     "its path"),
    ("flash_attn: fa3", "flash_attn: 'fa3' is not supported: use fa2, sdpa or auto"),
    ("gradient_checkpointing_kwargs: {preserve_rng_state: false}", "gradient_checkpointing_kwargs: expected a mapping "
     "of use_reentrant alone, got {'preserve_rng_state': False}"),
    ("train_sampling_strategy: sequential", "train_sampling_strategy: expected random or group_by_length, got "
     "'sequential'"),
    ("gradient_checkpointing_kwargs: {use_reentrant: false}\nuse_reentrant_gc: true", "use_reentrant_gc: another "
     "spelling of 'gradient_checkpointing_kwargs', which is set too; keep one"),
    ("logging_step: 5", "logging_step: unknown key (did you mean 'logging_steps'?)"),
]  # fmt: skip

STREAM = "streaming: true\nmax_steps: 9\n"
STREAM_MIX = STREAM + MIX.replace("random", "{}")
STREAMING = [
    ("streaming: true", "max_steps: missing: streams have no end, so streaming: true needs max_steps or train_step "
     "(mixing: or update_times)"),
    ("streaming: true\nnum_train_epochs: 2\n" + MIX, "max_steps: missing: streams have no end, so streaming: true "
     "needs max_steps or train_step (mixing: or update_times)"),
    (STREAM + SELECT, "train_type: dynamic_select chooses among all samples, which streaming: true does not have; "
     "set streaming: false"),
    (STREAM + "sample_weight: w", "sample_weight: streamed samples (streaming: true) have no weights of their own; "
     "use domain_weights or a weighter"),
    (STREAM + "sampling: inverse_domain", "sampling: weighted draws need all samples at hand, which streaming: true "
     "does not have; drop one of them"),
    (STREAM + "val_size: 0.1", "val_size: a part of a stream (streaming: true) cannot be held out; use eval_dataset"),
    (STREAM + "tokenized_path: t", "tokenized_path: streaming: true tokenises as it reads and keeps nothing; drop one "
     "of them"),
    (STREAM + "group_by_length: true", "group_by_length: true needs the lengths of all samples, which streaming: true "
     "does not know; drop one of them"),
    (STREAM + "neat_packing: true", "neat_packing: packs are filled by the lengths of samples to come, which streaming: "
     "true does not know; drop one of both"),
    (STREAM + "packing: true", "packing: packs are filled by the lengths of samples to come, which streaming: true does "
     "not know; drop one of both"),
    (STREAM + "save_strategy: epoch", "save_strategy: 'epoch' is not known of streams (streaming: true); use steps "
     "with save_steps"),
    (STREAM + "eval_strategy: epoch\neval_dataset: c", "eval_strategy: 'epoch' is not known of streams (streaming: "
     "true); use steps with eval_steps"),
    *((STREAM_MIX.format(name), f"component_name: '{name}' mixes by the sizes of the datasets, which streaming: true "
       "does not know; give init_mixture_proportions") for name in ("stratified", "temperature")),
    (STREAM + "train_type: dynamic_mix\nmixture_sample_rule: stratified", "mixture_sample_rule: 'stratified' mixes by "
     "the sizes of the datasets, which streaming: true does not know; give init_mixture_proportions"),
    (STREAM_MIX.format("dynamic_moe"), "component_name: dynamic_moe looks at samples ahead, which streaming: true "
     "cannot; set mixer_eval_dataset"),
]  # fmt: skip
