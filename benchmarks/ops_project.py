"""Rows of the projections for bench_ops.py.

Against the library product that forms the same per-sample gradients, against TRAK's projector over them (rademacher,
float32, where `trak` is installed; its CUDA kernel where `fast_jl` is), and against the portable reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from measure import Bench, Row, Variant, relative_error
from torch import Tensor

from dataflex.ops import Projection, Sums, Transform, project_per_sample_grad_
from dataflex.ops.projection import project_native
from dataflex.ops.projection import project_reference as reference
from dataflex.ops.projection.arguments import Outputs, Treatment

SAMPLES, PROJ_DIM = 16, 4096
TRAK = "TRAK projector alone, sgd"
ADAM = Transform("adam_less", 0.9, 0.999, 1e-8)


class Shape(NamedTuple):
    """A matrix [m, k] and the tokens of each of the 16 samples."""

    name: str
    m: int
    k: int
    tokens: int


CPU_SHAPES = (Shape("LoRA A", 16, 2048, 256), Shape("LoRA B", 2048, 16, 256), Shape("linear", 256, 256, 128))
GPU_SHAPES = (
    Shape("LoRA A", 128, 4096, 512),
    Shape("LoRA B", 4096, 128, 512),
    Shape("linear", 4096, 4096, 512),
    Shape("LoRA A, rank 8", 8, 4096, 512),
)
SMOKE_SHAPES = (Shape("LoRA A", 8, 96, 4), Shape("linear", 64, 64, 4))


class Data(NamedTuple):
    shape: Shape
    row: Tensor
    col: Tensor
    cu_seqlens: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def gradients(self) -> Tensor:
        """The library product: [samples, m, k]."""
        by_sample = self.row.view(SAMPLES, -1, self.shape.m), self.col.view(SAMPLES, -1, self.shape.k)
        return torch.bmm(by_sample[0].transpose(1, 2), by_sample[1])


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Data:
    draw = torch.Generator().manual_seed(0)
    n = SAMPLES * shape.tokens
    row, col = (torch.randn(n, size, generator=draw).to(device, dtype) for size in (shape.m, shape.k))
    m = 0.1 * torch.randn(shape.m, shape.k, generator=draw)
    v = torch.rand(shape.m, shape.k, generator=draw) * shape.tokens
    cu_seqlens = torch.arange(SAMPLES + 1, device=device) * shape.tokens
    return Data(shape, row, col, cu_seqlens, m.to(device), v.to(device))


def features(data: Data, transform: Transform, projection: str, dtype: torch.dtype = torch.float32) -> Tensor:
    wide = dtype is torch.float64
    out = torch.zeros(SAMPLES, PROJ_DIM, dtype=dtype, device=data.row.device)
    row, col = (data.row.double(), data.col.double()) if wide else (data.row, data.col)
    of = Projection(2, 1, transform, projection, data.exp_avg, data.exp_avg_sq)
    project_per_sample_grad_(Sums(out), row, col, data.cu_seqlens, of)
    return out


def _only(out: Tensor) -> Outputs:
    return Outputs(out, out.new_zeros(0), out.new_zeros(len(out), 0))


def _treatment(data: Data, transform: Transform) -> Treatment:
    return Treatment(data.exp_avg, data.exp_avg_sq, tuple(transform.coefficients() or ()), None, 0, 1, 2)


def portable(data: Data, transform: Transform) -> Tensor:
    out = torch.zeros(SAMPLES, PROJ_DIM, device=data.row.device)
    scale = torch.ones(SAMPLES, device=out.device)
    reference.project_outer(_only(out), data.row, data.col, data.cu_seqlens, scale, _treatment(data, transform))
    return out


def exact_scores(data: Data, directions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[samples, 1 + queries]: squared norm and inner products."""
    sqnorm = torch.zeros(SAMPLES, dtype=dtype, device=data.row.device)
    dots = torch.zeros(SAMPLES, len(directions), dtype=dtype, device=data.row.device)
    row, col = (data.row.double(), data.col.double()) if dtype is torch.float64 else (data.row, data.col)
    of = Projection(2, 1, ADAM, exp_avg=data.exp_avg, exp_avg_sq=data.exp_avg_sq, directions=directions)
    project_per_sample_grad_(Sums(None, sqnorm, dots), row, col, data.cu_seqlens, of)
    return torch.cat([sqnorm[:, None], dots], dim=1)


def trak_projector(data: Data) -> Variant | None:
    """TRAK over the stacked gradients, which it needs in memory; None where it is not installed."""
    try:
        from trak.projectors import BasicProjector, CudaProjector, ProjectionType
    except ImportError:
        return None
    if data.row.device.type == "cpu" and data.row.dtype is not torch.float32:
        return None
    size = data.shape.m * data.shape.k
    device = data.row.device
    arguments: dict[str, Any] = {"grad_dim": size, "proj_dim": PROJ_DIM, "seed": 0, "device": device}
    arguments["proj_type"] = ProjectionType.rademacher
    if device.type == "cuda":
        try:
            projector = CudaProjector(**arguments, max_batch_size=16)
        except ModuleNotFoundError:
            return None
    else:
        projector = BasicProjector(**arguments, dtype=torch.float32)
    stacked = data.gradients().float().flatten(1)
    return lambda: projector.project(stacked, model_id=0)


def chunked(data: Data) -> Tensor:
    """The chunked form on CUDA, also where the fused kernel would run."""
    out = torch.zeros(SAMPLES, PROJ_DIM, device=data.row.device)
    ops = project_native.native_ops(out, 0)
    assert ops is not None
    scale = torch.ones(SAMPLES, device=out.device)
    project_native.chunked(ops, _only(out), data.row, data.col, data.cu_seqlens, scale, _treatment(data, ADAM))
    return out


def variants_of(data: Data) -> tuple[dict[str, Variant], dict[str, float]]:
    """What is timed, and the errors of ours against float64, checked."""
    truth = features(data, ADAM, "xorfold", torch.float64)
    variants: dict[str, Variant] = {
        "product only": data.gradients,
        "xorfold, adam": lambda: features(data, ADAM, "xorfold"),
        "xorfold, sgd": lambda: features(data, Transform(), "xorfold"),
        "portable xorfold, adam": lambda: portable(data, ADAM),
        "countsketch, adam": lambda: features(data, ADAM, "countsketch"),
        "sjlt, adam": lambda: features(data, ADAM, "sjlt"),
    }
    if data.row.device.type == "cuda" and data.row.dtype is not torch.float32:
        variants["xorfold chunked, adam"] = lambda: chunked(data)
    truths = {
        "xorfold, adam": truth,
        "portable xorfold, adam": truth,
        "xorfold chunked, adam": truth,
        "xorfold, sgd": features(data, Transform(), "xorfold", torch.float64),
        "countsketch, adam": features(data, ADAM, "countsketch", torch.float64),
        "sjlt, adam": features(data, ADAM, "sjlt", torch.float64),
    }
    errors = {name: relative_error(variants[name](), want) for name, want in truths.items() if name in variants}
    projector = trak_projector(data)
    if projector is not None:
        variants[TRAK] = projector
    wrong = {name: error for name, error in errors.items() if error > 1e-4}
    assert not wrong, f"{data.shape.name}: wrong features: {wrong}"
    return variants, errors


def rows(bench: Bench, bandwidth: Mapping[str, float]) -> Iterator[Row]:
    """Each shape in the device's dtypes; the floor is the product's operations at the measured rate."""
    cuda = bench.device.type == "cuda"
    shapes = SMOKE_SHAPES if bench.smoke else GPU_SHAPES if cuda else CPU_SHAPES
    for dtype in (torch.bfloat16, torch.float32):
        rate = bench.matmul_rate(dtype if cuda else torch.float32)
        for shape in shapes:
            data = make(shape, dtype, bench.device)
            flops = 2 * SAMPLES * shape.tokens * shape.m * shape.k
            moved = data.row.element_size() * SAMPLES * shape.tokens * (shape.m + shape.k) + 8 * shape.m * shape.k
            by_flops, by_bytes = flops / rate, moved / bandwidth["read"]
            floor = {"floor_ms": max(by_flops, by_bytes), "floor": "flops" if by_flops > by_bytes else "bytes"}
            name = f"{shape.name} {shape.m}x{shape.k}, {SAMPLES} x {shape.tokens} tokens, {str(dtype)[6:]}"
            variants, errors = variants_of(data)
            against = TRAK if TRAK in variants else "product only"
            yield from bench.rows(
                "project_per_sample_grad_", name, variants, against=against, errors=errors, slow=(TRAK,), **floor
            )
            yield from exact_rows(bench, data, name, floor)
    yield from hook_rows(bench)


def exact_rows(bench: Bench, data: Data, name: str, floor: dict[str, Any]) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(1)
    directions = torch.randn(4, data.shape.m, data.shape.k, generator=draw).to(bench.device)
    truth = exact_scores(data, directions.double(), torch.float64)
    error = relative_error(exact_scores(data, directions), truth)
    assert error < 1e-4, f"{name}: wrong scores: {error}"
    variants: dict[str, Variant] = {
        "product only": data.gradients,
        "exact scores, 4 directions": lambda: exact_scores(data, directions),
    }
    errors = {"exact scores, 4 directions": error}
    yield from bench.rows("exact scores", name, variants, against="product only", errors=errors, **floor)


def hook_rows(bench: Bench) -> Iterator[Row]:
    """What features of every sample add to forward and backward of a small Llama with LoRA."""
    from hook_cost import forward_backward

    variants, error = forward_backward(bench.device, bench.smoke)
    yield from bench.rows(
        "forward and backward of a LoRA Llama",
        "8 layers of 512, rank 8, 8 x 256 tokens" if not bench.smoke else "smoke",
        variants,
        against="without features",
        floor_ms=0.0,
        floor="none",
        errors={"with features": error},
    )
