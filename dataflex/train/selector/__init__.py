"""Selectors; importing this package registers those that come with dataflex."""

from dataflex.train.selector.cluster_less_selector import ClusterLessSelector
from dataflex.train.selector.custom_selector import CustomSelector
from dataflex.train.selector.less_head_selector import LessHeadSelector
from dataflex.train.selector.less_selector import LessSelector
from dataflex.train.selector.loss_selector import LossSelector
from dataflex.train.selector.random_selector import RandomSelector
from dataflex.train.selector.rds_selector import NearSelector, RdsSelector
from dataflex.train.selector.tsds_selector import TsdsSelector

__all__ = [
    "ClusterLessSelector",
    "CustomSelector",
    "LessHeadSelector",
    "LessSelector",
    "LossSelector",
    "NearSelector",
    "RandomSelector",
    "RdsSelector",
    "TsdsSelector",
]
