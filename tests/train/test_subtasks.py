"""What becomes of the subtasks of a target: which of them picks serve, what is said of it, and their losses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.config import load_config
from dataflex.data.pool import Pool
from dataflex.scoring.decide.rules import decide
from dataflex.scoring.decide.table import ArrayTable
from dataflex.train.decisions.served import of_subtasks, overlap, report, starved
from dataflex.train.selector.base_selector import Served
from dataflex.train.selector.target_selector import TargetSelector
from dataflex.train.trainer.component_hooks import HookBuilder
from dataflex.train.trainer.components import subtask_column
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

TASKS = {"long": 40, "middle": 8, "short": 1}  # tokens of an answer
OF_EACH, PICKS, SAVE_AT = 40, 36, 7


def samples(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions of four tokens that all tasks share; the answers' tokens are a task's own."""
    draw, kind = np.random.default_rng([seed, TASKS[task]]), list(TASKS).index(task)
    made = []
    for _ in range(count):
        question = draw.integers(3, 40, 4).tolist()
        answer = (60 + 60 * kind + draw.integers(0, 4 if task == "short" else 60, TASKS[task])).tolist()
        made.append({"input_ids": question + answer, "labels": [-100] * 4 + answer, "task": task})
    return made


def build(folder: Path, aggregate: str) -> Any:
    """An engine with LESS on a target of the three tasks, which are the values of a column."""
    params = {"aggregate": aggregate, "subtask_column": "task", "proj_dim": 512, "self_check": False}
    return engine_of(
        train_type="dynamic_select",
        component_name="less",
        component_params={"select": params},
        output_dir=str(folder),
        warmup_step=4,
        update_step=PICKS // 6,
        update_times=2,
    )


def engine_of(**keys: Any) -> Any:
    return dataflex.initialize(
        model=tiny.model("full"),
        config=tiny.ds_config(0, micro_batch=6),
        dataflex=keys,
        train_dataset=[{k: s[k] for k in ("input_ids", "labels")} for t in TASKS for s in samples(t, OF_EACH, 1)],
        eval_dataset=[s for t in TASKS for s in samples(t, 4, 2)],
        tokenizer=tiny.PadZero(),
    )


def by_plain_forward(engine: Any) -> dict[str, float]:
    """Token-mean loss of each task of the target, from the model's own logits."""
    found: dict[str, list[float]] = {}
    for sample in (s for t in TASKS for s in samples(t, 4, 2)):
        ids = torch.tensor([sample["input_ids"]])
        with torch.no_grad():
            logits = engine.module(input_ids=ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[3:]
        found.setdefault(sample["task"], []).extend(losses.tolist())
    return {task: float(np.mean(losses)) for task, losses in found.items()}


WITHOUT_A_SELECTOR_FOR_A_TARGET: dict[str, dict[str, Any]] = {
    "static": {"train_step": 2},
    "random": {"train_type": "dynamic_select", "component_name": "random", "update_step": 2, "update_times": 1},
    "mixed": {"train_type": "dynamic_mix", "component_name": "random", "update_step": 2, "update_times": 1},
}


def runs(folder: str) -> dict[str, Any]:
    """Of each rule: the decisions, the warnings, losses of the target at the end and by a plain forward."""
    found: dict[str, Any] = {}
    said: list[str] = []
    logger = logging.getLogger("dataflex")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    for aggregate in ("max", "round_robin"):
        said.clear()
        where = Path(folder, aggregate)
        engine = build(where, aggregate)
        for batch in engine.batches():
            engine.training_step(batch)
            if engine.run.step == SAVE_AT:
                engine.save_checkpoint(where)
        files = sorted(where.glob("decisions/*.json"), key=lambda path: int(path.stem[5:]))
        texts = [path.read_text() for path in files]
        found[aggregate] = {"decisions": [json.loads(text) for text in texts], "said": list(said)}
        found[aggregate]["losses"] = [engine.evaluate(), by_plain_forward(engine)]
    for kind, keys in WITHOUT_A_SELECTOR_FOR_A_TARGET.items():
        engine = engine_of(subtask_column="task", **keys)
        found[kind] = [engine.evaluate(), by_plain_forward(engine)]
    files[-1].unlink()
    engine = build(where, "round_robin")
    engine.load_checkpoint(where)
    for batch in engine.batches():
        engine.training_step(batch)
    return found | {"resumed is the same": files[-1].read_text() == texts[-1]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks("tests.train.test_subtasks:runs", 1, folder=str(tmp_path_factory.mktemp("x")))[0]
    return result


def counts(decision: dict[str, Any]) -> dict[str, int]:
    return {task: facts["picks"] for task, facts in decision["subtasks"].items()}


def test_max_starves_a_subtask_and_says_so(found: dict[str, Any]) -> None:
    decisions, said = found["max"]["decisions"], found["max"]["said"]
    poor = [task for task, picks in counts(decisions[0]).items() if picks < PICKS / 3 / 5]
    assert poor, counts(decisions[0])
    warnings = [line for line in said if line.startswith("WARNING")]
    (first, *_) = warnings
    assert first.startswith("WARNING step 4: less: of 36 picks for 3 subtasks few serve ")
    assert all(f"'{task}' {counts(decisions[0])[task]}" in first for task in poor)
    assert first.endswith("less than a fifth of an equal share, 12; set aggregate: round_robin")


def test_turns_starve_none(found: dict[str, Any]) -> None:
    for decision in found["round_robin"]["decisions"]:
        assert counts(decision) == dict.fromkeys(TASKS, PICKS // 3)
        assert min(facts["share"] for facts in decision["subtasks"].values()) >= 0.2
        scores = np.array(decision["metric"]["score"]).reshape(-1, 3)
        assert (np.diff(scores, axis=0) <= 0).all(), "each subtask's best first"
        assert decision["metric"]["serves"] == list(TASKS) * (PICKS // 3)
    assert not [line for line in found["round_robin"]["said"] if line.startswith("WARNING")]


def test_a_decision_says_what_it_shares_with_the_last_one_and_with_chance(found: dict[str, Any]) -> None:
    first, second = found["round_robin"]["decisions"]
    both = set(first["indices"]) & set(second["indices"])
    assert first["overlap"] == {"random": pytest.approx(PICKS / 120), "last": None}
    assert second["overlap"] == {"random": pytest.approx(PICKS / 120), "last": pytest.approx(len(both) / PICKS)}
    for task, facts in second["subtasks"].items():
        pairs = zip(second["indices"], second["metric"]["serves"], strict=True)
        mine = [i for i, served in pairs if served == task]
        scores = [s for s, of in zip(second["metric"]["score"], second["metric"]["serves"], strict=True) if of == task]
        assert (facts["lowest"], facts["highest"]) == (min(scores), max(scores))
        assert facts["last"] == pytest.approx(len(both & set(mine)) / len(mine))
    (line,) = (line for line in found["round_robin"]["said"] if line.startswith("INFO step 10: less serves "))
    assert line.endswith(f"; 30% would be in a random draw, {len(both) / PICKS:.0%} were in the last decision")
    assert found["resumed is the same"], "the last picks are in the checkpoint"


def test_evaluation_tells_each_subtasks_loss(found: dict[str, Any]) -> None:
    others = [found[kind] for kind in WITHOUT_A_SELECTOR_FOR_A_TARGET]
    for told, right in (found["max"]["losses"], found["round_robin"]["losses"], *others):
        assert told.keys() == {"eval_loss", *(f"eval_task_{task}_loss" for task in TASKS)}
        for task, loss in right.items():
            assert told[f"eval_task_{task}_loss"] == pytest.approx(loss, abs=1e-5)
        tokens = np.array(list(TASKS.values()))
        assert told["eval_loss"] == pytest.approx(
            (np.array(list(right.values())) * tokens).sum() / tokens.sum(), abs=1e-5
        )


def run_of(size: int, domain_ids: np.ndarray) -> Any:
    """A run after three steps, of whose pool no more is known."""
    pool = Pool(range(size), domain_ids, ["a", "b"], np.ones(size), "")
    return SimpleNamespace(step=3, pool=pool)


def test_chance_by_domains_and_with_replacement() -> None:
    pool_of_ten, none = run_of(10, np.repeat([0, 1], [8, 2])), np.empty(0, dtype=np.int64)
    picks = np.array([0, 1, 2, 8])
    found = overlap(pool_of_ten, picks, none, by_domain=False, replacement=False)
    assert found == {"random": pytest.approx(0.4), "last": None}
    found = overlap(pool_of_ten, picks, np.array([1, 8, 9]), by_domain=True, replacement=False)
    assert found == {"random": pytest.approx((3 * 3 / 8 + 1 / 2) / 4), "last": 0.5}
    found = overlap(pool_of_ten, np.array([0, 0, 5]), none, by_domain=False, replacement=True)
    assert found["random"] == pytest.approx(1 - 0.9**3)


@pytest.mark.parametrize(
    ("picks", "right"),
    [([1, 9, 20], "a"), ([2, 8, 20], ""), ([0, 0, 30], "ab"), ([0, 1, 1], ""), ([0, 1, 2], "a"), ([30], "")],
)
def test_who_is_starved(picks: list[int], right: str) -> None:
    """Less than a fifth of an equal share; nobody is where there are fewer picks than subtasks."""
    assert starved({name: {"picks": count} for name, count in zip("abc", picks, strict=False)}) == list(right)


def test_many_subtasks_are_told_in_few_words(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"t{k}" for k in range(9)]
    picks = np.arange(90)
    served = Served(names, np.repeat([0, 1], 45), np.linspace(1, 0, 90), "do something")
    run = run_of(200, np.zeros(200, dtype=np.int64))
    selector: Any = SimpleNamespace(served=served, replacement=False)
    with caplog.at_level(logging.INFO, "dataflex"):
        report(run, "less", selector, picks, np.arange(9), by_domain=False)
    line, warning = caplog.messages
    assert line == (
        "step 3: less serves t0 50% (0.506 to 1), t1 50% (0 to 0.494), t2 0%, t3 0%, t4 0%, "
        "4 more in decisions/step_3.json; 45% would be in a random draw, 10% were in the last decision"
    )
    assert warning == (
        "step 3: less: of 90 picks for 9 subtasks few serve 't2' 0, 't3' 0, 't4' 0, 't5' 0, 't6' 0, 't7' 0 and 1 more: "
        "less than a fifth of an equal share, 10; do something"
    )
    assert of_subtasks(served, picks, np.arange(9))["t0"]["last"] == 9 / 45


class Planted(TargetSelector):
    """A selector whose table is given."""

    def __init__(self, table: np.ndarray, pool: Any, **how: Any) -> None:
        target = Pool.from_datasets({"a": tiny.samples(2, 1), "b": tiny.samples(1, 2)})
        super().__init__(pool, None, None, "", name="planted", target=target, **how)
        self.planted = table

    def table(self) -> ArrayTable:
        return ArrayTable(self.planted)


@pytest.mark.parametrize("aggregate", ["max", "mean", "round_robin", "balanced", "vote", "doubly_greedy"])
def test_each_domain_gets_what_a_mixer_asks_for(aggregate: str) -> None:
    table = np.random.default_rng(9).normal(size=(30, 2)).astype(np.float32)
    pool = Pool.from_datasets({name: tiny.samples(size, size) for name, size in (("x", 18), ("y", 12), ("z", 1))})
    table = np.concatenate([table, table[:1]])
    selector = Planted(table, pool, aggregate=aggregate)
    picks = selector.select(None, 0, 8, domain_counts=np.array([5, 3, 0]))
    first = decide(ArrayTable(table), 5, aggregate, np.arange(18))
    second = decide(ArrayTable(table), 3, aggregate, np.arange(18, 30), turn=5)
    assert picks == [*first.picks.tolist(), *second.picks.tolist()]
    assert selector.metric["score"] == [*first.score.tolist(), *second.score.tolist()]
    served = selector.served
    assert served is not None and served.score.tolist() == table[picks, served.of_picks].tolist(), "of what is served"
    if aggregate == "round_robin":
        assert selector.metric["serves"] == ["a", "b"] * 4, "turns go on from one domain to the next"
    if aggregate in ("max", "mean"):
        whole = table.max(axis=1) if aggregate == "max" else table.mean(axis=1, dtype=np.float64)
        np.testing.assert_array_equal(selector.scored["score"], whole)
    assert selector.scored["score: b"].tolist() == table[:, 1].tolist()
    serves = selector.scored["serves"]
    assert [serves[i] for i in picks] == selector.metric["serves"] and sum(s is not None for s in serves) == 8


def test_a_column_for_each_sample_of_the_target() -> None:
    table = np.float32([[0, 0, 9], [8, 0, 0], [0, 7, 0], [6, 6, 6]])
    selector = Planted(table, range(4), per="target", aggregate="round_robin")
    assert selector.width == 3 and selector.select(None, 0, 4) == [1, 0, 2, 3], "a, b, and a's second one in turn"
    assert selector.metric == {"score": [8, 9, 7, 6], "serves": ["a", "b"] * 2, "target": [0, 2, 1, 2]}
    assert selector.served is not None and selector.served.advice == "set per: subtask"


def test_the_table_of_a_rule_gives_all_ranges_that_can_be_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    served = Served(["x", "y", "z"], np.array([0, 0, 1, 1, 2]), np.array([0.99991, 0.99994, 0.5, 0.5, 1]), "-")
    with caplog.at_level(logging.INFO, "dataflex"):
        report(
            run_of(50, np.zeros(50, dtype=np.int64)),
            "rds",
            SimpleNamespace(served=served, replacement=False),  # type: ignore[arg-type]
            np.arange(5),
            np.empty(0, dtype=np.int64),
            by_domain=False,
        )
    assert caplog.messages == [
        "step 3: rds serves x 40% (0.99991 to 0.99994), y 40% (0.5), z 20% (1); 10% would be in a random draw"
    ]


def test_a_decision_for_no_subtask_says_what_it_shares_too(caplog: pytest.LogCaptureFixture) -> None:
    selector: Any = SimpleNamespace(served=None, replacement=True)
    with caplog.at_level(logging.INFO, "dataflex"):
        report(run_of(10, np.zeros(10, dtype=np.int64)), "tsds", selector, np.array([0, 0, 5]), np.array([5]), False)
    assert caplog.messages == [
        "step 3: tsds: of the picks 27% would be in a random draw, 50% were in the last decision"
    ]


def test_a_column_of_very_many_values_is_said_to_be_too_many(caplog: pytest.LogCaptureFixture) -> None:
    target = Pool.from_datasets([sample | {"task": str(i)} for i, sample in enumerate(tiny.samples(101, 1))])
    builder: Any = SimpleNamespace(column="task", runtime={"eval_dataset": target})
    with caplog.at_level(logging.WARNING, "dataflex"):
        found = HookBuilder.subtasks(builder)
    assert found is not None and list(found.parts()) == []
    assert caplog.messages == [
        "subtask_column: task has 101 values; losses are told of 100 at most, so of none of them"
    ]


def test_the_key_and_the_selectors_param_name_one_column() -> None:
    keys = {"train_type": "dynamic_select", "component_name": "less", "update_step": 1, "subtask_column": "task"}
    for own, right in (
        (None, "task"),
        ("task", "task"),
        ("kind", "subtask_column: 'task', and the selector's .*'kind'"),
    ):
        cfg = load_config(keys | {"component_params": {"select": {"subtask_column": own}}}, embedded=True, quiet=True)
        if own == "kind":
            with pytest.raises(UserError, match=right):
                subtask_column(cfg)
        else:
            assert subtask_column(cfg) == right
