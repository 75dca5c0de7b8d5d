"""README.md of a trained model's folder: what it is made from, with what, and how it went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import yaml

from dataflex import __version__
from dataflex.data.pool import Pool

if TYPE_CHECKING:
    from dataflex.config import Config
    from dataflex.config.schema import Kind
    from dataflex.data.pool import TrainingPool

_METHODS = {"lora": "LoRA", "full": "full finetuning", "freeze": "finetuning of some layers"}
_PACKAGES = ("torch", "deepspeed", "transformers", "peft")
_SHOWN = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "cutoff_len",
)


def model_card(cfg: Config, run: Any, pool: TrainingPool, results: dict[str, float], stops: Sequence[int] = ()) -> str:
    """Markdown with the front matter that model hubs read.

    results: those of all_results.json. stops: ids of tokens that end an answer, where the base model has others.
    """
    name, method = cfg.model.model_name_or_path, cfg.method
    head: dict[str, Any] = {
        "library_name": "peft" if method.finetuning_type == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dataflex", method.finetuning_type, method.stage],
    }
    if not cfg.model.train_from_scratch:
        head = {"base_model": name, **head}
    origin = "random weights of the architecture" if cfg.model.train_from_scratch else "the weights of"
    title = cfg.output.run_name or (cfg.output.output_dir.rstrip("/").rsplit("/", 1)[-1])
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"Trained from {origin} `{name}` by {_METHODS[method.finetuning_type]} (stage {method.stage}).",
        "",
        *_use(cfg, stops, method.finetuning_type == "lora", method.stage == "sft"),
        *_table("Data", ("dataset", "samples", "tokens"), _data_rows(pool)),
        *_table("Training", ("key", "value"), _training_rows(cfg, run)),
        *_components(cfg),
        *_table("Results", ("figure", "value"), [(key, f"{value:.6g}") for key, value in results.items()]),
        *_table("Versions", ("package", "version"), [("dataflex", __version__), *_versions()]),
    ]
    return "\n".join(lines)


def merged_card(cfg: Config, base: str, dtype: str, chats: bool) -> str:
    """The card of what `dataflex-cli export` wrote. base: the model that was named. chats: with a chat template."""
    adapter, head = cfg.model.adapter_name_or_path, {"library_name": "transformers", "pipeline_tag": "text-generation"}
    merged = f", with the LoRA adapter `{adapter}` merged into it" if adapter else ""
    lines = [
        "---",
        yaml.safe_dump({"base_model": base, **head, "tags": ["dataflex"]}, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {(cfg.export.export_dir or '').rstrip('/').rsplit('/', 1)[-1]}",
        "",
        f"The model `{cfg.model.model_name_or_path}`{merged}; weights in {dtype}.",
        "",
        *_use(cfg, (), False, chats),
        *_table("Versions", ("package", "version"), [("dataflex", __version__), *_versions()]),
    ]
    return "\n".join(lines)


def _use(cfg: Config, stops: Sequence[int], is_adapter: bool, chats: bool) -> list[str]:
    """Code that loads the folder and lets the model answer."""
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    loading = ['model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")']
    ends = ""
    if is_adapter:
        imports = ["from peft import PeftModel", *imports]
        base = json.dumps(cfg.model.model_name_or_path)
        loading = [f'model = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")']
        if cfg.model.new_special_tokens or cfg.model.resize_vocab:
            loading.append("if len(tokenizer) > model.get_input_embeddings().num_embeddings:")
            loading.append("    model.resize_token_embeddings(len(tokenizer))")
        loading.append("model = PeftModel.from_pretrained(model, folder)")
        ends = f", eos_token_id={list(stops)}" if stops else ""
    asking = ['inputs = tokenizer(text, return_tensors="pt")']
    if chats:
        asking = [
            'messages = [{"role": "user", "content": text}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    lines = [
        *imports,
        "",
        'folder, text = ".", "..."  # this folder, and what to ask',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *loading,
        *asking,
        f"output = model.generate(**inputs, max_new_tokens=256{ends})",
        "print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))",
    ]
    return ["## Use", "", "```python", *lines, "```", ""]


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    ruled = [head, tuple("---" for _ in head), *rows]
    return [f"## {title}", "", *("| " + " | ".join(row) + " |" for row in ruled), ""]


def _data_rows(pool: TrainingPool) -> list[tuple[str, ...]]:
    if not isinstance(pool, Pool):
        return [(name, "streamed", "streamed") for name in pool.domain_names]
    rows: list[tuple[str, ...]] = []
    for number, name in enumerate(pool.domain_names):
        mine = pool.domain_ids == number
        rows.append((name, f"{int(mine.sum()):,}", f"{int(pool.lengths[mine].sum()):,}"))
    return rows


def _training_rows(cfg: Config, run: Any) -> list[tuple[str, ...]]:
    kinds = ", ".join(f"{kind}: {cfg.flex.component(kind) or 'fixed'}" for kind in cfg.flex.kinds)
    precision = "bf16" if cfg.train.bf16 else "fp16" if cfg.train.fp16 else "fp32"
    flat, unit = cfg.dump_flat(), "samples" if run.packing is None else "packs"
    rows = {
        "data decisions": kinds or "none (static)",
        "steps": f"{run.step:,}",
        "global batch": f"{run.micro_batch} x {run.accumulation} x {run.world_size} = {run.global_batch} {unit}",
        "precision": precision,
        **{key: str(flat[key]) for key in _SHOWN if key in flat},
    }
    if cfg.method.finetuning_type == "lora":
        rows |= {"lora_rank": str(cfg.method.lora_rank), "lora_alpha": str(cfg.method.lora_scale_alpha)}
    return [(key, value) for key, value in rows.items()]


def _components(cfg: Config) -> list[str]:
    """A table of the params of each component."""
    lines: list[str] = []
    for kind, params in (cfg.flex.component_params or {}).items():
        rows: list[tuple[str, ...]] = [(key, "none" if value is None else str(value)) for key, value in params.items()]
        lines += _table(f"Component: {kind} by {cfg.flex.component(cast('Kind', kind))}", ("param", "value"), rows)
    return lines


def _versions() -> list[tuple[str, ...]]:
    return [(package, version(package)) for package in _PACKAGES]
