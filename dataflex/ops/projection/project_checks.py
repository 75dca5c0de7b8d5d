"""What the public projection functions check, once, and how they hand it to the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.ops.projection.arguments import Outputs, Projection, Sums, Treatment
from dataflex.ops.projection.project_kinds import PROJECTIONS, check_proj_dim
from dataflex.ops.projection.segments import check_segments


def collect_outputs(sums: Sums, directions: Tensor | None, cu_seqlens: Tensor, device: torch.device) -> Outputs:
    out, sqnorm, dots = sums.out, sums.sqnorm, sums.dots
    if out is not None and (out.dim() != 2 or out.dtype not in (torch.float32, torch.float64)):
        raise ValueError(f"out: expected float32 [S, proj_dim], got {out.dtype} {tuple(out.shape)}")
    if (directions is None) != (dots is None):
        raise ValueError("directions, dots: expected both or neither")
    wanted = next((x for x in sums.tensors if x is not None), None)
    if wanted is None:
        raise ValueError("out: expected a tensor, or sqnorm or dots, got none of them")
    samples, dtype = max(0, len(cu_seqlens) - 1) if out is None else out.shape[0], wanted.dtype
    queries = directions.shape[0] if directions is not None and directions.dim() else 0
    for name, tensor, shape in (("sqnorm", sqnorm, (samples,)), ("dots", dots, (samples, queries))):
        if tensor is not None and (tensor.shape != shape or tensor.dtype is not dtype):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {got}")
    for name, tensor in (("out", out), ("sqnorm", sqnorm), ("dots", dots), ("directions", directions)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    none = torch.empty(samples, 0, dtype=dtype, device=device)
    return Outputs(
        none if out is None else out, none.flatten() if sqnorm is None else sqnorm, none if dots is None else dots
    )


def treatment(of: Projection, outputs: Outputs, shape: tuple[int | str, ...]) -> Treatment:
    """What is done with the gradients, checked; shape: of the matrix, or of the vector."""
    proj_dim, transform, directions = outputs.out.shape[1], of.transform, of.directions
    if proj_dim or of.kind not in PROJECTIONS:
        check_proj_dim(of.kind, proj_dim)
    if of.kind == "kronecker" and transform.needs_moments:
        raise ValueError(f"projection: 'kronecker' expects transform 'sgd', got '{transform.kind}'")
    limits = {"seed": 1 << 63, "tensor_id": 1 << 32, "row_offset": 1 << 31, "col_offset": 1 << 31}
    for name, limit in limits.items():
        if not 0 <= getattr(of, name) < limit:
            raise ValueError(f"{name}: expected 0 to {limit - 1}, got {getattr(of, name)}")
    how = transform.coefficients()
    if how is not None:
        _check_moments(of, shape, outputs.out.device)
    if directions is not None and directions.shape[1:] != shape:
        expected = ", ".join(map(str, ("Q", *shape)))
        raise ValueError(f"directions: expected [{expected}], got {tuple(directions.shape)}")
    moments = (of.exp_avg, of.exp_avg_sq) if how is not None else (None, None)
    kind = PROJECTIONS.index(of.kind) if proj_dim else 0
    coefficients = () if how is None else tuple(how)
    return Treatment(*moments, coefficients, directions, kind, of.seed, of.tensor_id, of.row_offset, of.col_offset)


def sample_scales(scale: float | Tensor, outputs: Outputs) -> Tensor:
    """[S] in out's dtype."""
    if not isinstance(scale, Tensor):
        return torch.full((outputs.samples,), scale, dtype=outputs.out.dtype, device=outputs.out.device)
    if scale.shape != (outputs.samples,) or scale.device != outputs.out.device:
        expected = f"a number or [{outputs.samples}] on {outputs.out.device}"
        raise ValueError(f"scale: expected {expected}, got {tuple(scale.shape)} on {scale.device}")
    return scale.to(outputs.out.dtype).contiguous()


def check_tokens(row: Tensor, col: Tensor, cu_seqlens: Tensor, samples: int) -> None:
    if row.dim() != 2 or col.dim() != 2 or row.shape[0] != col.shape[0]:
        raise ValueError(f"row, col: expected [N, M] and [N, K], got {tuple(row.shape)} and {tuple(col.shape)}")
    for name, tensor in (("row", row), ("col", col)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating point tensor, got {tensor.dtype}")
        if tensor.device != cu_seqlens.device:
            raise ValueError(f"{name}: expected a tensor on {cu_seqlens.device} like cu_seqlens, got {tensor.device}")
    check_segments(cu_seqlens, row.shape[0], samples)


def _check_moments(of: Projection, shape: tuple[int | str, ...], device: torch.device) -> None:
    for name, moment in (("exp_avg", of.exp_avg), ("exp_avg_sq", of.exp_avg_sq)):
        if moment is None or tuple(moment.shape) != shape:
            got = None if moment is None else tuple(moment.shape)
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name}: transform '{of.transform.kind}' expects [{expected}], got {got}")
        if moment.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {moment.device}")
