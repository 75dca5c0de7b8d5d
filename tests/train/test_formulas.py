"""The components' pure functions against formulas and frequencies worked out here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.core.plan import generator
from dataflex.core.sampling import weighted_draw
from dataflex.scoring.decide.table import ArrayTable
from dataflex.scoring.gradients.cosines import cosines, exact_cosines, mean_unit_rows
from dataflex.train.mixer.mixture import MixtureManager
from dataflex.train.mixer.random_mixer import RandomMixer
from dataflex.train.mixer.static_mixer import StaticMixer
from dataflex.train.selector.less_selector import LessSelector
from dataflex.train.selector.loss_selector import LossSelector, bucket_weights
from dataflex.train.selector.random_selector import RandomSelector
from dataflex.train.weighter.loss_weighter import LossWeighter, loss_weights
from dataflex.utils.errors import UserError

LOSSES = [2.5, 0.5, 1.0, 3.5, 2.0, 0.75]


def weights_by_hand(losses: list[float], strategy: str, delta: float, r: float) -> list[float]:
    """Design section 8, one number at a time."""
    low, high = min(losses), max(losses)
    scaled = [delta * (2 * (x - low) / (high - low) - 1) for x in losses]
    shape = {
        "linupper": lambda h: min(h + delta, delta),
        "quadratic": lambda h: 1 - h * h / delta**2,
        "extremes": abs,
        "uniform": lambda h: 0.0,
    }[strategy]
    powers = [math.exp(shape(h) / r) for h in scaled]
    return [len(losses) * p / sum(powers) for p in powers]


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes", "uniform"])
@pytest.mark.parametrize(("delta", "r"), [(1.0, 2.0), (0.5, 0.25), (3.0, 1.0)])
def test_loss_weights_equal_the_formula(strategy: str, delta: float, r: float) -> None:
    want = torch.tensor(weights_by_hand(LOSSES, strategy, delta, r), dtype=torch.float64)
    exact = loss_weights(torch.tensor(LOSSES, dtype=torch.float64), strategy=strategy, delta=delta, r=r)
    torch.testing.assert_close(exact, want, rtol=1e-12, atol=0)
    single = loss_weights(torch.tensor(LOSSES), strategy=strategy, delta=delta, r=r)
    torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=0)
    assert float(single.mean()) == pytest.approx(1.0, abs=1e-6)


def test_what_each_strategy_favours() -> None:
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    by = {s: loss_weights(losses, strategy=s, delta=1.0, r=0.5).tolist() for s in ("linupper", "quadratic", "extremes")}
    assert by["linupper"][0] < by["linupper"][1] < by["linupper"][2] == by["linupper"][3] == by["linupper"][4]
    assert max(by["quadratic"]) == by["quadratic"][2]
    assert min(by["extremes"]) == by["extremes"][2]


@pytest.mark.parametrize("losses", [LOSSES, [1.0], [2.0, 2.0, 2.0]])
def test_uniform_weights_are_exactly_one(losses: list[float]) -> None:
    assert loss_weights(torch.tensor(losses), strategy="uniform", delta=1.0, r=0.1).tolist() == [1.0] * len(losses)


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
def test_equal_losses_get_equal_weights(strategy: str) -> None:
    assert loss_weights(torch.full((4,), 2.5), strategy=strategy, delta=1.0, r=0.5).tolist() == [1.0] * 4


def test_the_temperature_falls_over_the_run() -> None:
    weighter = LossWeighter("extremes", delta=1.0, r_start=2.0, r_end=0.5)
    for step, r in ((0, 2.0), (50, 1.25), (100, 0.5)):
        ctx = SimpleNamespace(step=step, total_steps=100)
        got = weighter.sample_weights(torch.tensor(LOSSES), ctx=ctx, model=None, inputs=None)
        torch.testing.assert_close(got, torch.tensor(weights_by_hand(LOSSES, "extremes", 1.0, r)), rtol=1e-5, atol=0)


def test_a_sample_weighters_scalar_loss_is_the_weighted_mean() -> None:
    losses = torch.tensor(LOSSES, requires_grad=True)
    ctx = SimpleNamespace(step=0, total_steps=1)
    loss = LossWeighter("linupper").get_weighted_loss(losses, ctx=ctx)
    want = torch.tensor(weights_by_hand(LOSSES, "linupper", 1.0, 2.0))
    torch.testing.assert_close(loss, (want * torch.tensor(LOSSES)).mean())
    loss.backward()
    torch.testing.assert_close(losses.grad, want / len(LOSSES))


def buckets(focus: str, **changes: Any) -> list[float]:
    losses = np.array([5.0, 1.0, 3.0, 9.0, 7.0, float("nan")])
    how = {"focus_weight": 4.0, "quantiles": (0.25, 0.75), "temperature": 1.0} | changes
    return bucket_weights(losses, focus=focus, **how).tolist()


def test_buckets_are_cut_at_the_quantiles() -> None:
    assert buckets("low") == [1, 4, 4, 1, 1, 0]
    assert buckets("medium") == [4, 1, 1, 1, 4, 0]
    assert buckets("high") == [1, 1, 1, 4, 1, 0]
    assert buckets("high", temperature=0.5)[3] == 16 and buckets("high", temperature=2.0)[3] == 2


def test_no_finite_loss_is_refused() -> None:
    with pytest.raises(UserError, match="no sample of the pool has a finite loss"):
        bucket_weights(np.full(3, np.nan), focus="low", focus_weight=2.0, quantiles=(0.3, 0.6), temperature=1.0)


@pytest.mark.parametrize("replacement", [False, True])
def test_first_draws_come_in_proportion_to_their_weights(replacement: bool) -> None:
    weights = np.array([1.0, 0.0, 2.0, 5.0])
    draw = generator(0, "test")
    first = [weighted_draw(weights, 2, replacement=replacement, draw=draw)[0] for _ in range(4000)]
    shares = np.bincount(first, minlength=4) / 4000
    assert np.abs(shares - weights / 8).max() < 0.03 and shares[1] == 0


def test_second_draws_without_replacement_are_those_of_successive_sampling() -> None:
    weights = np.array([1.0, 2.0, 5.0])
    draw = generator(1, "test")
    pairs = [tuple(weighted_draw(weights, 2, replacement=False, draw=draw)) for _ in range(6000)]
    for first, second in ((0, 1), (1, 0), (2, 1), (2, 0)):
        want = weights[first] / 8 * weights[second] / (8 - weights[first])
        assert pairs.count((first, second)) / 6000 == pytest.approx(want, abs=0.025)


def test_too_few_samples_that_can_be_drawn_are_refused() -> None:
    with pytest.raises(UserError, match="asked for 3 samples, but only 2 can be drawn; set replacement: true"):
        weighted_draw(np.array([1.0, 0.0, 2.0]), 3, replacement=False, draw=generator(0, "test"))
    assert len(weighted_draw(np.array([1.0, 0.0, 2.0]), 3, replacement=True, draw=generator(0, "test"))) == 3


def test_subtasks_by_column_and_scores_summed_by_learning_rate() -> None:
    class Engine:
        rates = iter([0.0, 0.5, 0.25])

        def get_lr(self) -> list[float]:
            return [next(self.rates)]

    class StandIn:
        engine = Engine()

    target = [{"task": "b"}, {"task": "a"}, {"task": "b"}]
    selector = LessSelector(
        [None] * 3, None, None, "", StandIn(), target, subtask_column="task", accumulate=True, self_check=False
    )
    assert (selector.subtasks.names, selector.subtasks.ids.tolist()) == (["a", "b"], [1, 0, 1])
    # Of samples by subtasks: the sums of the columns come before their maximum, so that 0 loses at last.
    rows = [[[0.5, 0], [0.4, 0], [0.1, 0]], [[0, 0.8], [0.3, 0.3], [0.2, 0]], [[0.9, 0], [0.5, 0], [0, 1.2]]]
    answers = iter(np.float32(rows))
    selector.table = lambda: ArrayTable(next(answers))  # type: ignore[method-assign]
    assert selector.select(None, 0, 2) == [0, 1], "a learning rate of 0 leaves the scores as they are"
    assert selector.select(None, 5, 2) == [0, 1]
    resumed = LessSelector(
        [None] * 3, None, None, "", StandIn(), target, subtask_column="task", accumulate=True, self_check=False
    )
    resumed.load_state_dict(selector.state_dict())
    resumed.table = lambda: ArrayTable(next(answers))  # type: ignore[method-assign]
    assert resumed.select(None, 9, 3) == [0, 2, 1]
    np.testing.assert_allclose(resumed.metric["score"], [0.4, 0.3, 0.275], rtol=1e-6)
    assert resumed.metric["serves"] == ["b", "b", "a"]
    with pytest.raises(
        UserError, match=r"^less: accumulate: .* has the shape \(3,\), here it is of 3 samples for 2 col"
    ):
        resumed.load_state_dict({"total": np.zeros(3, dtype=np.float32)})


def test_less_scores_are_the_largest_mean_cosine_over_subtasks() -> None:
    draw = np.random.default_rng(0)
    targets, features = draw.standard_normal((7, 16)), draw.standard_normal((5, 16))
    subtasks = np.array([0, 0, 2, 2, 2, 0, 5])

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    want = [
        max(np.mean([cosine(f, t) for t, k in zip(targets, subtasks, strict=True) if k == task]) for task in (0, 2, 5))
        for f in features
    ]
    directions = mean_unit_rows(targets, subtasks)
    got = cosines(torch.from_numpy(features), directions)
    np.testing.assert_allclose(got.numpy().max(axis=1), want, rtol=1e-12)
    exact = exact_cosines(features @ directions.numpy().T, np.square(features).sum(axis=1))
    np.testing.assert_allclose(exact, got.numpy(), rtol=1e-12)


def test_a_feature_of_zeros_scores_zero() -> None:
    directions = mean_unit_rows(np.eye(2, 4, dtype=np.float32), np.array([0, 1]))
    assert cosines(torch.zeros(1, 4), directions).tolist() == [[0.0, 0.0]]
    assert exact_cosines(np.zeros((1, 2), np.float32), np.zeros(1, np.float32)).tolist() == [[0.0, 0.0]]


def test_random_picks_change_with_seed_and_step_only() -> None:
    def picks(seed: int, step: int, replacement: bool = False) -> list[int]:
        return RandomSelector(range(60), None, None, "", seed, replacement).select(None, step, 20)

    assert picks(1, 2) == picks(1, 2) and len(set(picks(1, 2))) == 20
    assert picks(1, 2) != picks(1, 3) and picks(1, 2) != picks(2, 2)
    assert RandomSelector(range(5), None, None, "", 1, True).select(None, 0, 50)
    assert all(0 <= i < 60 for i in picks(1, 2, True))


def test_warm_up_samples_are_random_and_without_repeats_unless_asked() -> None:
    selector = RandomSelector(range(60), None, None, "", 1)
    ids = selector.warmup(40)
    assert len(set(ids)) == 40 and ids != sorted(ids)
    assert len(selector.warmup(100, replacement=True)) == 100
    with pytest.raises(UserError, match="warm-up: cannot draw 61 samples without replacement from 60"):
        selector.warmup(61)


def test_random_proportions_change_with_seed_and_step_only() -> None:
    manager = MixtureManager(np.array([0, 1, 2]), ["a", "b", "c"], np.full(3, 1 / 3), 0)
    first = RandomMixer(manager, 1).mix(None, 4)
    assert first.sum() == pytest.approx(1) and (first >= 0).all()
    assert np.array_equal(first, RandomMixer(manager, 1).mix(None, 4))
    assert not np.array_equal(first, RandomMixer(manager, 1).mix(None, 5))
    assert not np.array_equal(first, RandomMixer(manager, 2).mix(None, 4))


def test_a_static_mixer_without_proportions_keeps_the_initial_ones() -> None:
    initial = np.array([0.2, 0.8])
    manager = MixtureManager(np.array([0, 1]), ["a", "b"], initial, 0)
    manager.draw(np.array([1.0, 0.0]), 1, 0)
    assert StaticMixer(manager).mix(None, 3).tolist() == [0.2, 0.8]


POOL = SimpleNamespace(domain_ids=np.array([0]))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LossWeighter("linuper"), r"loss weighter: strategy: 'linuper' \(did you mean 'linupper'\?\); valid: "),
        (lambda: LossWeighter(delta=0.0), "loss weighter: delta: must be > 0, got 0.0"),
        (lambda: LossWeighter(r_end=-1.0), "loss weighter: r_end: must be > 0, got -1.0"),
        (lambda: loss_selector(focus="hihg"), r"focus: 'hihg' \(did you mean 'high'\?\); valid: low, medium, high"),
        (lambda: loss_selector(quantiles=(0.7, 0.3)), r"quantiles: expected 0 <= low <= high <= 1, got \[0.7, 0.3\]"),
        (lambda: loss_selector(quantiles=(0.5,)), r"quantiles: expected 0 <= low <= high <= 1, got \[0.5\]"),
        (lambda: loss_selector(temperature=0.0), "focus_weight and temperature must be > 0"),
        (lambda: less(gradient_type="adm"), r"less: gradient_type: 'adm' \(did you mean 'adam'\?\); valid: adam, sgd"),
        (lambda: less(adam_form="paper"), "less: adam_form: 'paper'; valid: official, optimizer"),
        (lambda: less(proj_dim=1000), r"less: proj_dim: expected a power of two >= 2, got 1000"),
        (lambda: less(projection="xorfld"), r"less: projection: 'xorfld' \(did you mean 'xorfold'\?\); valid: xorfold"),
        (lambda: less(projection="kronecker"), "less: projection: kronecker needs gradient_type: sgd; with adam"),
        (lambda: less(scoring="exct"), r"less: scoring: 'exct' \(did you mean 'exact'\?\); valid: projected, exact"),
        (
            lambda: less(aggregate="rond_robin"),
            r"less: aggregate: 'rond_robin' \(did you mean 'round_robin'\?\); valid: max, mean, round_robin, balanced",
        ),
        (lambda: less(per="targets"), r"less: per: 'targets' \(did you mean 'target'\?\); valid: subtask, target"),
        (
            lambda: less(aggregate="vote", vote_share=1.5),
            r"less: vote_share: expected a share of the pool between 0 and 1, got 1.5",
        ),
        (lambda: less(vote_share=0.2), "less: vote_share: is of aggregate: vote; with max leave it out"),
        (
            lambda: less(scoring="exact", per="target", eval_dataset=[{"task": "a"}] * 65, subtask_column="task"),
            r"less: per: target with scoring: exact keeps .* which has 65 \(64 at most\); use scoring: projected",
        ),
        (lambda: less(layers="last:2"), r"layers: expected a list of patterns, got the text 'last:2'"),
        (
            lambda: less(eval_dataset=[{"task": "a"}], subtask_column="tsk"),
            r"less: subtask_column: sample 0 of the target has no 'tsk' \(did you mean 'task'\?\); it has task",
        ),
        (lambda: less(eval_dataset=None), "less: eval_dataset: the target is empty; set eval_dataset or val_size"),
        (lambda: less(eval_dataset=[]), "less: eval_dataset: the target is empty"),
    ],
)
def test_wrong_params_are_refused(make: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make()


def loss_selector(**params: Any) -> LossSelector:
    return LossSelector([], None, None, "", None, **params)


def less(**params: Any) -> LessSelector:
    return LessSelector([], None, None, "", None, **({"eval_dataset": [1]} | params))
