"""The hook between weighters and the loop, and what the weighters' base class does by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.train.trainer.weight_trainer import WeightHook
from dataflex.train.weighter.base_weighter import SampleWeighter, Weighter
from dataflex.utils.errors import UserError
from tests.train.test_planners import make_run


class Answer(Weighter):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def get_weighted_loss(self, losses: Any, *, ctx: Any = None, model: Any = None, inputs: Any = None) -> Any:
        return self.answer(losses)


class Weights(SampleWeighter):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def sample_weights(self, losses: Any, *, ctx: Any, model: Any, inputs: Any) -> Any:
        assert not losses.requires_grad and inputs["labels"].shape == (2, 3)
        return self.answer(losses)


def weigh(weighter: Weighter, step: int = 5) -> Any:
    segments = torch.tensor([0, 3, 6])
    labels = torch.zeros(2, 3, dtype=torch.int64)
    micro = SimpleNamespace(inputs={}, raw_labels=labels, cu_seqlens=segments, sample_ids=np.arange(2))
    given = SimpleNamespace(loss=torch.tensor([1.0, 3.0], requires_grad=True))
    return WeightHook(weighter, "mine", warmup_step=5).weigh(make_run(step=step), micro, given, None)


def test_a_weighter_is_not_asked_in_the_warm_up() -> None:
    assert weigh(Answer(lambda losses: 1 / 0), step=4) is None


def test_a_weighters_answer_is_passed_on() -> None:
    assert weigh(Answer(lambda losses: (losses * losses).mean())).item() == 5.0
    assert weigh(Weights(lambda losses: losses / 2)).tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("weighter", "text"),
    [
        (Answer(lambda losses: losses), r"weighter 'mine' at step 5: expected a scalar loss, got \(2,\)"),
        (Answer(lambda losses: 1.5), r"weighter 'mine' at step 5: expected a scalar loss, got float"),
        (Answer(lambda losses: None), r"weighter 'mine' at step 5: expected a scalar loss, got NoneType"),
        (
            Answer(lambda losses: losses.mean().detach()),
            r"weighter 'mine' at step 5: expected a scalar loss with gradient, got one without",
        ),
        (Weights(lambda losses: losses.mean()), r"weighter 'mine' at step 5: expected weights \[2\], got \(\)"),
        (Weights(lambda losses: [1, 1]), r"weighter 'mine' at step 5: expected weights \[2\], got list"),
    ],
)
def test_a_wrong_loss_or_weight_is_refused(weighter: Weighter, text: str) -> None:
    with pytest.raises(UserError, match=text):
        weigh(weighter)


def test_sample_weights_and_a_weighter_with_one_loss_do_not_go_together() -> None:
    run = make_run()
    for weighter, static in ((Weights(None), True), (Weights(None), False), (Answer(None), False)):
        WeightHook(weighter, "mine", 0, static).on_train_start(run)
    with pytest.raises(UserError, match="weighter 'mine': returns one loss for the batch, so the samples' own"):
        WeightHook(Answer(None), "mine", 0, static=True).on_train_start(run)


def test_a_weighters_own_training_step_is_forward_weighting_and_backward() -> None:
    """For loops of one's own, as the seeds' base class has it."""
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[-100, 1, 2, 3], [0, 4, -100, -100]])

    class Engine:
        def __call__(self, input_ids: Any) -> Any:
            return SimpleNamespace(logits=logits)

        def backward(self, loss: Any) -> None:
            loss.backward()

    losses = [
        torch.nn.functional.cross_entropy(logits[i, :-1], labels[i, 1:], ignore_index=-100).detach() for i in (0, 1)
    ]
    inputs = {"input_ids": labels.clamp(min=0), "labels": labels}
    loss = Answer(lambda x: x.max()).training_step(None, Engine(), inputs)
    assert not loss.requires_grad and torch.allclose(loss, torch.stack(losses).max())
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    unweighted = Answer(None).training_step(None, Engine(), inputs, use_weighter=False)
    assert torch.allclose(unweighted, torch.stack(losses).mean())


def test_an_unknown_param_of_a_weighter_is_refused_with_the_nearest_match() -> None:
    from dataflex.core.registry import REGISTRY
    from dataflex.train.trainer.components import load_components

    load_components()
    with pytest.raises(UserError) as failure:
        REGISTRY.build("weighter", "loss", runtime={}, cfg={"stratgy": "uniform"})
    assert str(failure.value) == (
        "LossWeighter: unknown param 'stratgy' (did you mean 'strategy'?); valid: strategy, delta, r_start, r_end"
    )
