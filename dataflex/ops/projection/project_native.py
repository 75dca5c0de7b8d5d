"""Which implementation of the projection ops runs, and the chunked form of CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dataflex.ops.known import values_of
from dataflex.ops.native import _ext
from dataflex.ops.projection import project_reference as reference
from dataflex.ops.projection.arguments import Outputs, Treatment
from dataflex.ops.projection.hashing import tile_shape
from dataflex.ops.projection.project_kinds import PROJECTIONS

NATIVE_KINDS = ("xorfold", "countsketch", "sjlt")
_BUFFER_BYTES = 128 << 20
_FUSED_DIM = 512
_FUSED_DIRECTIONS = 8


def _nothing(*_: Any, **__: Any) -> None:
    """The fake of an op that only changes its arguments."""


_ext.define("fused_limit(Tensor like) -> int")
for _schema in (reference.OUTER_SCHEMA, reference.VALUES_SCHEMA):
    _ext.define(_schema, fake=_nothing)


def native_ops(out: Tensor, kind: int) -> Any | None:
    """The namespace whose ops can add to ``out``, or None for the reference."""
    if out.dtype is not torch.float32 or (out.shape[1] and PROJECTIONS[kind] not in NATIVE_KINDS):
        return None
    return _ext.ops_for(out.device)


def implementation(device: torch.device) -> str:
    """One line for `dataflex.ops.implementations`."""
    space = _ext.ops_for(device)
    if space is None:
        return "portable PyTorch"
    return f"native {device.type} ({', '.join(NATIVE_KINDS)}; the other projections portable)"


def outer(outputs: Outputs, row: Tensor, col: Tensor, cu_seqlens: Tensor, scale: Tensor, how: Treatment) -> None:
    """`project_reference.project_outer`, by the fastest implementation that takes these arguments."""
    ops = native_ops(outputs.out, how.kind)
    if ops is None:
        reference.project_outer(outputs, row, col, cu_seqlens, scale, how)
        return
    how = how.each(_plain, _plain)
    row, col = (row, col) if row.dtype is col.dtype else (row.float(), col.float())
    row, col = _inner_contiguous(row), _inner_contiguous(col)
    kernels = outputs.out.device.type == "cuda" or ops is torch.ops.dataflex_emu
    if kernels and not fused_fits(ops, outputs, row, col, how):
        chunked(ops, outputs, row, col, cu_seqlens, scale, how)
    else:
        ops.project_outer(*outputs.tensors, row, col, cu_seqlens, scale, *how.flat)


def fused_fits(ops: Any, outputs: Outputs, row: Tensor, col: Tensor, how: Treatment) -> bool:
    """Whether the tensor-core kernel takes these: 16-bit inputs whose rows lie at multiples of 16 bytes, and outputs
    that the device has the shared memory for."""
    proj_dim = outputs.out.shape[1]
    sizes = (row.shape[1], col.shape[1], row.stride(0), col.stride(0), how.row_offset, how.col_offset)
    return (
        PROJECTIONS[how.kind] == "xorfold"
        and (proj_dim == 0 or _FUSED_DIM <= proj_dim <= ops.fused_limit(outputs.out))
        and outputs.dots.shape[1] <= _FUSED_DIRECTIONS
        and row.dtype in (torch.bfloat16, torch.float16)
        and all(size % 8 == 0 for size in sizes)
        and all(x.data_ptr() % 16 == 0 for x in (row, col, *how.matrices))
    )


def chunked(
    ops: Any, outputs: Outputs, row: Tensor, col: Tensor, cu_seqlens: Tensor, scale: Tensor, how: Treatment
) -> None:
    """A library product into a buffer, then the epilogue kernel, rows by rows: few rounds, since each has launches."""
    bounds = values_of(cu_seqlens)
    proj_dim, samples, m, k = outputs.out.shape[1], len(scale), row.shape[1], col.shape[1]
    step = tile_shape(proj_dim)[0] if PROJECTIONS[how.kind] == "xorfold" and proj_dim else 1
    per_chunk = max(1, _BUFFER_BYTES // max(1, 4 * samples * k * step)) * step
    pieces = torch.arange(samples + 1, device=row.device)
    for start in range(0, m, per_chunk):
        end = min(start + per_chunk, m)
        grad = _products(row[:, start:end], col, bounds)
        part = how.rows(start, end).each(_plain, _plain)
        ops.project_values(*outputs.tensors, grad, None, pieces, scale, *part.flat, False)


def _products(row: Tensor, col: Tensor, bounds: list[int]) -> Tensor:
    """float32 [S, m, K]; 16-bit inputs are multiplied as they are and summed in float32 where torch can."""
    if row.dtype is torch.float32 or row.device.type != "cuda":
        return reference.outer_sums(row.float(), col.float(), bounds)
    samples, tokens = len(bounds) - 1, len(row)
    if samples and tokens and bounds == list(range(0, tokens + 1, max(1, tokens // samples))):
        left = row.view(samples, -1, row.shape[1]).transpose(1, 2)
        return torch.bmm(left, col.view(samples, -1, col.shape[1]), out_dtype=torch.float32)
    grad = torch.zeros(samples, row.shape[1], col.shape[1], device=row.device)
    for s, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if b > a:
            grad[s] = torch.mm(row[a:b].T, col[a:b], out_dtype=torch.float32)
    return grad


def values(
    outputs: Outputs,
    grad: Tensor,
    row_ids: Tensor | None,
    bounds: Tensor,
    scale: Tensor,
    how: Treatment,
    *,
    minus_zero: bool,
) -> None:
    """`project_reference.project_values`, by the fastest implementation that takes these arguments."""
    ops = native_ops(outputs.out, how.kind)
    if ops is None:
        reference.project_values(outputs, grad, row_ids, bounds, scale, how, minus_zero=minus_zero)
        return
    how = how.each(_plain, _plain)
    grad = grad.float().contiguous()
    ops.project_values(*outputs.tensors, grad, row_ids, bounds, scale, *how.flat, minus_zero)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _inner_contiguous(tensor: Tensor) -> Tensor:
    """[N, M] with neighbouring columns side by side, in a dtype that the kernels read; a view where it is so."""
    known = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    tensor = tensor if known else tensor.float()
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
