"""What is read of the components' sources is what their classes take."""

from __future__ import annotations

import inspect

import pytest

from dataflex.core.registry import KINDS, REGISTRY
from dataflex.core.signatures import Unread, packaged
from dataflex.train.trainer.components import load_components


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_registered_is_found_with_its_params(kind: str) -> None:
    load_components()
    names = [name for name in REGISTRY.names(kind) if REGISTRY.get(kind, name).__module__.startswith("dataflex.")]
    assert sorted(packaged(kind)) == names
    for name in names:
        right = list(inspect.signature(REGISTRY.get(kind, name)).parameters.values())
        assert packaged(kind)[name] == right, name
        assert Unread not in [p.default for p in right]
