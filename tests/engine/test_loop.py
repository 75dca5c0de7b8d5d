"""The loop and its step on tensors of the test's own, without an engine: what is multiplied, divided and begun anew."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataflex.core.clock import Clock
from dataflex.core.hook import Planner, Weigher
from dataflex.core.plan import Phase, Plan, epoch_schedule, group_by_length
from dataflex.engine.steps.contributions import step_denominator
from dataflex.engine.steps.loop import Loop, Stepper
from dataflex.engine.steps.skip import NonFinite
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.stopping import Stop

VOCABULARY, ROWS, TOKENS = 5, 2, 3
LABELS = torch.tensor([1, 4, -100, -100, 2, -100])  # two tokens count, then one


def micro(weights: torch.Tensor | None = None) -> Any:
    return SimpleNamespace(
        inputs={},
        labels=LABELS,
        cu_seqlens=torch.tensor([0, 3, 6]),
        counts=torch.tensor([2, 1]),
        sample_ids=np.arange(ROWS),
        weights=weights,
        token_weights=None,
    )


class Answers(Weigher):
    def __init__(self, answer: torch.Tensor | None) -> None:
        self.answer = answer

    def weigh(self, run: Any, micro: Any, losses: Any, outputs: Any) -> Any:
        return self.answer


class Logits:
    """Stands in for an engine: a step changes nothing."""

    def __init__(self) -> None:
        self.logits = torch.randn(ROWS, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1))

    def __call__(self) -> torch.Tensor:
        return self.logits.clone().requires_grad_()

    def train(self) -> None:
        pass

    def losses(self) -> list[float]:
        each = F.cross_entropy(self.logits.double().flatten(0, 1), LABELS, reduction="none").view(ROWS, TOKENS)
        return [float(each[0].sum() / 2), float(each[1].sum())]


def loss_of(
    own: torch.Tensor | None, *answers: torch.Tensor | None, normalization: str = "mean", world_size: int = 1
) -> tuple[float, Any]:
    """The loss for the backward of the first of three micro-batches, and the stand-in that made its logits."""
    engine = Logits()
    run: Any = SimpleNamespace(world_size=world_size, accumulation=3, step=0, total_steps=1)
    stepper = Stepper(engine, run, [Answers(answer) for answer in answers], normalization)
    batch: Any = SimpleNamespace(micro_batches=[micro(own) for _ in range(3)], sample_ids=np.arange(6))
    stepper.start(batch)
    return stepper.forward(batch.micro_batches[0]).item(), engine


def test_all_weights_are_multiplied() -> None:
    own, first, second = torch.tensor([0.5, 3.0]), torch.tensor([2.0, 0.25]), torch.tensor([1.0, 4.0])
    loss, engine = loss_of(own, first, None, second)
    a, b = engine.losses()
    # Six samples in the window of three micro-batches, whose mean is the loss.
    assert loss == pytest.approx(3 * (0.5 * 2 * 1 * a + 3 * 0.25 * 4 * b) / 6, rel=1e-5)


@pytest.mark.parametrize(("normalization", "divisor"), [("mean", 6.0), ("tokens", 9.0), ("sum_weights", 3 * 3.5)])
def test_one_denominator_of_the_whole_window(normalization: str, divisor: float) -> None:
    loss, engine = loss_of(torch.tensor([0.5, 3.0]), normalization=normalization)
    a, b = engine.losses()
    numerator = 0.5 * 2 * a + 3 * b if normalization == "tokens" else 0.5 * a + 3 * b
    assert loss == pytest.approx(3 * numerator / divisor, rel=1e-5)


@pytest.mark.parametrize(("normalization", "collectives", "divisor"), [("mean", 0, 4.0), ("tokens", 1, 12.0)])
def test_a_mean_over_samples_is_divided_by_what_the_plan_says_without_a_collective(
    normalization: str, collectives: int, divisor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank has as many tokens in its micro-batches; the plan has four samples for both."""
    calls: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: calls.append(tensor) or 2 * tensor)
    batch: Any = SimpleNamespace(micro_batches=[micro(), micro()], sample_ids=np.arange(4))
    assert step_denominator(batch, normalization).item() == divisor
    assert len(calls) == collectives


def test_a_weighters_own_loss_goes_back_as_it_is() -> None:
    """Its mean over micro-batches and ranks is the step's loss, whatever the accumulation."""
    own = torch.tensor(7.5, requires_grad=True)
    for world_size in (1, 2):
        assert loss_of(None, own, world_size=world_size)[0] == pytest.approx(7.5)


class Stepping(Logits):
    """Counts its steps and those of its schedule; ``overflows``: DeepSpeed leaves the update out."""

    def __init__(self, overflows: bool) -> None:
        super().__init__()
        self.optimizer = SimpleNamespace(overflow=overflows)
        self.lr_scheduler = SimpleNamespace(step=lambda: self.moved.append("schedule"))
        self.moved: list[str] = []

    def fp16_enabled(self) -> bool:
        return False

    def step(self) -> None:
        self.moved.append("step")


def stepped(overflows: bool, in_a_row: int) -> tuple[Stepping, Stepper]:
    """After one micro-batch, whose step is the third in a row that is not finite, where it is not."""
    engine = Stepping(overflows)
    run: Any = SimpleNamespace(world_size=1, accumulation=1, step=0, total_steps=9, stop=Stop())
    stepper = Stepper(engine, run, [], "mean", nonfinite=NonFinite("skip", 2, in_a_row))
    batch: Any = SimpleNamespace(micro_batches=[micro()], sample_ids=np.arange(2))
    stepper.start(batch)
    stepper.forward(batch.micro_batches[0])
    stepper.take_step(batch)
    return engine, stepper


def test_an_update_that_deepspeed_left_out_moves_the_schedule_and_counts() -> None:
    engine, stepper = stepped(overflows=True, in_a_row=1)
    assert engine.moved == ["step", "schedule"] and math.isnan(stepper.loss) and stepper.nonfinite.in_a_row == 2
    with pytest.raises(UserError, match="step 1: .* not finite, and 2 steps before it were skipped"):
        stepped(overflows=True, in_a_row=2)


def test_a_good_step_ends_the_row_of_bad_ones() -> None:
    engine, stepper = stepped(overflows=False, in_a_row=2)
    assert engine.moved == ["step"] and stepper.nonfinite.in_a_row == 0
    assert stepper.loss == pytest.approx(sum(engine.losses()) / 2, rel=1e-5)


class SamePlan(Planner):
    def plan(self, run: Any, phase: Phase) -> Plan:
        return Plan(np.arange(phase.steps * run.global_batch), np.ones(phase.steps * run.global_batch))


def test_every_phase_is_grouped_by_a_draw_of_its_own_and_figures_begin_anew() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 24)
    schedule = epoch_schedule(12, 6)
    pool = SimpleNamespace(lengths=lengths)
    run: Any = SimpleNamespace(
        schedule=schedule, seed=3, global_batch=4, pool=pool, clock=Clock(), step=0, figures={"old": 1.0}
    )
    stepper: Any = SimpleNamespace(start=lambda batch: None)
    loop = Loop(run, [SamePlan()], None, stepper, grouped=True)  # type: ignore[arg-type]
    made = []
    for phase in schedule.phases:
        run.step = phase.start
        loop._make_plan()
        assert loop.plan is not None
        made.append(loop.plan.sample_ids.tolist())
        plain = SamePlan().plan(run, phase)
        assert made[-1] == group_by_length(plain, lengths, 4, 3, phase.index).sample_ids.tolist()
    assert made[0] != made[1]
    loop.begin(SimpleNamespace())  # type: ignore[arg-type]
    assert run.figures == {}


def test_what_counts_as_trained_by_each_kind_of_weight() -> None:
    """Of two samples with labels 1, 2 and 2: something counts unless every token, class or sample weighs 0."""
    micro: Any = SimpleNamespace(
        labels=torch.tensor([1, 2, 2, -100]), token_weights=None, cu_seqlens=torch.tensor([0, 2, 4])
    )

    def counts(of_class: Any = None, samples: Any = None, tokens: Any = None, by_token: Any = None) -> bool:
        as_tensor = lambda values: None if values is None else torch.tensor(values)  # noqa: E731
        stepper: Any = SimpleNamespace(class_weight=as_tensor(of_class))
        micro.token_weights = as_tensor(tokens)
        return bool(Stepper._counting(stepper, micro, as_tensor(samples), as_tensor(by_token)))

    assert counts()
    assert counts([9.0, 0.0, 0.5]) and counts([0.0, 1.0, 0.0]) and not counts([9.0, 0.0, 0.0])
    assert counts(samples=[0.0, 1.0]) and not counts(samples=[0.0, 0.0])
    assert not counts([9.0, 1.0, 0.0], samples=[0.0, 1.0]), "the sample that counts has no label of weight"
    assert counts(tokens=[0.0, 0.0, 1.0, 0.0]) and not counts(tokens=[0.0, 0.0, 0.0, 1.0])
    assert counts(by_token=[1.0, 0.0, 0.0, 0.0]) and not counts(by_token=[0.0, 0.0, 0.0, 1.0])
