"""The trained model as a Hugging Face folder, from any ZeRO stage."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from dataflex.engine.folder.identity import saved_buffers
from dataflex.engine.models.handover import Handover
from dataflex.engine.steps.finite import check_finite
from dataflex.utils import dist
from dataflex.utils.files import give_usual_mode, write_atomically
from dataflex.utils.room import check_room, said_when_full


def export(engine: Any, folder: Path, handover: Handover) -> None:
    """Write model (or adapter) and what goes with it to ``folder``; a collective.

    Parameters are gathered one at a time to rank 0's memory. `save_pretrained` alone would write empty tensors
    under ZeRO-3. UserError, and nothing is written, where they are not finite.
    """
    import deepspeed

    check_finite(engine, folder)
    module = engine.module
    wanted = sum(size_of(p) for p in module.parameters() if p.requires_grad or not hasattr(module, "peft_config"))
    dist.together(lambda: check_room(folder, wanted, "the trained model"))
    is_adapter = hasattr(module, "peft_config")
    partitioned = engine.zero_optimization_stage() == 3
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        if is_adapter and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            if dist.is_main():
                weights[name] = parameter.detach().cpu().clone()
    if dist.is_main():
        weights |= {} if is_adapter else {name: b.detach().cpu() for name, b in saved_buffers(module)}
        with said_when_full(folder, "the trained model"):
            write_weights(module, folder, handover, state_dict=weights)
        handover.tokenizer.save_pretrained(folder)
    dist.barrier()


def size_of(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter, all of it where ranks hold parts."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def write_weights(module: Any, folder: Path, handover: Handover, **how: Any) -> None:
    """`save_pretrained` without peft's empty form of a model card, and files that the umask alone protects."""
    card = folder / "README.md"
    kept = card.read_text(encoding="utf-8") if card.exists() else None
    with warnings.catch_warnings(), handover.around_saving(module, folder):
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        module.save_pretrained(folder, **how)
    if hasattr(module, "peft_config"):
        _order_targets(folder / "adapter_config.json")
        card.unlink(missing_ok=True)
        if kept is not None:
            card.write_text(kept, encoding="utf-8")
    for path in folder.glob("*.safetensors"):
        give_usual_mode(path)


def _order_targets(file: Path) -> None:
    """Sort the targets in an adapter's config: peft keeps a set of names, in another order in every process."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
        write_atomically(file, json.dumps(config, indent=2, sort_keys=True))
