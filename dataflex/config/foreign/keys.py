"""Keys of LLaMA-Factory and transformers that are not ours: other spellings, translated, refused and ignored ones.

The table is ``configs/llamafactory/keys.yaml``. A key of it, or one that nothing knows, asks for nothing where it is
set to false or null, so it is ignored with a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from dataflex.config.paths import packaged
from dataflex.config.sections.fields import shown
from dataflex.config.yaml_reader import read_mapping

_STAGE = "dataflex trains stages pt and sft only"
_ADAPTER = "dataflex trains plain LoRA (finetuning_type: lora), full and freeze"
_OPTIM = "selection reads the moments of AdamW; use optim: adamw_torch"
VALUES_REFUSED: dict[tuple[str, str], str] = {
    **{("stage", s): f"'{s}' is not supported: {_STAGE}" for s in ("rm", "ppo", "dpo", "kto")},
    ("finetuning_type", "oft"): f"'oft' is not supported: {_ADAPTER}",
    ("flash_attn", "fa3"): "'fa3' is not supported: use fa2, sdpa or auto",
}
_VALUE_PATTERNS: tuple[tuple[str, str, str], ...] = (
    *(("optim", p, _OPTIM) for p in ("*galore*", "*apollo*", "*8bit", "*4bit", "*32bit", "adafactor*", "*lion*")),
    *(("template", p, "vision and audio models are not supported") for p in ("*_vl", "*_audio", "*_omni", "llava*")),
    *(("template", p, "vision and audio models are not supported") for p in ("paligemma*", "mllama*", "pixtral*")),
    ("dataset_dir", "ONLINE", "give each dataset of the hub an entry in dataset_info.json: its hf_hub_url"),
    ("dataset_dir", "REMOTE:*", "download that folder, and give its path"),
)
# Of a refused key: what is done anyway.
_DONE_ANYWAY = {
    "init_special_tokens": "noise_init",
    "train_sampling_strategy": "random",
}


@dataclass(frozen=True)
class Table:
    """spellings: {other name: ours}. translated: {name: what of it}. refused, ignored: (name or pattern, reason)."""

    spellings: dict[str, str]
    translated: dict[str, str]
    refused: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...]

    def treatment(self, key: str) -> str | None:
        """spelling, translated, refused or ignored; None of a key that is in none."""
        if key in self.spellings:
            return "spelling"
        if key in self.translated:
            return "translated"
        return "refused" if _match(self.refused, key) else "ignored" if _match(self.ignored, key) else None


@cache
def table() -> Table:
    """The packaged table."""
    data = read_mapping(packaged("configs/llamafactory/keys.yaml"), "table of keys")
    rows = {
        kind: tuple((key, group["reason"]) for group in data[kind] for key in group["keys"].split())
        for kind in ("refused", "ignored")
    }
    return Table(data["spellings"], data["translated"], rows["refused"], rows["ignored"])


def spelling(key: str) -> str:
    """Our name of a key."""
    return table().spellings.get(key, key)


def asks_nothing(key: str, value: Any) -> bool:
    """Whether a value switches a feature off (false, null, zero, "no") or asks for what is done anyway."""
    return value in (None, False, "no", "off", "none") or (key in _DONE_ANYWAY and value == _DONE_ANYWAY[key])


def refused(key: str) -> str | None:
    """The reason why a foreign key is refused, or None."""
    return _match(table().refused, key)


def ignored(key: str) -> str | None:
    """The reason why a foreign key may be ignored, or None."""
    return _match(table().ignored, key)


def translated(key: str, value: Any) -> tuple[dict[str, Any], str] | None:
    """What a key with this value is in our keys, and a note (or ""); None of a key that is not translated.

    ValueError, with a text for the user, of a value that is not supported.
    """
    if key not in table().translated:
        return None
    if key == "pure_bf16":
        return {"bf16": value}, "taken as bf16: true: the model is in bf16, and DeepSpeed updates it in fp32"
    if key == "train_sampling_strategy":
        if value != "group_by_length":
            raise ValueError(f"expected random or group_by_length, got {shown(value)}")
        return {"group_by_length": True}, ""
    if not isinstance(value, Mapping) or set(value) - {"use_reentrant"}:
        raise ValueError(f"expected a mapping of use_reentrant alone, got {value if value else shown(value)}")
    return {"use_reentrant_gc": value["use_reentrant"]} if value else {}, ""


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


def _match(rows: tuple[tuple[str, str], ...], key: str) -> str | None:
    for pattern, reason in rows:
        if fnmatchcase(key, pattern):
            return reason
    return None
