"""Weighters; importing this package registers those that come with dataflex."""

from dataflex.train.weighter.adapt_weighter import AdaptWeighter
from dataflex.train.weighter.custom_weighter import CustomWeighter
from dataflex.train.weighter.dft_weighter import DftWeighter
from dataflex.train.weighter.eaft_weighter import EaftWeighter
from dataflex.train.weighter.loss_weighter import LossWeighter
from dataflex.train.weighter.rho_weighter import RhoWeighter

__all__ = ["AdaptWeighter", "CustomWeighter", "DftWeighter", "EaftWeighter", "LossWeighter", "RhoWeighter"]
