"""Features of the output layer's gradient from a forward alone: sketched with the losses, then projected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dataflex.forward.counted import Counted
from dataflex.forward.fused import FusedHead
from dataflex.forward.split import split_batch
from dataflex.ops import Projection, Sums, project_per_sample_grad_, tensor_id
from dataflex.scoring.batches import Ids
from dataflex.scoring.context import scoring_mode
from dataflex.scoring.gather import merge
from dataflex.scoring.scorer import Scorer

# Of the two projections, one after the other; features of both sides of a comparison have the same.
SKETCH, PROJECTED = "less_head.sketch", "less_head.projected"


@dataclass(frozen=True)
class HeadFeatures:
    """The gradient of a sample's mean loss by the output layer [V, H], in two stages: V to ``sketch_dim``, then all.

    sketch_dim: a power of two. proj_dim: of the features, by the xor-fold. seed: of both.
    """

    head: FusedHead
    sketch_dim: int
    proj_dim: int
    seed: int

    def of_batch(self, module: nn.Module, inputs: Mapping[str, Tensor], counted: Counted) -> Tensor:
        """float32 [S, proj_dim] (float64 of float64 models): a forward of ``module`` and no backward."""
        how = {"k1": self.sketch_dim, "seed": self.seed, "tensor": tensor_id(SKETCH)}
        losses, sketch, hidden = self.head.sketched(module, inputs, counted, **how)
        out = sketch.new_zeros(len(losses.count), self.proj_dim)
        scale = 1.0 / losses.count.clamp(min=1).to(out.dtype)
        of = Projection(tensor_id(PROJECTED), self.seed)
        project_per_sample_grad_(Sums(out), sketch, hidden, counted.cu_seqlens, of, scale)
        return out

    def of_samples(self, scorer: Scorer, dataset: Any, ids: Ids | None = None) -> NDArray[np.float32]:
        """float32 [n, proj_dim] of the samples ``ids``, in their order; a collective."""
        ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
        out = np.zeros((len(ids), self.proj_dim), dtype=np.float32)
        with scoring_mode(scorer.engine.module, gradients=False):
            for places, batch in scorer.batches(dataset, ids, "scoring the output layer"):
                inputs, labels, _, cu_seqlens = split_batch(batch, scorer.device)
                features = self.of_batch(scorer.engine.module, inputs, Counted(labels, cu_seqlens))
                if places is not None:
                    out[places] = features.cpu().numpy()
        scorer.release()
        return merge(out, scorer.device)
