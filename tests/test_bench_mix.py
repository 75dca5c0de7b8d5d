"""The mixing benchmark runs on a small pool, its checks included; its figures mean nothing here."""

from __future__ import annotations

import importlib

import pytest

from tests.distributed import ROOT


def test_it_measures_both_ways_for_every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("bench_mix")
    rows = bench.measure(domains=10, samples=10_000, rounds=1)
    assert [row["phase"] for row in rows[::2]] == list(bench.PHASES)
    assert {row["implementation"] for row in rows} == {"dataflex", "permute whole domains"}
