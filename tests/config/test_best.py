"""By which figure of an evaluation the best checkpoint is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from dataflex.config import load_config
from dataflex.config.rules.best import metric_of

RUN = {"model_name_or_path": "m", "output_dir": "out", "dataset": "a,b", "eval_strategy": "epoch"}


@pytest.mark.parametrize(
    ("keys", "metric"),
    [
        ({"eval_dataset": "c"}, "eval_loss"),
        ({"eval_dataset": "c", "metric_for_best_model": "loss"}, "eval_loss"),
        ({"eval_dataset": "c", "metric_for_best_model": "eval_loss"}, "eval_loss"),
        # the only domain's loss is the loss, and is not logged by itself
        ({"eval_dataset": "c", "metric_for_best_model": "c_loss"}, "eval_loss"),
        ({"eval_dataset": "c", "metric_for_best_model": "eval_c_loss"}, "eval_loss"),
        ({"eval_dataset": "c,d", "metric_for_best_model": "d_loss"}, "eval_d_loss"),
        ({"eval_dataset": "c,d", "metric_for_best_model": "eval_c_loss"}, "eval_c_loss"),
        ({"val_size": 4, "metric_for_best_model": "b_loss"}, "eval_b_loss"),
        ({"dataset": "a", "val_size": 4, "metric_for_best_model": "a_loss"}, "eval_loss"),
    ],
)
def test_the_figure_has_the_name_that_the_log_has(keys: dict[str, Any], metric: str) -> None:
    cfg = load_config({**RUN, "load_best_model_at_end": True, "save_strategy": "epoch", **keys}, quiet=True)
    assert metric_of(cfg.output, cfg.data) == metric
