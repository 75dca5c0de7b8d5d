"""finetuning_type freeze: which layers train, and what outside of them."""

from __future__ import annotations

from typing import Any

import pytest

from dataflex.config.schema import MethodSection
from dataflex.engine.models.model import _freeze
from dataflex.utils.errors import UserError
from tests import families


def trained(net: Any, **keys: Any) -> set[str]:
    _freeze(net, MethodSection.model_validate({"finetuning_type": "freeze", **keys}))
    return {name for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("asked", "layers"), [(1, {1}), (2, {0, 1}), (-1, {0}), (-2, {0, 1})])
def test_layers_are_counted_from_the_end_or_from_the_start(asked: int, layers: set[int]) -> None:
    net = families.model("llama")
    names = {name for name, _ in net.named_parameters()}
    wanted = {name for name in names for layer in layers if f".layers.{layer}." in name}
    assert trained(net, freeze_trainable_layers=asked) == wanted
    with pytest.raises(UserError, match=f"freeze_trainable_layers: the model has 2 layers; got {3 * asked}"):
        trained(net, freeze_trainable_layers=3 * asked)


def test_extra_modules_are_those_outside_the_layers() -> None:
    """OPT's layers have a final_layer_norm of their own."""
    net = families.model("opt")
    names = {name for name, _ in net.named_parameters()}
    last = {name for name in names if ".layers.1." in name}
    extra = {f"model.decoder.final_layer_norm.{part}" for part in ("weight", "bias")}
    asked = {"freeze_trainable_layers": 1, "freeze_extra_modules": ["final_layer_norm"]}
    assert extra <= names and trained(net, **asked) == last | extra
    attention = {name for name in last if ".self_attn." in name}
    assert trained(net, **asked, freeze_trainable_modules=["self_attn"]) == attention | extra
    with pytest.raises(UserError, match="freeze_extra_modules: no 'final_norm' outside the layers .did you mean"):
        trained(net, freeze_trainable_layers=1, freeze_extra_modules=["final_norm"])
