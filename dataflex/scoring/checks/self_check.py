"""Does scoring do what it should on this very model and engine? Compared with plain autograd, sample by sample."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataflex.forward.counted import Counted
from dataflex.forward.losses import Forward
from dataflex.forward.split import split_batch
from dataflex.ops import Projection, Sums, project_rows_, tensor_id
from dataflex.scoring.batches import Ids
from dataflex.scoring.context import evaluating, frozen, leaf_embeddings
from dataflex.scoring.gradients.coverage import Target, find_targets, parameter_names
from dataflex.scoring.gradients.exact import exact_dots
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.gradients.sinks import as_matrix
from dataflex.scoring.gradients.spec import FeatureSpec
from dataflex.scoring.scorer import Floats, Scorer
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

# Largest relative error of a sample's feature: both sides round in the model's dtype, in another order.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
GROUP_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Verdict:
    """One check: what was checked, whether it held, and the figure."""

    what: str
    ok: bool
    detail: str

    @property
    def line(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.what}: {self.detail}"


def check_one_sample(scorer: Scorer, dataset: Any, spec: FeatureSpec) -> None:
    """Compare the first sample with autograd, over the smallest parameter of each kind of layer.

    Costs a forward and backward of one sample. RuntimeError where they differ.
    """
    targets = find_targets(scorer.engine.module, spec.layers)
    names = _one_of_each_kind(scorer.engine.module, targets)
    verdict = compare_with_autograd(scorer, dataset, np.zeros(1, dtype=np.int64), spec, [names])
    if not verdict.ok:
        raise RuntimeError(f"self-check of the gradient features failed: {verdict.detail}; see dataflex-cli check")
    logger.info(f"self-check of the gradient features: {verdict.detail}")


def check_scoring(scorer: Scorer, dataset: Any, ids: Ids, spec: FeatureSpec) -> list[Verdict]:
    """All checks on the samples ``ids``; the same list on every rank."""
    module = scorer.engine.module
    names = list(dict.fromkeys(parameter_names(find_targets(module, spec.layers))))
    before = state_checksums(scorer.engine)
    forwards, backwards = (_values(scorer, dataset, i, spec) for i in (ids, ids[::-1].copy()))
    changed = [key for key, value in state_checksums(scorer.engine).items() if value != before[key]]
    changed = sorted({key for part in dist.gather_objects(changed) for key in part})
    copies = dist.gather_objects(zlib.crc32(forwards.tobytes()))
    apart = _error(backwards[::-1], forwards)
    tolerance = TOLERANCE[_dtype(module)]
    agree = len(set(copies)) == 1 and apart < tolerance
    norms = np.linalg.norm(forwards, axis=1)
    kind = "exact norms" if not spec.proj_dim else f"{spec.projection} features of {spec.proj_dim}"
    return [
        Verdict("coverage", True, f"{len(names)} parameters are tapped"),
        compare_with_autograd(scorer, dataset, ids, spec, _groups(module, names)),
        Verdict("ranks agree", agree, f"{len(copies)} of them; a sample on another one differs by {apart:.1e}"),
        Verdict("non-zero", bool((norms > 0).all()), f"{kind}: norms {norms.min():.3g} to {norms.max():.3g}"),
        Verdict("training state", not changed, f"changed: {', '.join(changed)}" if changed else "untouched"),
    ]


def compare_with_autograd(
    scorer: Scorer, dataset: Any, ids: Ids, spec: FeatureSpec, groups: Sequence[Sequence[str]]
) -> Verdict:
    """The samples' features over each group of parameters, from the taps and from plain autograd; a collective."""
    module = scorer.engine.module
    worst, where = 0.0, ""
    for names in groups:
        factors = spec.layers.factors([n for n, p in module.named_parameters() if p.requires_grad])
        part = replace(spec, layers=LayerRule(tuple(names), tuple((n, factors[n]) for n in names)))
        tapped = _values(scorer, dataset, ids, part)
        plain = _plain_values(scorer, dataset, ids, part, factors)
        error = _error(tapped, plain)
        if not error <= worst:
            worst, where = error, names[0]
    tolerance = TOLERANCE[_dtype(module)]
    dtype = str(_dtype(module)).removeprefix("torch.")
    text = f"{len(ids)} sample{'s' if len(ids) > 1 else ''}, largest relative error {worst:.1e}"
    text += f" ({dtype} tolerance {tolerance:g})"
    return Verdict("single-sample autograd", worst <= tolerance, text if worst <= tolerance else f"{text} at {where}")


def _values(scorer: Scorer, dataset: Any, ids: Ids, spec: FeatureSpec) -> Floats:
    """Features [n, proj_dim], or norms [n, 1] for exact scoring."""
    if spec.proj_dim:
        return scorer.gradient_features(dataset, ids, **spec.projected())
    _, sqnorm = exact_dots(scorer, dataset, {}, ids, adam=spec.adam, layers=spec.layers)
    return np.sqrt(sqnorm)[:, None]


def _plain_values(scorer: Scorer, dataset: Any, ids: Ids, spec: FeatureSpec, factors: dict[str, float]) -> Floats:
    """`_values` from one autograd call for each sample, on every rank."""
    rows = []
    moments, how = scorer.moments(list(spec.layers.layers), spec.adam)
    for i in ids:
        grads = _sample_gradient(scorer, dataset[int(i)], list(spec.layers.layers))
        out = torch.zeros(1, spec.proj_dim, device=scorer.device)
        square = torch.zeros(1, dtype=torch.float64, device=scorer.device)
        for name, grad in grads.items():
            m, v = (_matrix(x) for x in moments[name]) if moments else (None, None)
            value = how(_matrix(grad.float()), m, v) * factors[name]
            square += value.double().square().sum()
            if spec.proj_dim:
                _project(out, name, value, spec)
        rows.append(out if spec.proj_dim else square.sqrt().float()[None])
    return torch.cat(rows).cpu().numpy()


def _project(out: Tensor, name: str, value: Tensor, spec: FeatureSpec) -> None:
    """Add one whole gradient [M, K] row by row, so that no product over tokens is involved."""
    rows = torch.arange(len(value), device=value.device)
    bounds = torch.tensor([0, len(value)], device=value.device)
    project_rows_(Sums(out), rows, value, bounds, Projection(tensor_id(name), spec.seed, kind=spec.projection))


def _matrix(t: Tensor) -> Tensor:
    """Experts one below the other, vectors as one row."""
    return torch.atleast_2d(as_matrix(t))


def _sample_gradient(scorer: Scorer, sample: Any, names: list[str]) -> dict[str, Tensor]:
    """{name: gradient of the sample's loss} by plain autograd, for these parameters only.

    autograd.grad runs no gradient accumulation, so no ZeRO hook reduces anything; eval mode turns activation
    checkpointing off, which it does not go with. The gradients of the embeddings' outputs are asked for too: then
    the backward passes every layer, and ZeRO-3 lets go of what it fetched.
    """
    module = scorer.engine.module
    inputs, labels, _, cu_seqlens = split_batch(scorer.collator([sample]), scorer.device)
    ends: list[Tensor] = []
    with (
        evaluating(module, gradients=False),
        frozen(module),
        _requiring(module, names) as chosen,
        leaf_embeddings(module, ends),
        torch.enable_grad(),
    ):
        loss = Forward()(module, inputs, Counted(labels, cu_seqlens)).losses.loss.sum()
        grads = torch.autograd.grad(loss, [*chosen.values(), *ends], allow_unused=True)[: len(chosen)]
    scorer.release()
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in chosen.items()}
    return {
        n: torch.zeros(shapes[n], device=scorer.device) if g is None else g for n, g in zip(chosen, grads, strict=True)
    }


@contextmanager
def _requiring(module: nn.Module, names: list[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The named parameters require grad inside, in a module in which none does."""
    wanted = set(names)
    chosen = {n: p for n, p in module.named_parameters() if n in wanted}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter in chosen.values():
            parameter.requires_grad_(False)


def _error(got: Floats, truth: Floats) -> float:
    """Largest relative error of a row; NaN counts as infinite."""
    scale = np.maximum(np.linalg.norm(truth, axis=1), np.finfo(np.float32).tiny)
    error = np.linalg.norm(got - truth, axis=1) / scale
    return float(np.nan_to_num(error, nan=np.inf).max())


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _size(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _groups(module: nn.Module, names: list[str]) -> list[list[str]]:
    """The parameters in order, in groups whose gradients fit in memory together."""
    parameters = dict(module.named_parameters())
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = _size(parameters[name])
        if not groups or size > room:
            groups.append([])
            room = GROUP_ELEMENTS
        groups[-1].append(name)
        room -= size
    return groups


def _one_of_each_kind(module: nn.Module, targets: list[Target]) -> list[str]:
    """The smallest parameter of each kind of layer, weights and biases apart."""
    parameters = dict(module.named_parameters())
    smallest: dict[tuple[str, str], str] = {}
    for target in targets:
        for attribute, name in (pair for names in target.groups() for pair in names.items()):
            best = smallest.get((target.kind, attribute))
            if best is None or _size(parameters[name]) < _size(parameters[best]):
                smallest[target.kind, attribute] = name
    return list(dict.fromkeys(smallest.values()))


def state_checksums(engine: Any) -> dict[str, Any]:
    """Checksums of this rank's part of everything that training goes on from."""
    parameters = dict(engine.module.named_parameters())
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    kept = [v for state in getattr(optimizer, "state", {}).values() for v in state.values() if torch.is_tensor(v)]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "parameters": [_crc(local(p)) for p in parameters.values()],
        "requires_grad": [p.requires_grad for p in parameters.values()],
        "gradients": [None if p.grad is None else _crc(p.grad) for p in parameters.values()],
        "training mode": [m.training for m in engine.module.modules()],
        "optimizer state": [_crc(v) for v in kept],
        "random state": [
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
            [_crc(s) for s in (torch.get_rng_state(), *cuda)],
        ],
    }


def local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: under ZeRO-3 its part."""
    part: Tensor | None = getattr(parameter, "ds_tensor", None)
    return parameter if part is None else part


def _crc(tensor: Tensor) -> int:
    flat = tensor.detach().reshape(-1).cpu().contiguous()
    return zlib.crc32(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else 0


def require(verdicts: Sequence[Verdict]) -> None:
    """UserError if a check failed."""
    failed = [v.what for v in verdicts if not v.ok]
    if failed:
        raise UserError(f"check: failed: {', '.join(failed)}")
