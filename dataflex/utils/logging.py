"""`logger`: prints on rank 0 only, with no configuration of the root logger."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO


class _MainRankOnly(logging.Filter):
    """Passes every warning of rank 0 and only errors of the other ranks."""

    def filter(self, record: logging.LogRecord) -> bool:
        return os.environ.get("RANK", "0") == "0" or record.levelno >= logging.ERROR


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the time, so that redirection and capture work."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _make_logger() -> logging.Logger:
    log = logging.getLogger("dataflex")
    if not log.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(_MainRankOnly())
        log.addHandler(handler)
        log.setLevel(os.environ.get("DATAFLEX_LOG_LEVEL", "INFO").upper())
        log.propagate = False
    return log


logger = _make_logger()
