"""What `dataflex-cli eval` makes of losses, and which data it looks at."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.config import load_config
from dataflex.data.pool import Pool
from dataflex.driver.evaluating import _only_data, by_domain, by_subtask


def test_losses_of_domains_are_means_over_their_tokens() -> None:
    pool: Any = SimpleNamespace(domain_ids=[0, 0, 2, 2, 1], domain_names=("a", "b", "empty"))
    found = by_domain(pool, np.array([6.0, 1.0, 0.0, 0.0, 9.0]), np.array([2.0, 5.0, 0.0, 0.0, 3.0]))
    assert list(found) == ["a", "b", "all"], "nothing is trained on in the other"
    assert found["a"] == {"samples": 2, "tokens": 7, "loss": 1.0, "perplexity": pytest.approx(math.e)}
    assert found["b"] == {"samples": 1, "tokens": 3, "loss": 3.0, "perplexity": pytest.approx(math.exp(3))}
    assert (found["all"]["samples"], found["all"]["tokens"], found["all"]["loss"]) == (5, 10, 1.6)


def test_a_loss_beyond_all_perplexities_is_told() -> None:
    pool: Any = SimpleNamespace(domain_ids=[0], domain_names=("a",))
    found = by_domain(pool, np.array([3e6]), np.array([2.0]))
    assert found == {"a": {"samples": 1, "tokens": 2, "loss": 1.5e6, "perplexity": pytest.approx(math.exp(700))}}


def test_losses_of_subtasks_are_means_over_their_tokens() -> None:
    samples = [{"input_ids": [1, 2], "labels": [1, 2], "task": task} for task in ("b", "a", "b", "none")]
    found = by_subtask(
        Pool.from_datasets(samples), "task", np.array([6.0, 2.0, 3.0, 0.0]), np.array([2.0, 1.0, 1.0, 0.0])
    )
    assert found == {
        "task_a": {"samples": 1, "tokens": 1, "loss": 2.0, "perplexity": pytest.approx(math.exp(2))},
        "task_b": {"samples": 2, "tokens": 3, "loss": 3.0, "perplexity": pytest.approx(math.exp(3))},
    }


RUN = {"model_name_or_path": "m", "output_dir": "out", "dataset": "a,b", "report_to": "csv", "plot_loss": True}


def test_the_data_to_look_at_is_the_evaluations_and_a_held_out_part_stays_one() -> None:
    other = _only_data(load_config(RUN | {"eval_dataset": "c", "sample_weight": "size", "packing": True}, quiet=True))
    assert (other.data.dataset, other.data.eval_dataset) == (("c",), ())
    assert (other.data.sample_weight, other.data.packing) == (None, False)
    assert (other.output.report_to, other.output.plot_loss) == ((), False)
    assert _only_data(load_config(RUN, quiet=True)).data.dataset == ("a", "b")
    held = _only_data(load_config(RUN | {"val_size": 4}, quiet=True)).data
    assert (held.dataset, held.eval_dataset, held.val_size) == (("a", "b"), (), 4)
    documents = _only_data(load_config(RUN | {"stage": "pt", "packing": True}, quiet=True)).data
    assert documents.packing is True, "a document is cut into rows of cutoff_len"
