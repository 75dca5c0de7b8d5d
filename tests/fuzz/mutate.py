"""Small data files of every type, and damage done to them at random."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet

ALPACA = [{"instruction": f"say {i}", "input": "Größe" * (i % 2), "output": f"{i}" * 3, "w": i / 2} for i in range(7)]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": f"{i}?", "tool_calls": None},
            {"role": "assistant", "content": "so", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ]
    }
    for i in range(5)
]
PIECES = [
    *(
        b"\x00",
        b"\xff\xff\xff\xff",
        b"\xff\xff\xff\x7f",
        b"[",
        b"{",
        b'"',
        b"\\ud800",
        b"null",
        b"1e999",
        b"\n",
        b",",
        b"NaN",
    ),
    *(
        b"[" * 3000,
        b"9" * 5000,
        b"\xed\xa0\x80",
        b"PAR1",
        b"ARROW1",
        b"\x80\x04\x95",
        b"cos\nsystem\n",
        b"\xef\xbb\xbf",
    ),
]


def _csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _parquet(rows: list[dict[str, Any]], **how: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out, row_group_size=3, **how)
    return out.getvalue()


def _arrow(rows: list[dict[str, Any]], new: Callable[..., Any] = pa.ipc.new_stream, **how: Any) -> bytes:
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    if how.pop("dictionary", False):
        table = table.set_column(0, "instruction", table["instruction"].dictionary_encode())
    with new(out, table.schema, **how) as writer:
        writer.write_table(table, max_chunksize=3)
    return out.getvalue()


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


WHOLE: list[tuple[str, str, bytes]] = [
    (".json", "alpaca", json.dumps(ALPACA).encode()),
    (".json", "openai", json.dumps(MESSAGES, indent=1).encode()),
    (".jsonl", "alpaca", _jsonl(ALPACA)),
    (".jsonl", "openai", _jsonl(MESSAGES)),
    (".csv", "alpaca", _csv(ALPACA)),
    (".parquet", "alpaca", _parquet(ALPACA)),
    (".parquet", "openai", _parquet(MESSAGES, compression="none")),
    (".arrow", "alpaca", _arrow(ALPACA)),
    (".arrow", "openai", _arrow(MESSAGES)),
    (".arrow", "alpaca", _arrow(ALPACA, pa.ipc.new_file)),
    (".arrow", "alpaca", _arrow(ALPACA, dictionary=True)),
    (".arrow", "openai", _arrow(MESSAGES, options=pa.ipc.IpcWriteOptions(compression="lz4"))),
]
"""(suffix, formatting, content)"""


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to four of: flip a bit, set a byte, cut the end, drop, double or move a part, put a piece in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(len(data)) if data else 0
        length = rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(8):
            case 0 | 1 | 2 if data:
                data[place] ^= 1 << rng.randrange(8)
            case 3 if data:
                data[place] = rng.randrange(256)
            case 4:
                del data[place:]
            case 5:
                del data[place : place + length]
            case 6:
                data[place:place] = data[rng.randrange(len(data)) :][:length] if data else b""
            case _:
                data[place : place + rng.choice((0, length))] = rng.choice(PIECES)
    return bytes(data)
