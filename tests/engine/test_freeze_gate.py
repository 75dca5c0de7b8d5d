"""freeze_gate: routers of a mixture of experts stay as they are; gate_proj and the experts train."""

from __future__ import annotations

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from dataflex.engine.models.model import freeze_routers
from dataflex.utils.errors import UserError
from tests.tiny import tiny_llama


def test_only_routers_are_frozen() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    freeze_routers(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 and all(name.endswith("gate.weight") for name in frozen), frozen


def test_a_dense_model_has_none() -> None:
    with pytest.raises(UserError, match="freeze_gate: the model has no router"):
        freeze_routers(tiny_llama())
