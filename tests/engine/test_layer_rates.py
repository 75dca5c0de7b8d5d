"""Learning rates by layer: parameter groups, matched by whole parts of names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dataflex.config.schema import TrainSection
from dataflex.engine.optimizer import lr_multipliers, make_optimizer, make_scheduler
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny

NAMES = ["model.embed.weight", "model.layers.1.q.weight", "model.layers.10.q.weight", "model.layers.10.v.bias"]


def test_patterns_match_whole_parts_and_multiply() -> None:
    assert list(lr_multipliers(NAMES, {"layers.1": 0.5}).values()) == [1.0, 0.5, 1.0, 1.0]
    assert list(lr_multipliers(NAMES, {"layers.*": 0.5, "q": 0.1}).values()) == [1.0, 0.05, 0.05, 0.5]
    assert list(lr_multipliers(NAMES, {"layers.1*.v": 3, "model": 2}).values()) == [2.0, 2.0, 2.0, 6.0]
    with pytest.raises(UserError, match=r"'layer.1' matches no trained parameter \(did you mean 'layers.1'\?\); one"):
        lr_multipliers(NAMES, {"layer.1": 2})


def settings(**more: Any) -> TrainSection:
    return TrainSection(optim="sgd", learning_rate=0.5, weight_decay=0.25, lr_scheduler_type="linear", **more)


def test_each_parameter_moves_at_its_layers_rate() -> None:
    net = tiny.model()
    optimizer = make_optimizer(net, settings(layer_lr_multipliers={"layers.0": 0.1, "embed_tokens": 0}))
    scheduler = make_scheduler(optimizer, settings(), total_steps=4)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    for name, parameter in net.named_parameters():
        factor = 0.1 if ".layers.0." in name else 0.0 if "embed_tokens" in name else 1.0
        decay = 0.0 if "norm" in name else 0.25
        want = before[name] - 0.5 * factor * (1 + decay * before[name])
        torch.testing.assert_close(parameter.detach(), want, msg=name)
    assert sorted({round(group["lr"], 6) for group in optimizer.param_groups}) == [0.0, 0.0375, 0.375]
    assert optimizer.param_groups[0]["lr"] == 0.375, "the log shows the first group's"


def test_without_multipliers_the_groups_are_those_of_before() -> None:
    groups = make_optimizer(tiny.model(), settings()).param_groups
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [(0.25, 0.5), (0.0, 0.5)]
