"""Cosines of samples' features with a target's, a column for each subtask (arXiv 2402.04333, section 4.2).

The mean over a subtask's targets of a sample's cosines is the product of its unit feature with their mean unit feature.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]


def unit_rows(features: Tensor) -> Tensor:
    """Rows of [n, d] scaled to length 1; a row of zeros stays zero."""
    return features / features.norm(dim=1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)


def mean_unit_rows(features: Floats, columns: NDArray[np.int64]) -> Tensor:
    """Mean unit feature of the targets of each column, float32 [M, d]. features: [n, d]; columns: of each row, [n]."""
    unit = unit_rows(torch.from_numpy(features))
    return torch.stack([unit[torch.from_numpy(columns == k)].mean(0) for k in np.unique(columns)])


def cosines(features: Tensor, directions: Tensor) -> Tensor:
    """[b, M]: each sample's mean cosine with the targets of each column. directions: [M, d] of `mean_unit_rows`."""
    return unit_rows(features) @ directions.T


def exact_cosines(dots: Floats, sqnorm: Floats) -> Floats:
    """`cosines` from inner products with the directions [n, M] and squared norms [n]."""
    norm: Floats = np.sqrt(np.maximum(sqnorm, np.finfo(np.float32).tiny))
    return dots / norm[:, None]
