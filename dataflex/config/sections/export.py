"""The section of the config for `dataflex-cli export`."""

from __future__ import annotations

from typing import Annotated, Literal

from dataflex.config.sections.fields import AboveZero, OptionalText, choice
from dataflex.config.sections.section import Section


class ExportSection(Section):
    """Where the merged model goes. export_size: GB of a file of weights. infer_dtype: auto keeps the weights' own."""

    export_dir: OptionalText = None
    export_size: AboveZero = 5.0
    infer_dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"], choice("auto", "float16", "bfloat16", "float32")
    ] = "auto"
