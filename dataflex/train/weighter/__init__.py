"""Weighters; importing this package registers those that come with dataflex."""

from dataflex.train.weighter.adapt_weighter import AdaptWeighter
from dataflex.train.weighter.custom_weighter import CustomWeighter
from dataflex.train.weighter.loss_weighter import LossWeighter

__all__ = ["AdaptWeighter", "CustomWeighter", "LossWeighter"]
