"""The numerical operations, each a public function with its portable reference beside it."""

from __future__ import annotations

from dataflex.ops.losses.loss import SampleLoss, merge_vocab_shards, per_sample_loss, shift_labels
from dataflex.ops.losses.loss_dispatch import SketchedLoss
from dataflex.ops.losses.loss_linear import linear_per_sample_loss
from dataflex.ops.losses.loss_sketch import loss_and_head_sketch
from dataflex.ops.projection.arguments import Projection, Sums
from dataflex.ops.projection.hashing import tensor_id
from dataflex.ops.projection.project import project_dense_, project_per_sample_grad_, project_rows_, project_zero
from dataflex.ops.projection.transforms import Transform

__all__ = [
    "Projection",
    "SampleLoss",
    "SketchedLoss",
    "Sums",
    "Transform",
    "implementations",
    "linear_per_sample_loss",
    "loss_and_head_sketch",
    "merge_vocab_shards",
    "per_sample_loss",
    "project_dense_",
    "project_per_sample_grad_",
    "project_rows_",
    "project_zero",
    "shift_labels",
    "tensor_id",
]


def implementations() -> dict[str, str]:
    """Which implementation of the ops runs here, for each kind of device. Builds the native one on its first use."""
    from dataflex.ops.native import _ext

    return {"ops on CPU": _ext.describe("cpu"), "ops on CUDA": _ext.describe("cuda")}
