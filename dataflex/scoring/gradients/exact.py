"""Exact LESS scores: inner products with directions in the space of the parameters themselves, no projection.

With v the mean over a subtask's targets of their unit gradients, a sample's mean cosine with the targets is
<g, v> / |g| (arXiv 2402.04333, section 4.2). One direction for each subtask is all that is kept: float32 of the
trained parameters' size, divided over the ranks where they are large (`Directions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.ops import Sums
from dataflex.scoring.batches import Ids
from dataflex.scoring.gather import merge
from dataflex.scoring.gradients.coverage import find_targets, parameter_names, trained_names
from dataflex.scoring.gradients.direction_sink import DirectionSink
from dataflex.scoring.gradients.directions import Directions
from dataflex.scoring.gradients.layer_state import LayerState
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.scorer import Floats, Scorer


def mean_directions(
    scorer: Scorer, target: Any, subtasks: NDArray[Any], *, layers: LayerRule | None = None
) -> Directions:
    """{name: float32 [Q, *shape]}: the mean unit gradient of each subtask; subtasks: [len(target)], Q values.

    Two passes over the target: its gradients' norms, then one backward of the losses weighted by 1 / norm, whose
    ordinary gradient is the sum of unit gradients. A sample whose gradient is zero adds nothing, and counts.
    """
    ids = np.arange(len(subtasks), dtype=np.int64)
    _, sqnorm = exact_dots(scorer, target, {}, ids, adam=None, layers=layers)
    norm = np.sqrt(sqnorm)
    kinds, place = np.unique(subtasks, return_inverse=True)
    share = np.bincount(place)[place].astype(np.float32)
    weights = np.divide(1.0, norm * share, out=np.zeros_like(norm), where=norm > 0)
    module = scorer.engine.module
    targets = find_targets(module, layers)
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in module.named_parameters()}
    shapes = {name: shapes[name] for name in dict.fromkeys(parameter_names(targets))}
    total = Directions(shapes, len(kinds), scorer.device, offload=_offloads(scorer.engine))
    factors = {} if layers is None else layers.factors(trained_names(module))
    for k in range(len(kinds)):
        sink = DirectionSink(total, k, factors)
        mine = ids[place == k]
        scorer.run_backward(
            target, mine, targets, sink, lambda places, _: None, "adding up target gradients", weights[mine]
        )
    total.complete()
    return total


def _offloads(engine: Any) -> bool:
    """Whether the optimizer's state lies in the host's memory."""
    asked = getattr(engine, "zero_offload_optimizer", lambda: None)()
    return asked is not None and str(getattr(asked, "device", "none")).endswith("cpu")


def exact_dots(
    scorer: Scorer,
    dataset: Any,
    directions: Mapping[str, Tensor],
    ids: Ids | None = None,
    *,
    adam: str | None,
    layers: LayerRule | None = None,
) -> tuple[Floats, Floats]:
    """Inner products with the directions [n, Q] and squared norms [n] of the samples' transformed gradients, float32.

    directions: from `mean_directions` with the same ``layers``; {} for norms only.
    """
    ids = np.arange(len(dataset), dtype=np.int64) if ids is None else ids
    queries = directions.queries if isinstance(directions, Directions) else 0
    out = np.zeros((len(ids), queries + 1), dtype=np.float32)

    def keep(places: Ids, totals: Sums) -> None:
        assert totals.sqnorm is not None
        found = [*([] if totals.dots is None else [totals.dots]), totals.sqnorm[:, None]]
        out[places] = torch.cat(found, 1).cpu().numpy()

    targets = find_targets(scorer.engine.module, layers)
    toward = {"directions": LayerState(directions), "queries": queries}
    sink = scorer.sink(targets, adam=adam, layers=layers, proj_dim=0, seed=0, **toward)
    scorer.run_backward(dataset, ids, targets, sink, keep, "scoring gradients exactly")
    merged = merge(out, scorer.device)
    return merged[:, :queries], merged[:, queries]
