"""What the ranks run for test_score.py and test_embed.py: training, scoring and embedding, in one process group."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from dataflex.config import load_config
from dataflex.driver.embedding import embed
from dataflex.driver.scoring import score
from dataflex.driver.training import train
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

COMMANDS = {"train": train, "score": score, "embed": embed}


def in_turn(folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """{name: (command, flat keys)} -> {name: what was said, or the error}."""
    from dataflex.utils import dist

    said: dict[str, Any] = {}
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    for name, (command, keys) in cases.items():
        path = Path(folder, f"{name.replace(' ', '_')}_{dist.rank()}.yaml")
        path.write_text(yaml.safe_dump(keys))
        lines.clear()
        try:
            COMMANDS[command](load_config(path, quiet=True))
            said[name] = list(lines)
        except UserError as error:
            said[name] = str(error)
        dist.barrier()
    return said
