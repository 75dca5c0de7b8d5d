"""The registry: names, how a component gets its arguments, and the text of every refusal."""

from __future__ import annotations

from typing import Any

import pytest

from dataflex.core.registry import KINDS, REGISTRY, Registry
from dataflex.utils.errors import UserError


class Plain:
    """A component with one required and one optional param of its own."""

    def __init__(self, dataset: Any, depth: int | None, focus: str = "high", *, cache_dir: str = "") -> None:
        self.got = {"dataset": dataset, "depth": depth, "focus": focus, "cache_dir": cache_dir}


class Greedy:
    """A component that takes any keyword."""

    def __init__(self, depth: int = 1, **kwargs: Any) -> None:
        self.got = {"depth": depth, **kwargs}


RUNTIME = {"dataset": "POOL", "cache_dir": "RUN/cache", "tokenizer": "TOKENIZER"}


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.register("selector", "plain")(Plain)
    made.register("selector", "greedy")(Greedy)
    return made


def build(registry: Registry, name: str, **cfg: Any) -> dict[str, Any]:
    got: dict[str, Any] = registry.build("selector", name, runtime=RUNTIME, cfg=cfg).got
    return got


def test_params_reach_init_by_name_with_the_runtime_objects_it_names(registry: Registry) -> None:
    assert build(registry, "plain", depth=3) == {
        "dataset": "POOL",
        "depth": 3,
        "focus": "high",
        "cache_dir": "RUN/cache",
    }


def test_the_effective_params_are_the_given_ones_and_the_defaults_of_the_rest(registry: Registry) -> None:
    assert registry.effective("selector", "plain", {"depth": 3}, RUNTIME) == {"depth": 3, "focus": "high"}
    assert registry.effective("selector", "plain", {"focus": None}, ()) == {"focus": None, "cache_dir": ""}
    assert registry.effective("selector", "greedy", {"more": [1]}, RUNTIME) == {"depth": 1, "more": [1]}


def test_runtime_objects_that_init_does_not_name_are_not_passed(registry: Registry) -> None:
    assert build(registry, "greedy", depth=2) == {"depth": 2}


def test_a_param_wins_over_the_runtime_object_and_null_leaves_it(registry: Registry) -> None:
    assert build(registry, "plain", depth=1, cache_dir="mine")["cache_dir"] == "mine"
    assert build(registry, "plain", depth=1, cache_dir=None)["cache_dir"] == "RUN/cache"


def test_null_for_a_param_of_its_own_is_none(registry: Registry) -> None:
    assert build(registry, "plain", depth=None)["depth"] is None


class Typed:
    """Params of the kinds that YAML has."""

    def __init__(
        self,
        on: bool = False,
        count: int = 1,
        share: float | None = 0.5,
        names: Any = (),
        late: int = None,  # type: ignore[assignment]
    ) -> None:
        self.got = {"on": on, "count": count, "share": share, "names": names, "late": late}


def test_a_value_of_another_kind_than_the_param_is_refused(registry: Registry) -> None:
    registry.register("selector", "typed")(Typed)
    right: dict[str, Any] = {"on": True, "count": 3, "share": 1, "names": "x", "late": None}
    assert build(registry, "typed", **right) == right
    assert build(registry, "typed", share=None, late=2)["late"] == 2
    wrong: list[tuple[str, Any, str]] = [
        ("on", "no", "expected true or false, got 'no'"),  # YAML 1.2 has no as text, and text is true in Python
        ("on", 0, "expected true or false, got 0"),
        ("on", None, "expected true or false, got None"),
        ("count", 2.0, "expected a whole number, got 2.0"),
        ("count", True, "expected a whole number, got True"),
        ("share", "0.5", "expected a number or null, got '0.5'"),
        ("share", [0.5], "expected a number or null, got [0.5]"),
        ("share", False, "expected a number or null, got False"),
    ]
    for key, value, text in wrong:
        with pytest.raises(UserError) as failure:
            build(registry, "typed", **{key: value})
        assert str(failure.value) == f"components: selector 'typed': {key}: {text}"


def test_a_component_without_params(registry: Registry) -> None:
    class Bare:
        pass

    registry.register("selector", "bare")(Bare)
    assert isinstance(registry.build("selector", "bare", runtime=RUNTIME, cfg=None), Bare)
    with pytest.raises(UserError, match="selector 'bare': unknown param 'depth'; valid: none"):
        build(registry, "bare", depth=1)


def test_an_inherited_init_is_read(registry: Registry) -> None:
    class Child(Plain):
        pass

    registry.register("selector", "child")(Child)
    assert build(registry, "child", depth=4)["depth"] == 4


def test_unknown_params_are_refused_with_the_nearest_match(registry: Registry) -> None:
    with pytest.raises(UserError) as failure:
        build(registry, "plain", depth=1, fokus="low")
    assert str(failure.value) == (
        "components: selector 'plain': unknown param 'fokus' (did you mean 'focus'?); valid: depth, focus"
    )


def test_a_missing_param_is_refused(registry: Registry) -> None:
    with pytest.raises(UserError) as failure:
        build(registry, "plain", focus="low")
    assert str(failure.value) == "components: selector 'plain': missing param 'depth'; set it under params"


def test_a_class_with_kwargs_gets_every_param(registry: Registry) -> None:
    assert build(registry, "greedy", depth=2, anything="goes") == {"depth": 2, "anything": "goes"}


def test_unknown_names_list_the_known_ones(registry: Registry) -> None:
    with pytest.raises(UserError) as failure:
        registry.get("selector", "plane")
    assert str(failure.value) == (
        "component_name: no selector 'plane' (did you mean 'plain'?); registered: greedy, plain"
    )


def test_kinds_have_tables_of_their_own(registry: Registry) -> None:
    registry.register("mixer", "plain")(Greedy)
    assert registry.get("mixer", "plain") is Greedy and registry.get("selector", "plain") is Plain


@pytest.mark.parametrize("name", ["", "Less", "my-selector", "1st", "a b", "_x", "naïve", "x\n"])
def test_odd_names_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(UserError, match="use lower-case letters, digits and '_'"):
        registry.register("selector", name)


def test_duplicates_are_refused(registry: Registry) -> None:
    with pytest.raises(UserError, match=r"selector 'plain' is already registered by tests.core.test_registry.Plain"):
        registry.register("selector", "plain")(Greedy)
    assert registry.get("selector", "plain") is Plain


def test_the_same_class_may_register_again_as_a_reimport_does(registry: Registry) -> None:
    again = type("Plain", (Plain,), {"__module__": Plain.__module__, "__qualname__": Plain.__qualname__})
    registry.register("selector", "plain")(again)
    assert registry.get("selector", "plain") is again


def packaged(name: str) -> type:
    return type(name, (), {"__module__": "dataflex.train.selector.custom_selector", "__qualname__": name})


def test_own_code_may_take_the_name_of_a_packaged_component_and_that_is_said(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.register("selector", "custom")(packaged("CustomSelector"))
    registry.register("selector", "custom")(Greedy)
    assert registry.get("selector", "custom") is Greedy
    said = capsys.readouterr().err
    assert "selector 'custom': tests.core.test_registry.Greedy replaces" in said
    assert "dataflex.train.selector.custom_selector.CustomSelector" in said


def test_a_packaged_component_does_not_replace_another(registry: Registry) -> None:
    registry.register("selector", "custom")(packaged("CustomSelector"))
    with pytest.raises(UserError, match="'custom' is already registered by dataflex.train"):
        registry.register("selector", "custom")(packaged("Another"))


def test_a_packaged_component_does_not_replace_own_code(registry: Registry) -> None:
    with pytest.raises(UserError, match="'plain' is already registered by tests"):
        registry.register("selector", "plain")(packaged("CustomSelector"))


def test_registering_returns_the_class_itself() -> None:
    registry = Registry()
    assert registry.register("mixer", "greedy")(Greedy) is Greedy
    assert registry.names("mixer") == ["greedy"]


def test_every_packaged_component_is_registered_under_its_kind() -> None:
    from dataflex.train.trainer.components import load_components

    load_components()
    for kind in KINDS:
        modules = [REGISTRY.get(kind, name).__module__ for name in REGISTRY.names(kind)]
        packaged = [module for module in modules if module.startswith("dataflex.")]  # tests register others
        assert packaged and all(module.startswith(f"dataflex.train.{kind}.") for module in packaged)


def test_a_class_that_checks_its_params_is_asked_before_it_is_built(registry: Registry) -> None:
    class Deep(Plain):
        @classmethod
        def check_values(cls, params: Any) -> None:
            assert params == {"depth": 9, "focus": "high"}, "its defaults are among them"
            raise UserError("depth: too deep")

    class Deeper(Deep):
        def __init__(self, **own: Any) -> None: ...

    registry.register("selector", "deep")(Deep)
    registry.register("selector", "deeper")(Deeper)
    with pytest.raises(UserError, match="^depth: too deep$"):
        registry.check("selector", "deep", {"depth": 9, "cache_dir": None}, RUNTIME)
    registry.check("selector", "deeper", {"depth": 9}, RUNTIME)  # whose params are others
    with pytest.raises(UserError, match=r"unknown param 'dep' \(did you mean 'depth'\?\); valid: depth, focus$"):
        registry.check("selector", "deep", {"dep": 9}, RUNTIME)
