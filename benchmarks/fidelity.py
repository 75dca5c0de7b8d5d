"""How well scores survive each projection: against exact LESS scores in float64, on real text.

    python benchmarks/fidelity.py --data FOLDER [--csv FILE] [--seeds 3] [--smoke]

A small Llama from random weights is trained for a while, then LoRA parameters on top of it, so that there are Adam
moments. Per-sample gradients come from one backward per sample (`reference_less`), the exact scores from the same in
float64; the ops of dataflex transform and project the float32 gradients. For every projection and size, over seeds:
Spearman's rank correlation with the exact scores and the share of the exact top 10% that is found, once for the mean
over the whole target (what LESS selects by) and once for targets one at a time (mean over them: the harder question).
`fp16`: the pool's features rounded to 16 bits, as they are stored. `exact`: the ops' inner products with directions
in float32, nothing projected. kronecker cannot be used with Adam; here it projects gradients that Adam's form was
applied to before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from less_setup import Sample, llama, overlap, spearman, warm_up, with_lora
from reference_less import (
    Adam,
    adam_of,
    best,
    exact_cosines,
    finish,
    sample_gradients,
    script,
    stacked,
    text_or_smoke,
    trained,
    unit,
)

from dataflex.ops import Projection, Sums, Transform, project_per_sample_grad_, tensor_id

PROJECTIONS = ("xorfold", "countsketch", "sjlt", "rademacher", "kronecker")
DIMS = (512, 2048, 8192)
AGREEMENT = ("spearman", "spearman_sd", "top_10%", "each_spearman", "each_top_10%")
SHOWN = ("scoring", "proj_dim", "storage", "seeds", *AGREEMENT)


@dataclass(frozen=True)
class Case:
    """Gradients of the pool [n, D] and of the target [m, D] in float32, the moments, the exact cosines [n, m]."""

    shapes: dict[str, tuple[int, ...]]
    pool: Tensor
    target: Tensor
    adam: Adam
    exact: Tensor

    def parts(self, gradients: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Each parameter's name, per-sample gradients [n, M, K] and moments [M, K]."""
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        vectors = (gradients, self.adam.exp_avg, self.adam.exp_avg_sq)
        columns = zip(*(x.split(sizes, dim=-1) for x in vectors), strict=True)
        for (name, shape), (grad, m, v) in zip(self.shapes.items(), columns, strict=True):
            yield name, grad.reshape(-1, *shape), m.view(shape), v.view(shape)


def make_case(data: Any, *, width: int, layers: int, rank: int, steps: int) -> Case:
    named, target = data
    pool: list[Sample] = [s for part in named.values() for s in part]
    net = llama(width, layers)
    warm_up(net, pool, steps, 1e-3)
    net = with_lora(net, rank)
    optimizer = warm_up(net, pool, steps, 5e-4)
    adam = adam_of(net, optimizer.state, torch.float32)
    shapes = {name: tuple(p.shape) for name, p in trained(net).items()}
    pool32 = stacked(sample_gradients(net, pool), len(pool))
    target32 = stacked(sample_gradients(net, target), len(target))
    net = net.double()
    wide = adam_of(net, optimizer.state, torch.float64)
    return Case(shapes, pool32, target32, adam, exact_cosines(net, wide, pool, target))


def adam_less(case: Case) -> Transform:
    return Transform("adam_less", case.adam.beta1, case.adam.beta2, case.adam.eps)


def as_tokens(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """row, col and cu_seqlens whose sums of outer products are the gradients [n, M, K]; one of them is an identity."""
    n, rows, columns = grad.shape
    tokens = min(rows, columns)
    eye = torch.eye(tokens).repeat(n, 1)
    cu_seqlens = torch.arange(n + 1) * tokens
    if rows <= columns:
        return eye, grad.reshape(n * rows, columns), cu_seqlens
    return grad.transpose(1, 2).reshape(n * columns, rows), eye, cu_seqlens


def features(case: Case, gradients: Tensor, transform: Transform, projection: str, proj_dim: int, seed: int) -> Tensor:
    """[n, proj_dim] float32 by the ops."""
    out = torch.zeros(len(gradients), proj_dim)
    for name, grad, m, v in case.parts(gradients):
        used = transform
        if projection == "kronecker":
            grad, used = transform(grad, m, v), Transform()
        moments = {"exp_avg": m, "exp_avg_sq": v} if used.needs_moments else {}
        of = Projection(tensor_id(name), seed, used, projection, **moments)
        project_per_sample_grad_(Sums(out), *as_tokens(grad), of)
    return out


def exact_by_ops(case: Case) -> Tensor:
    """Cosines [n, m + 1] with each target and with their mean direction, by the ops' exact scores in float32."""
    goal = unit(case.target)
    goal = torch.cat([goal, goal.mean(0, keepdim=True)])
    sqnorm, dots = torch.zeros(len(case.pool)), torch.zeros(len(case.pool), len(goal))
    for (name, grad, m, v), (_, toward, _, _) in zip(case.parts(case.pool), case.parts(goal), strict=True):
        moments = {"exp_avg": m, "exp_avg_sq": v}
        of = Projection(tensor_id(name), 0, adam_less(case), **moments, directions=toward.contiguous())
        project_per_sample_grad_(Sums(None, sqnorm, dots), *as_tokens(grad), of)
    return dots / sqnorm.sqrt()[:, None]


def measures(cosines: Tensor, mean: Tensor, exact: Tensor) -> dict[str, float]:
    """Agreement of cosines [n, m] and of the scores [n] with the exact cosines [n, m]."""
    truth = exact.mean(1).numpy()
    found = {"spearman": spearman(mean.numpy(), truth), "top_10%": overlap(best(truth, 0.1), best(mean, 0.1))}
    each = [(cosines[:, t].numpy(), exact[:, t].numpy()) for t in range(exact.shape[1])]
    found["each_spearman"] = float(np.mean([spearman(a, b) for a, b in each]))
    found["each_top_10%"] = float(np.mean([overlap(best(b, 0.1), best(a, 0.1)) for a, b in each]))
    return found


def row(scoring: str, proj_dim: Any, storage: str, found: list[dict[str, float]]) -> dict[str, Any]:
    made: dict[str, Any] = {"scoring": scoring, "proj_dim": proj_dim, "storage": storage, "seeds": len(found)}
    for key in found[0]:
        values = [f[key] for f in found]
        made[key] = round(float(np.mean(values)), 4)
        made[f"{key}_sd"] = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else ""
    return made


def projected_rows(case: Case, projection: str, proj_dim: int, seeds: int) -> Iterator[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {"fp32": [], "fp16": []}
    for seed in range(1, seeds + 1):
        pool = features(case, case.pool, adam_less(case), projection, proj_dim, seed)
        goal = unit(features(case, case.target, Transform(), projection, proj_dim, seed))
        for storage, kept in (("fp32", pool), ("fp16", pool.half().float())):
            cosines = unit(kept) @ goal.T
            found[storage].append(measures(cosines, cosines.mean(1), case.exact))
    for storage, measured in found.items():
        yield row(projection, proj_dim, storage, measured)


def main() -> None:
    asked = script(__doc__)
    data = text_or_smoke(asked, cutoff_len=256, count=500, targets=24)
    if data is None:
        return
    small: dict[str, int] = dict(width=32, layers=1, rank=4, steps=2)
    case = make_case(data, **(small if asked.smoke else dict(width=128, layers=4, rank=16, steps=80)))
    cosines = exact_by_ops(case)
    found = measures(cosines[:, :-1], cosines[:, -1], case.exact)
    assert found["each_spearman"] >= 0.999, f"exact scoring is not exact: {found}"
    rows = [row("exact", "", "", [found])]
    for projection in PROJECTIONS:
        for proj_dim in DIMS[:1] if asked.smoke else DIMS:
            rows += projected_rows(case, projection, proj_dim, 1 if asked.smoke else asked.seeds)
            print(rows[-2], flush=True)
    facts = {"pool": len(case.pool), "targets": len(case.target), "parameters": case.pool.shape[1]}
    finish([r | facts for r in rows], SHOWN, asked.csv)


if __name__ == "__main__":
    main()
