"""What the public projection functions check, once, and how they hand it to the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.ops.projection.arguments import Outputs, Treatment
from dataflex.ops.projection.project_kinds import PROJECTIONS, check_proj_dim
from dataflex.ops.projection.segments import check_segments
from dataflex.ops.projection.transforms import Transform


def collect_outputs(
    out: Tensor | None,
    sqnorm: Tensor | None,
    dots: Tensor | None,
    directions: Tensor | None,
    cu_seqlens: Tensor,
    device: torch.device,
) -> Outputs:
    if out is not None and (out.dim() != 2 or out.dtype not in (torch.float32, torch.float64)):
        raise ValueError(f"out: expected float32 [S, proj_dim], got {out.dtype} {tuple(out.shape)}")
    if (directions is None) != (dots is None):
        raise ValueError("directions, dots: expected both or neither")
    wanted = next((x for x in (out, sqnorm, dots) if x is not None), None)
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


def treatment(
    outputs: Outputs,
    transform: Transform,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    directions: Tensor | None,
    shape: tuple[int | str, ...],
    projection: str,
    seed: int,
    tensor_id: int,
    row_offset: int,
    col_offset: int,
) -> Treatment:
    """What is done with the gradients, checked; shape: of the matrix, or of the vector."""
    if outputs.out.shape[1] or projection not in PROJECTIONS:
        check_proj_dim(projection, outputs.out.shape[1])
    if projection == "kronecker" and transform.needs_moments:
        raise ValueError(f"projection: 'kronecker' expects transform 'sgd', got '{transform.kind}'")
    for name, number, limit in (
        ("seed", seed, 1 << 63),
        ("tensor_id", tensor_id, 1 << 32),
        ("row_offset", row_offset, 1 << 31),
        ("col_offset", col_offset, 1 << 31),
    ):
        if not 0 <= number < limit:
            raise ValueError(f"{name}: expected 0 to {limit - 1}, got {number}")
    how = transform.coefficients()
    moments = (exp_avg, exp_avg_sq) if how is not None else (None, None)
    if how is not None:
        _check_moments(transform, exp_avg, exp_avg_sq, shape, outputs.out.device)
    if directions is not None and directions.shape[1:] != shape:
        expected = ", ".join(map(str, ("Q", *shape)))
        raise ValueError(f"directions: expected [{expected}], got {tuple(directions.shape)}")
    kind = PROJECTIONS.index(projection) if outputs.out.shape[1] else 0
    coefficients = () if how is None else tuple(how)
    return Treatment(*moments, coefficients, directions, kind, seed, tensor_id, row_offset, col_offset)


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


def _check_moments(
    transform: Transform,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    shape: tuple[int | str, ...],
    device: torch.device,
) -> None:
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment is None or tuple(moment.shape) != shape:
            got = None if moment is None else tuple(moment.shape)
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name}: transform '{transform.kind}' expects [{expected}], got {got}")
        if moment.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {moment.device}")
