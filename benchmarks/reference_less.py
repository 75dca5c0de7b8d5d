"""LESS from scratch, as its official code does it, and how well dataflex's selections agree with it.

    python benchmarks/reference_less.py --data FOLDER [--csv FILE] [--smoke]

The reference (Xia et al., arXiv 2402.04333, and its published code) uses nothing of dataflex: one backward per
sample, the gradients of all trained parameters in one vector, the Adam form of the code for training samples
(no bias correction, eps inside the root), a dense Rademacher projection from its own generator, unit features, and
as the score the largest mean cosine over the subtasks. Run as a script it picks 10% of a pool with it and with
dataflex's `less` on the same model, with two seeds of each, and compares all of them with each other and with the
picks of unprojected float64 gradients: what two seeds of the reference disagree on is the noise of the recipe.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from less_setup import (
    Sample,
    engine_for,
    llama,
    no_data,
    overlap,
    real_text,
    show,
    spearman,
    synthetic,
    warm_up,
    with_lora,
    write_csv,
)
from process_group import end_process, start_process

_ROWS_AT_ONCE = 2048
# What is compared: params of `less`.
OURS: dict[str, dict[str, Any]] = {
    "dataflex seed 1": {"seed": 1},
    "dataflex seed 2": {"seed": 2},
    "dataflex exact": {"scoring": "exact"},
}


class Adam(NamedTuple):
    """Moments of all trained parameters in one vector each, [D], and the optimizer's constants."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def direction(self, gradient: Tensor) -> Tensor:
        """The code's form of the Adam update for one sample's gradient, [D]."""
        m = self.beta1 * self.exp_avg + (1 - self.beta1) * gradient
        v = self.beta2 * self.exp_avg_sq + (1 - self.beta2) * gradient**2
        return m / torch.sqrt(v + self.eps)


def trained(net: Any) -> dict[str, Tensor]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def adam_of(net: Any, state: Mapping[Tensor, Any], dtype: torch.dtype) -> Adam:
    """From torch's optimizer state of the trained parameters."""
    first, second = (
        torch.cat([state[p][key].detach().flatten().to(dtype) for p in trained(net).values()])
        for key in ("exp_avg", "exp_avg_sq")
    )
    return Adam(first, second)


def sample_gradients(net: Any, samples: Sequence[Sample]) -> Iterator[Tensor]:
    """The gradient [D] of each sample's mean token loss, one backward each, in the model's dtype."""
    parameters = list(trained(net).values())
    device = parameters[0].device
    for sample in samples:
        ids, labels = (torch.tensor([sample[key]], device=device) for key in ("input_ids", "labels"))
        logits = net(input_ids=ids).logits
        loss = F.cross_entropy(logits[0, :-1].to(torch.promote_types(logits.dtype, torch.float32)), labels[0, 1:])
        yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def stacked(rows: Iterator[Tensor], count: int) -> Tensor:
    """[count, D], filled row by row."""
    out = torch.empty(0)
    for index, row in enumerate(rows):
        if index == 0:
            out = torch.empty(count, len(row), dtype=row.dtype, device=row.device)
        out[index] = row
    return out


def dense_rademacher(gradients: Tensor, proj_dim: int, seed: int) -> Tensor:
    """[n, D] to [n, proj_dim]: the product with random signs, drawn some rows at a time."""
    draw = torch.Generator().manual_seed(seed)
    out = gradients.new_zeros(len(gradients), proj_dim)
    for part in gradients.split(_ROWS_AT_ONCE, dim=1):
        signs = torch.randint(0, 2, (part.shape[1], proj_dim), generator=draw, dtype=torch.int8)
        out.addmm_(part, signs.to(part.dtype).mul_(2).sub_(1))
    return out / proj_dim**0.5


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def influence(train: Tensor, target: Tensor, subtasks: Sequence[int]) -> Tensor:
    """Scores [n] of features [n, d]: cosines with [m, d], mean within a subtask, the largest over subtasks."""
    return best_subtask(unit(train) @ unit(target).T, subtasks)


def best_subtask(cosines: Tensor, subtasks: Sequence[int]) -> Tensor:
    """[n, m] to [n]: the mean over the targets of a subtask, the largest of these."""
    groups = torch.tensor(list(subtasks))
    return torch.stack([cosines[:, groups == k].mean(1) for k in groups.unique()]).amax(0)


def best(scores: Any, share: float) -> list[int]:
    """Indices of the best ``share`` of the scores."""
    values = np.asarray(scores, dtype=np.float64)
    return np.argsort(-values, kind="stable")[: max(1, round(share * len(values)))].tolist()


def exact_cosines(net: Any, adam: Adam, pool: Sequence[Sample], target: Sequence[Sample]) -> Tensor:
    """Unprojected: [n, m], in the dtype of the model; one gradient of the pool at a time."""
    directions = unit(stacked(sample_gradients(net, target), len(target)))
    return torch.stack([directions @ (r / r.norm()) for r in map(adam.direction, sample_gradients(net, pool))])


def compare(data: Any, *, width: int, layers: int, rank: int, steps: int, proj_dim: int) -> list[dict[str, Any]]:
    """Rows: each pair of ways to score, with rank correlation and overlap at 10%."""
    named, target = data
    pool = [s for part in named.values() for s in part]
    net = llama(width, layers)
    warm_up(net, pool, steps, 1e-3)
    net = with_lora(net, rank)
    engine = engine_for(net, named, {"target": target}, micro_batch=8, steps=steps, lr=5e-4)
    for batch in engine.batches():
        engine.training_step(batch)
    scores = ours(engine, proj_dim)
    net.eval()
    adam = adam_of(net, engine.optimizer.state, torch.float32)
    subtasks = [0] * len(target)
    train, goal = map(adam.direction, sample_gradients(net, pool)), sample_gradients(net, target)
    rows_of_both = stacked(itertools.chain(train, goal), len(pool) + len(target))
    for seed in (1, 2):
        features = dense_rademacher(rows_of_both, proj_dim, seed).split([len(pool), len(target)])
        scores[f"reference seed {seed}"] = influence(*features, subtasks).numpy()
    wide = Adam(adam.exp_avg.double(), adam.exp_avg_sq.double())
    exact = exact_cosines(net.double(), wide, pool, target)
    scores["float64, not projected"] = best_subtask(exact, subtasks).numpy()
    rows = []
    for a, b in itertools.combinations(scores, 2):
        picked = overlap(best(scores[a], 0.1), best(scores[b], 0.1))
        agreement = {"overlap_at_10%": round(picked, 3), "spearman": round(spearman(scores[a], scores[b]), 4)}
        rows.append({"a": a, "b": b, **agreement})
    facts = {"proj_dim": proj_dim, "pool": len(pool), "targets": len(target), "parameters": len(adam.exp_avg)}
    return [row | facts for row in rows]


def ours(engine: Any, proj_dim: int) -> dict[str, np.ndarray]:
    """Scores of dataflex's own selector on the engine, batched, by the names in `OURS`."""
    from dataflex.train.selector.less_selector import LessSelector

    def scored(params: dict[str, Any]) -> np.ndarray:
        run = engine.run
        selector = LessSelector(run.pool, None, None, "", engine.scorer, engine.eval_pool, proj_dim=proj_dim, **params)
        table = selector.each()
        assert table is not None
        return table.max(axis=1)

    return {name: scored(params) for name, params in OURS.items()}


def script(doc: str | None) -> argparse.Namespace:
    """The arguments of the scripts that need real text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a dataset_dir with alpaca_en_demo, gsm8k_train and gsm8k_val")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="of the projections, where several are tried")
    parser.add_argument("--smoke", action="store_true", help="tiny and on random tokens: shows that everything runs")
    return parser.parse_args()


def finish(rows: list[dict[str, Any]], columns: Sequence[str], path: Path | None) -> None:
    from measure import machine

    show(rows, columns)
    if path:
        write_csv(path, [row | machine(torch.device("cpu")) for row in rows])


def text_or_smoke(asked: argparse.Namespace, cutoff_len: int, count: int, targets: int) -> Any:
    """The data, or None after a line that says why there is none."""
    if asked.smoke:
        return synthetic(24, 4, 24)
    reason = no_data(asked.data)
    if reason:
        print(f"skipped: {reason}")
        return None
    return real_text(asked.data, cutoff_len, count, targets)


def main() -> None:
    asked = script(__doc__)
    data = text_or_smoke(asked, cutoff_len=256, count=600, targets=48)
    if data is None:
        return
    start_process()
    size: dict[str, int] = dict(width=32, layers=1, rank=4, steps=2, proj_dim=512)
    size = size if asked.smoke else dict(width=128, layers=4, rank=16, steps=80, proj_dim=8192)
    finish(compare(data, **size), ("a", "b", "overlap_at_10%", "spearman"), asked.csv)


if __name__ == "__main__":
    main()
    end_process()
