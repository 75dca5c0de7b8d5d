"""The keys of an adapter that a run goes on training: they are the adapter's own, whatever the defaults are."""

from __future__ import annotations

from typing import Any

from dataflex.config import Config
from dataflex.utils.errors import UserError, brief
from dataflex.utils.logging import logger


def with_adapter_keys(cfg: Config) -> Config:
    """``cfg`` with the rank, alpha, dropout and targets of the LoRA adapter at adapter_name_or_path, if it names one.

    UserError for a key that is given beside it and says something else.
    """
    source, method = cfg.model.adapter_name_or_path, cfg.method
    if source is None or method.finetuning_type != "lora":
        return cfg
    own = _keys_of(source)
    given = {key: getattr(method, key) for key in own if key in method.model_fields_set}
    if given.get("lora_target") == ("all",):
        logger.info(f"lora_target: those of the adapter: {', '.join(own['lora_target'])}")
        del given["lora_target"]
    wrong = [key for key, value in given.items() if _plain(value) != _plain(own[key])]
    if wrong:
        said = "; ".join(f"{key}: {_plain(given[key])}, but the adapter has {_plain(own[key])}" for key in wrong)
        raise UserError(f"{said} (adapter_name_or_path: '{source}'): drop the key, or start a new adapter")
    return cfg.model_copy(update={"method": method.model_copy(update=own)})


def read_adapter_config(source: str) -> Any:
    """The peft config of the adapter at ``source``, of whatever content its file is. UserError where there is none."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(source)
    except Exception as exc:
        raise UserError(f"adapter_name_or_path: no fitting adapter at '{source}': {brief(exc)}") from exc


def _keys_of(source: str) -> dict[str, Any]:
    """Our keys for what the adapter's config says; none where it is not a LoRA adapter."""
    from peft import LoraConfig

    config = read_adapter_config(source)
    if not isinstance(config, LoraConfig):
        return {}
    targets = config.target_modules or ()
    return {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        "additional_target": tuple(sorted(config.modules_to_save or ())),
    }


def _plain(value: Any) -> Any:
    return ", ".join(sorted(value)) or "none" if isinstance(value, tuple) else value
