"""What the weights and Adam's moments are at this moment, as a few digits: part of a fingerprint of scores.

The digests are sums of integers over all bits of a tensor, each bit pattern multiplied by a number that depends on
its position: exact, so the same on every device, and cheap beside one scoring pass.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from dataflex.engine.optimizer_state import read_moments
from dataflex.utils import dist

_CHUNK = 1 << 22
_SAMPLED = 16
# Of a config: where it came from, and what no number depends on.
_NO_SETTINGS = {
    *("_name_or_path", "transformers_version", "peft_version", "base_model_name_or_path", "revision"),
    *("use_cache", "inference_mode", "auto_mapping", "architectures"),
}
_PLACE, _VALUE = 0x2545F4914F6CDD1D, 0x1B873593
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_digest(tensor: Tensor) -> int:
    """Sum over elements of (bits + constant) times an odd number made from the position, modulo 2^64."""
    flat = tensor.detach().reshape(-1).contiguous()
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    bits = flat.view(_AS_INTEGERS[flat.element_size()])
    total = 0
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + len(part), device=part.device) * _PLACE
        place ^= place >> 31
        total += int(((part + _VALUE) * (place | 1)).sum())
    return total % 2**64


def weights_identity(engine: Any, base: str, moments: bool) -> dict[str, str]:
    """Parts of a fingerprint: base weights, trained weights, what the model was made with and, where asked for, Adam's
    moments; a collective.

    base: where the weights that are not trained come from; a few values of each of them are looked at as well, and all
    of the buffers that are saved with the model.
    """
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    frozen = [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]
    fixed = [(name, bits_digest(_first(p))) for name, p in frozen]
    fixed += [(name, bits_digest(buffer)) for name, buffer in saved_buffers(engine.module)]
    parts = {
        "base weights": f"{base} {dist.broadcast_object(_of(fixed))}",
        "trained weights": _of([(name, _gathered_digest(p)) for name, p in trained]),
        "model settings": settings_digest(engine.module),
    }
    if moments:
        parts["Adam's moments"] = _moments_digest(engine, [name for name, _ in trained])
    return parts


def settings_digest(module: Any) -> str:
    """Of what no tensor tells: the model's config and those of its adapters (LoRA's alpha), without names and paths."""
    configs = {"": getattr(module, "config", None), **getattr(module, "peft_config", {})}
    settings = {name: _settings(config.to_dict()) for name, config in configs.items() if hasattr(config, "to_dict")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def _settings(config: Any) -> Any:
    return {str(key): value for key, value in config.items() if key not in _NO_SETTINGS}


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def saved_buffers(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to the state dict, with their names."""
    found = []
    for prefix, m in module.named_modules():
        for name, buffer in m.named_buffers(recurse=False):
            if name not in m._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}" if prefix else name, buffer))
    return found


def _first(parameter: Tensor) -> Tensor:
    """The first values of a parameter, as rank 0 has them under ZeRO-3 too."""
    values: Tensor = getattr(parameter, "ds_tensor", parameter)
    return values.detach().reshape(-1)[:_SAMPLED]


def _gathered_digest(parameter: Tensor) -> int:
    if not hasattr(parameter, "ds_id"):
        return bits_digest(parameter)
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return bits_digest(parameter)


def _moments_digest(engine: Any, names: list[str]) -> str:
    steps = engine.global_steps - engine.skipped_steps
    if steps == 0 or "betas" not in engine.optimizer.param_groups[0]:
        return "none"
    digests: list[tuple[str, int]] = []
    for name in names:
        found, constants = read_moments(engine, [name])
        digests += [(name, bits_digest(moment)) for moment in found[name]]
    return f"{_of(digests)} {constants.beta1} {constants.beta2} {constants.eps} step {steps}"


def _of(digests: list[tuple[str, int]]) -> str:
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]
