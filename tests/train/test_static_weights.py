"""Static weights and draw probabilities from keys, the weights' log, and a planted truth for each strategy."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.config import load_config
from dataflex.config.sections.weighting import WeightingSection
from dataflex.core.packing import Packing
from dataflex.core.weights import StaticWeights
from dataflex.data.pool import Pool
from dataflex.data.weight_file import WeightFile
from dataflex.train.trainer.weight_trainer import WeightHook, WeightLog, collapsed
from dataflex.train.weighter.adapt_weighter import (
    AdaptWeighter,
    directions,
    sigmoid_weights,
    similarities,
    softmax_weights,
)
from dataflex.train.weighter.loss_weighter import LossWeighter, loss_weights
from dataflex.train.weighter.static_weights import class_weights, draw_probabilities, static_weights
from dataflex.utils.errors import UserError
from tests.tiny import byte_tokenizer, tiny_llama
from tests.train.test_planners import make_run

ANSWERS = [[1, 2], [1, 2], [1, 3], [1, 2], [4, 4], [4, 4]]
WEIGHTS = [1.0, 2.0, 0.0, 4.0, 1.0, 2.0]


def pool(weights: list[float] | None = None) -> Pool:
    items = [{"input_ids": [0, *a], "labels": [-100, *a]} for a in ANSWERS]
    return Pool(items, np.array([0, 0, 0, 0, 1, 1]), ["maths", "prose"], np.full(6, 3), "f00d", sample_weights=weights)


def made(weights: list[float] | None = None, **keys: Any) -> StaticWeights:
    return static_weights(WeightingSection(**keys), pool(weights), byte_tokenizer(), 259, torch.device("cpu"))


def test_domain_weights_multiply_sample_weights() -> None:
    assert not made().any
    loss = made(WEIGHTS, domain_weights={"maths": 0.5}).loss
    assert loss is not None and loss.tolist() == [0.5, 1.0, 0.0, 2.0, 1.0, 2.0]
    with pytest.raises(UserError, match=r"domain_weights: unknown domain 'math' \(did you mean 'maths'\?\); valid: ma"):
        made(domain_weights={"math": 1})
    with pytest.raises(UserError, match="sample_weight: every sample weighs 0"):
        made(domain_weights={"maths": 0, "prose": 0})


def test_sample_weight_as() -> None:
    loss, probability, both = (made(WEIGHTS, sample_weight_as=how) for how in ("loss", "probability", "both"))
    shares = (np.array(WEIGHTS) / 10).tolist()
    assert loss.draw is None and loss.loss is not None and not loss.corrected
    assert probability.loss is None and probability.draw is not None and probability.draw.tolist() == shares
    assert not probability.any, "draws alone leave the loss that of static training"
    assert both.corrected and both.draw is not None
    ids = np.array([1, 3])
    got = both.of(ids, both.draw[ids], 6)
    assert got is not None
    np.testing.assert_allclose(got, [10 / 6] * 2)  # w / (N q) with q = w / sum w
    with pytest.raises(UserError, match="sample_weight_as: both: the training samples have no sample_weight"):
        made(sample_weight_as="both")


def test_a_pass_is_that_of_the_pool_unless_draws_are_weighted() -> None:
    assert WeightingSection(sampling_samples=5).epoch(9) == 9
    assert WeightingSection(sampling_samples=5, sampling="inverse_class").epoch(9) == 5
    assert WeightingSection(sampling="inverse_class").epoch(9) == 9


def test_draws_are_with_replacement_unless_it_is_refused() -> None:
    for given, expected in ((None, True), (True, True), (False, False)):
        assert WeightingSection(sampling_replacement=given).with_replacement is expected


def test_presets() -> None:
    def draw(**keys: Any) -> list[float]:
        return draw_probabilities(WeightingSection(**keys), pool(WEIGHTS)).tolist()

    np.testing.assert_allclose(draw(sampling="inverse_domain"), [1 / 8] * 4 + [1 / 4] * 2)
    np.testing.assert_allclose(draw(sampling="inverse_class"), np.array([1 / 3, 1 / 3, 1, 1 / 3, 0.5, 0.5]) / 3)
    np.testing.assert_allclose(draw(sampling="temperature", sampling_temperature=1), [1 / 6] * 6)
    both = np.array([0.5] * 4 + [2**-0.5] * 2)
    np.testing.assert_allclose(draw(sampling="temperature"), both / both.sum())
    combined = np.array(WEIGHTS) / [4, 4, 4, 4, 2, 2]
    got = draw(sampling="inverse_domain", sample_weight_as="probability")
    np.testing.assert_allclose(got, combined / combined.sum())
    with pytest.raises(UserError, match="sample_weight_as: probability: the weights sum to 0"):
        draw_probabilities(WeightingSection(sample_weight_as="probability"), pool([0.0] * 6))


def test_class_weights(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    a = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    weights = class_weights({"a": 0.5, "3": 2.0}, 259, tokenizer)
    assert weights[a] == 0.5 and weights[3] == 2 and weights.sum() == 259 + 0.5
    np.save(tmp_path / "w.npy", np.arange(259))
    assert class_weights(str(tmp_path / "w.npy"), 259, None)[7] == 7
    (tmp_path / "w.json").write_text('{"3": 2}')
    assert class_weights(str(tmp_path / "w.json"), 259, None)[3] == 2
    (tmp_path / "bad.json").write_text('{"3": -2}')
    for given, text in (
        ({"ab": 1.0}, "class_weights: 'ab' is 2 tokens; a class is one token"),
        ({"259": 1.0}, "class_weights: token id 259 is out of range; valid: 0 to 258"),
        (str(tmp_path / "bad.json"), "bad.json: expected numbers >= 0, got -2"),
        (str(tmp_path / "none.npy"), "none.npy cannot be read as a .npy file"),
    ):
        with pytest.raises(UserError, match=text):
            class_weights(given, 259, tokenizer)
    with pytest.raises(UserError, match=r"w.npy: expected 300 numbers, got shape \(259,\)"):
        class_weights(str(tmp_path / "w.npy"), 300, None)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff" * 64, b"[" * 99_999, b'{"3": ' + b"9" * 400 + b"}"])
def test_damaged_files_of_weights_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^class_weights: [^\n]{1,900}$"):
        class_weights(str(path), 259, byte_tokenizer())


def test_every_bit_of_the_head_of_an_array_of_weights(tmp_path: Path) -> None:
    """The head is a text of Python's, with a shape that can say anything."""
    path = tmp_path / "w.npy"
    np.save(path, np.ones(259))
    whole, told = path.read_bytes(), 0
    for bit in range(8 * 128):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert class_weights(str(path), 259, None).shape == (259,)
            assert len(WeightFile(str(path)).values) == 259
        except UserError as error:
            told += 1
            assert re.fullmatch(r"(class|sample)_weights?: [^\n]{1,900}", str(error))
    assert told > 400


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"sampling": "inverse"}, "sampling: expected one of inverse_domain, inverse_class, temperature, got"),
        ({"domain_weights": {"a": -1}}, "domain_weights: expected a finite weight >= 0 for 'a', got -1"),
        ({"turn_weights": 3}, "turn_weights: expected a list of weights, the last turn's last, got 3"),
        ({"role_weights": {"promt": 1}}, r"role_weights: unknown role 'promt', expected prompt or answer \(did"),
        ({"role_weights": {"prompt": 1}}, "role_weights: a weight of prompt needs train_on_prompt: true"),
        ({"token_weight_spans": {"<t>": 1}}, r"token_weight_spans: expected \[end or null, weight\] for '<t>', got 1"),
        ({"sample_weight_as": "both"}, "sample_weight_as: both needs sample_weight"),
        ({"sampling_replacement": False, "sampling": "inverse_class"}, "sampling_replacement: false needs sampling"),
        (
            {"sampling": "inverse_class", "train_type": "dynamic_select", "component_name": "random", "update_step": 2},
            "sampling: weighted sampling and dynamic_select both say which samples are drawn",
        ),
        (
            {"train_type": "dynamic_weight", "component_name": "adapt"},
            r"component_name: adapt needs a target to compare with: set eval_dataset \(or val_size\)",
        ),
        (
            {"layer_lr_multipliers": {"a": 1}, "deepspeed": {"optimizer": {"type": "AdamW"}}},
            "layer_lr_multipliers: has no effect where the DeepSpeed config has an optimizer of its own",
        ),
    ],
)  # fmt: skip
def test_wrong_keys(keys: dict[str, Any], text: str) -> None:
    required = {"model_name_or_path": "o/m", "dataset": "a", "output_dir": "x"}
    with pytest.raises(UserError, match=text):
        load_config(required | keys, quiet=True)


def log_of(weights: list[float], tmp_path: Path) -> tuple[WeightLog, Any]:
    run = make_run(output_dir=tmp_path)
    run.engine.device, run.total_steps, run.pool, run.figures = "cpu", 9, pool(), {}
    log = WeightLog(1, StaticWeights())
    log.on_step_start(run, None)
    log.on_weights(run, SimpleNamespace(sample_ids=np.arange(len(weights))), torch.tensor(weights))
    run.step += 1
    log.on_step_end(run, None)
    return log, run


def test_a_collapse_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dataflex"):
        log, run = log_of([9.0, 0.01, 0.01, 0.01, 0.01, 0.01], tmp_path)
        log.on_step_end(run, None)
    assert caplog.text.count("the weights have collapsed: 6 samples count like 1.0") == 1
    assert log.state_dict() == {"warned": True}
    resumed = WeightLog(1, StaticWeights())
    resumed.load_state_dict(log.state_dict())
    assert resumed.warned
    line = json.loads((tmp_path / "weights.jsonl").read_text().splitlines()[0])
    assert line["step"] == 1 and line["domains"]["prose"]["samples"] == 2
    assert run.figures == {"weight_mean": line["mean"]} == {"weight_mean": pytest.approx(9.05 / 6)}
    caplog.clear()
    log_of([1.0, 0.5, 2.0, 1.0], tmp_path)
    assert not caplog.text
    assert not collapsed(3, 1.0) and collapsed(100, 9.9) and not collapsed(100, 10.1)


def test_one_sample_in_the_global_micro_batch_is_said(caplog: pytest.LogCaptureFixture) -> None:
    run = SimpleNamespace(micro_batch=1, world_size=1, packing=None)
    with caplog.at_level(logging.WARNING, "dataflex"):
        WeightHook(LossWeighter("uniform"), "u", 0).on_train_start(run)  # type: ignore[arg-type]
        assert not caplog.text
        WeightHook(LossWeighter("extremes"), "e", 0).on_train_start(run)  # type: ignore[arg-type]
    assert "weighter 'e': the global micro-batch is one sample, so its weight is always 1" in caplog.text
    caplog.clear()
    run.packing = Packing(np.full(4, 3), 6)
    WeightHook(LossWeighter("extremes"), "e", 0).on_train_start(run)  # type: ignore[arg-type]
    assert not caplog.text, "a pack holds several"


def test_extremes_lowers_the_weight_of_shuffled_labels() -> None:
    """Planted: a logistic model that is fitted while 30% of the labels are wrong.

    Right rows crowd at the lowest losses and wrong ones lie anywhere above them, so ``extremes`` favours right rows
    (and keeps the model right), while ``linupper`` and ``quadratic`` favour wrong ones.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=draw)
    right = (x @ torch.tensor([2.0, -1, 0.5, 1, -2]) > 0).float()
    wrong = torch.rand(400, generator=draw) < 0.3
    labels = torch.where(wrong, 1 - right, right)
    shares = {}
    for strategy in ("quadratic", "linupper", "extremes"):
        beta = torch.zeros(5, requires_grad=True)
        for _ in range(150):
            losses = torch.nn.functional.binary_cross_entropy_with_logits(x @ beta, labels, reduction="none")
            w = loss_weights(losses.detach(), strategy=strategy, delta=1.0, r=0.3)
            (gradient,) = torch.autograd.grad((w * losses).mean(), beta)
            beta = (beta - 0.5 * gradient).detach().requires_grad_()
        shares[strategy] = float(w[wrong].mean() / w[~wrong].mean())
    assert shares["extremes"] < 0.6 < 1.2 < min(shares["quadratic"], shares["linupper"]), shares


def test_adapt_lowers_the_weight_of_what_is_unlike_the_target() -> None:
    """Planted: 30% of the representations lie around another direction than the target's."""
    draw = torch.Generator().manual_seed(0)
    like, unlike = torch.randn(2, 32, generator=draw)
    wrong = torch.rand(200, generator=draw) < 0.3
    states = torch.where(wrong[:, None], unlike, like) + 0.5 * torch.randn(200, 32, generator=draw)
    anchors = like + 0.5 * torch.randn(8, 32, generator=draw)
    for how in ("mean", "max"):
        scores = similarities(states, directions(anchors, how))
        w = softmax_weights(scores, 0.1)
        assert float(w.mean()) == pytest.approx(1, abs=1e-5)
        assert float(w[wrong].max()) < float(w[~wrong].min())
        w = sigmoid_weights(scores, 1.0)
        assert 0.26 < float(w[wrong].max()) < 0.6 < float(w[~wrong].min()) < 0.74, "neither is moved by the other"


@pytest.mark.parametrize("given", [{}, {"weight": "softmax"}])
def test_adapts_params_are_those_of_its_form_unless_given(given: dict[str, Any]) -> None:
    scorer: Any = SimpleNamespace(engine=SimpleNamespace(module=tiny_llama()))
    made = AdaptWeighter(list(range(100)), scorer, **given)
    found = [made.weight, made.pooling, len(made.anchor_ids), made.refresh_step, made.temperature, made.relative]
    assert (
        found == [["sigmoid", "weighted", 100, 50, 1.0, False], ["softmax", "trained", 64, 100, 0.1, True]][bool(given)]
    )
    assert AdaptWeighter([1, 2], scorer, num_anchors=1, **given).anchor_ids.size == 1


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"eval_dataset": None}, "adapt weighter: needs a target to compare with: set eval_dataset"),
        ({"similarity": "men"}, r"adapt weighter: similarity: 'men' \(did you mean 'mean'\?\); valid: mean, max"),
        (
            {"weight": "sigmod"},
            r"adapt weighter: weight: 'sigmod' \(did you mean 'sigmoid'\?\); valid: sigmoid, softmax",
        ),
        ({"pooling": "first"}, r"adapt weighter: pooling: 'first'.*; valid: mean, last, trained, weighted"),
        ({"num_anchors": 0}, "adapt weighter: num_anchors: must be a whole number >= 1, or all, got 0"),
        ({"num_anchors": "al"}, "adapt weighter: num_anchors: must be a whole number >= 1, or all, got al"),
        ({"refresh_step": 0}, "adapt weighter: refresh_step: must be a whole number >= 1, got 0"),
        ({"temperature": 0.0}, "adapt weighter: temperature: must be > 0, got 0.0"),
        ({"temprature": 1.0}, "AdaptWeighter: unknown param 'temprature' .did you mean 'temperature'"),
        ({}, "Linear: has no output layer"),
    ],
)
def test_wrong_params_of_adapt(more: dict[str, Any], text: str) -> None:
    scorer: Any = SimpleNamespace(engine=SimpleNamespace(module=torch.nn.Linear(1, 1)))
    with pytest.raises(UserError, match=text):
        AdaptWeighter(**{"eval_dataset": [1, 2], "scorer": scorer, **more})
