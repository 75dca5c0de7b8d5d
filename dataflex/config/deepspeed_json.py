"""The DeepSpeed config file: read, refused where scoring would not be exact, compared with the YAML."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dataflex.config.paths import resolve
from dataflex.config.secrets import NO_SECRET, secret_places
from dataflex.config.yaml_reader import kind_of, read_text
from dataflex.utils.errors import UserError, cut, shown

_TENSOR = "it splits layers over ranks, so per-sample gradients would be incomplete"
_QUANTISED = "ZeRO++ quantises or regroups what scoring reads, so features would not be exact"
_SAMPLER = "DeepSpeed's own data sampler would replace dataflex's plan"
_COMPILE = "compiled graphs bypass the layers' hooks that scoring needs"
REFUSED: dict[str, str] = {
    "tensor_parallel": _TENSOR,
    "tp": _TENSOR,
    "autotp_size": _TENSOR,
    "sequence_parallel": _TENSOR,
    "sequence_parallel_size": "it splits samples over ranks, so per-sample gradients would be incomplete",
    "pipeline": _TENSOR,
    "pipeline_parallel_size": _TENSOR,
    "compile": _COMPILE,
    "deepcompile": _COMPILE,
    "data_efficiency": _SAMPLER,
    "curriculum_learning": _SAMPLER,
    "zero_optimization.zero_quantized_weights": _QUANTISED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTISED,
    "zero_optimization.zero_quantized_gradients": _QUANTISED,
    "zero_optimization.zero_hpz_partition_size": _QUANTISED,
}
BLOCK = "dataflex"
SAME_AS_YAML: dict[str, str] = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
}


def read(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the DeepSpeed config as a new dict: from a path, a packaged name, or the mapping itself."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return copy.deepcopy(dict(value))
    path = resolve(value)
    text = read_text(path, "DeepSpeed config")
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg}") from None
    except _DuplicateKeyError as e:
        raise UserError(f"{path}: key '{cut(str(e))}' is given twice") from None
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"{path}: not valid JSON: {type(e).__name__} (too deep, or a number of too many digits)"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got a {kind_of(data)}")
    return data


def problems(config: Mapping[str, Any], yaml_values: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each refused key, wrong stage, and value that contradicts the YAML's."""
    yield from refusals(config)
    if BLOCK in config:
        yield f"'{BLOCK}' is for dataflex.initialize; here the YAML says it: drop the block"
    for key, yaml_key in SAME_AS_YAML.items():
        value = _at(config, key)
        if value not in (None, "auto") and value != yaml_values[yaml_key]:
            mine = json.dumps(yaml_values[yaml_key])
            yield f"'{key}' is {cut(json.dumps(value, default=str))}, but {yaml_key} is {mine}: use \"auto\""


def refusals(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each refused key and wrong stage."""
    for key, reason in REFUSED.items():
        if _in_use(_at(config, key)):
            yield f"'{key}' is not supported: {reason}"
    for place in secret_places(config):
        yield f"'{place}' {NO_SECRET}"
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f"'zero_optimization' must be a mapping, got a {kind_of(zero)}"
    elif zero.get("stage", 0) not in (0, 1, 2, 3) or isinstance(zero.get("stage"), bool):
        yield f"'zero_optimization.stage' must be 0, 1, 2 or 3, got {shown(zero['stage'])}"
    if _at(config, "managed_gradient_accumulation") is False:
        yield "'managed_gradient_accumulation' must be true: the plan says where a step ends"


def _at(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _in_use(value: Any) -> bool:
    """False for what switches a feature off: null, false, sizes of at most 1, blocks of only such values."""
    if isinstance(value, Mapping):
        for switch in ("enabled", "deepcompile"):
            if switch in value:
                return _in_use(value[switch])
        return any(_in_use(v) for v in value.values())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value > 1
    return bool(value)


class _DuplicateKeyError(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise _DuplicateKeyError(key)
        seen[key] = value
    return seen
