"""A row for every param of every component: what components.yaml asks for is what the component does."""

from __future__ import annotations

from typing import Any

import pytest

from dataflex.core.registry import KINDS, REGISTRY
from dataflex.train.trainer.components import RUNTIME, load_components
from dataflex.utils.errors import UserError
from tests.asked.params import COMPONENTS, Asked, Component
from tests.asked.test_keys import same
from tests.distributed import run_ranks

# The only value there is.
ONE_VALUE = {("weighter", "custom", "strategy"): "uniform"}
ROWS = [(one, at, row) for one in COMPONENTS for at, row in enumerate(one.rows)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("params")
    facts: dict[str, Any] = run_ranks("tests.asked.params:facts", 1, folder=str(folder))[0]
    return facts


@pytest.mark.parametrize(("one", "at", "row"), ROWS, ids=[f"{one.id}-{row.name}" for one, _, row in ROWS])
def test_what_is_asked_is_what_the_component_does(found: dict[str, Any], one: Component, at: int, row: Asked) -> None:
    fact = found[one.id][at]
    assert same(fact, row.right), f"{row.name}: {row.value!r} made {fact}, expected {row.right}"


def test_every_param_has_a_row_that_does_not_ask_for_the_default() -> None:
    load_components()
    asked = {(one.kind, one.name, row.name): row.value for one, _, row in ROWS} | ONE_VALUE
    packaged = [
        (k, n) for k in KINDS for n in REGISTRY.names(k) if REGISTRY.get(k, n).__module__.startswith("dataflex.")
    ]
    defaults = {(k, n, name): v for k, n in packaged for name, v in REGISTRY.effective(k, n, {}, RUNTIME).items()}
    assert asked.keys() == defaults.keys()
    assert [key for key in asked.keys() - ONE_VALUE.keys() if asked[key] == defaults[key]] == []


@pytest.mark.parametrize(("kind", "name", "param"), ONE_VALUE)
def test_a_param_of_one_value_takes_no_other(kind: str, name: str, param: str) -> None:
    load_components()
    with pytest.raises(UserError, match=f"{param}: 'other'; valid: {ONE_VALUE[kind, name, param]}"):
        REGISTRY.build(kind, name, runtime={}, cfg={param: "other"})
