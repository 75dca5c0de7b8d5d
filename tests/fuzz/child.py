"""Reads the data files of a folder one after the other, as a run would: `python -m tests.fuzz.child FOLDER FIRST`.

Says each file's number on stdout before it is read; anything but a good end and a UserError ends the process.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import read_dataset_infos
from dataflex.data.sources.read import Cursor, list_files
from dataflex.data.sources.source import check_table, rows_of_file
from dataflex.utils.errors import UserError

SECONDS_EACH = 20


def read(folder: Path, name: str) -> int:
    """The rows of a dataset; UserError for what cannot be used."""
    (info,) = read_dataset_infos([name], folder)
    alpaca = info.formatting == "alpaca"
    converter = Converter(info, "sft", "w" if alpaca else None, None, "output" if alpaca else None)
    rows = 0
    for path in list_files(info.path or folder):
        check_table(path, converter)
        rows += sum(1 for _ in rows_of_file(path, converter, Cursor(), {}))
    return rows


def main() -> None:
    folder, first = Path(sys.argv[1]), int(sys.argv[2])
    names = list(json.loads((folder / "dataset_info.json").read_text()))
    for number, name in enumerate(names[first:], start=first):
        print(number, flush=True)
        signal.alarm(SECONDS_EACH)
        try:
            read(folder, name)
        except UserError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) <= 2000, text
            text.encode("utf-8")
    signal.alarm(0)
    print("done", flush=True)


if __name__ == "__main__":
    main()
