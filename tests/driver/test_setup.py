"""What a command makes of its config before anything is read."""

from __future__ import annotations

import pytest

from dataflex.config import load_config
from dataflex.driver import setup


@pytest.mark.parametrize(("installed", "used"), [(False, "sdpa"), (True, "fa2")])
def test_without_its_package_fa2_is_sdpa(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], installed: bool, used: str
) -> None:
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: object() if installed else None)
    keys = {"model_name_or_path": "org/m", "dataset": "a", "output_dir": "out", "flash_attn": "fa2"}
    assert setup.with_components(load_config(keys, quiet=True)).model.flash_attn == used
    assert capfd.readouterr().err.count("flash_attn: fa2 needs the package flash_attn") == (not installed)
