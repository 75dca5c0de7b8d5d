"""`dataflex-cli export`: a model with its adapter merged, in one process and without an engine."""

from __future__ import annotations

from pathlib import Path

from dataflex.config import Config
from dataflex.config.rules.commands import with_trained_weights
from dataflex.driver.setup import with_packaged_model
from dataflex.engine.folder import own_files
from dataflex.engine.models.merge import merge
from dataflex.report.model_card import merged_card
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger


def export_model(cfg: Config) -> None:
    """Write the model of ``cfg`` to export_dir: that of a finished run where output_dir holds one.

    UserError where export_dir is a folder that the model or the adapter is read from.
    """
    base = cfg.model.model_name_or_path
    cfg = with_packaged_model(cfg if cfg.model.adapter_name_or_path else with_trained_weights(cfg))
    if cfg.method.finetuning_type != "lora" and cfg.model.adapter_name_or_path is not None:
        raise UserError("adapter_name_or_path: needs finetuning_type: lora")
    if cfg.model.train_from_scratch:
        raise UserError("train_from_scratch: the weights below the adapter were random, and no file holds them")
    folder = Path(cfg.export.export_dir or "").expanduser()
    for key in ("model_name_or_path", "adapter_name_or_path"):
        source = getattr(cfg.model, key)
        if source and Path(source).resolve() == folder.resolve():
            raise UserError(f"export_dir: {folder} is also {key}, which would be written over")
    adapter = cfg.model.adapter_name_or_path
    logger.info(f"model: {cfg.model.model_name_or_path}" + (f", adapter: {adapter}" if adapter else ""))
    dtype, given = merge(cfg, folder)
    own_files.write(folder / own_files.CARD, merged_card(cfg, base, dtype, given.tokenizer.chat_template is not None))
    files = sorted(folder.glob("*.safetensors"))
    gb = sum(path.stat().st_size for path in files) / 1e9
    logger.info(f"exported {gb:.3g} GB in {len(files)} file{'s' * (len(files) != 1)} of {dtype}: {folder}")
