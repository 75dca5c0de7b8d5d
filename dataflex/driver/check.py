"""`dataflex-cli check`: whether gradient scoring is right on this config's model, engine and data."""

from __future__ import annotations

import inspect

import numpy as np

from dataflex.config import Config
from dataflex.config.components import component_params
from dataflex.config.rules.streaming import needs_known_data
from dataflex.core.plan import generator
from dataflex.core.registry import REGISTRY
from dataflex.data.pool import Pool
from dataflex.driver.setup import build_engine, read_inputs, with_components
from dataflex.scoring.checks.self_check import check_scoring, require
from dataflex.scoring.gradients.spec import FeatureSpec
from dataflex.train.selector.less_selector import LessSelector, feature_spec
from dataflex.utils.logging import logger

SAMPLES = 4


def check(cfg: Config) -> None:
    """Run the self-check and print a verdict for each point; UserError where one fails. Trains and writes nothing.

    The optimizer has taken no step yet, so Adam's moments are zero. What is compared is what the config's LESS
    selector scores with, or else the plain gradient of every trained parameter.
    """
    needs_known_data(cfg, "check")
    cfg = with_components(cfg)
    inputs = read_inputs(cfg)
    engine = build_engine(inputs)
    pool = inputs.data.train
    assert isinstance(pool, Pool)
    ids = generator(cfg.train.seed, "self-check").choice(len(pool), min(SAMPLES, len(pool)), replace=False)
    verdicts = check_scoring(engine.scorer, pool, np.sort(ids).astype(np.int64), _spec(cfg))
    for verdict in verdicts:
        logger.info(verdict.line)
    require(verdicts)
    logger.info("check: gradient scoring is right on this model, engine and data")


def _spec(cfg: Config) -> FeatureSpec:
    """What the run's selector scores with."""
    if "select" not in cfg.flex.kinds:
        return FeatureSpec()
    name, params = component_params(cfg.flex, "select")
    selector = REGISTRY.get("selector", name)
    if not (inspect.isclass(selector) and issubclass(selector, LessSelector)):
        return FeatureSpec()
    asked = inspect.signature(feature_spec).parameters
    return feature_spec(**{key: value for key, value in params.items() if key in asked})
