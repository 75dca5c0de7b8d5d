"""Rows of the losses for bench_ops.py.

Against plain `cross_entropy`, the same under torch.compile, and, on a GPU, Liger-Kernel's and cut-cross-entropy's
fused linear losses where they are installed. Samples of 256 tokens, every token counted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import Bench, Row, Variant, relative_error
from torch import Tensor

from dataflex.ops import linear_per_sample_loss, loss_and_head_sketch, per_sample_loss

K1 = 2048
PLAIN = "cross_entropy"


class Data(NamedTuple):
    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    @property
    def shape(self) -> str:
        tokens, vocabulary = self.logits.shape
        return f"{tokens}x{vocabulary} {str(self.logits.dtype).removeprefix('torch.')}"


def rows(bench: Bench, bandwidth: Mapping[str, float]) -> Iterator[Row]:
    """bandwidth: bytes per millisecond of reading ("read") and of copying ("copy")."""
    cuda = bench.device.type == "cuda"
    sizes = [(64, 515)] if bench.smoke else [(2048, 32000), (2048, 50257), (2048, 128256)] if cuda else [(2048, 32000)]
    for tokens, vocabulary in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            data = make(bench, tokens, vocabulary, dtype)
            yield from forward_rows(bench, data, bandwidth["read"])
            yield from both_rows(bench, data, bandwidth["copy"])
            yield from sketch_rows(bench, data, bandwidth["read"])
            del data
    head = (64, 515, 32) if bench.smoke else (8192, 128256, 4096) if cuda else (512, 32000, 256)
    for dtype in (torch.bfloat16, torch.float32):
        yield from linear_rows(bench, *head, dtype)


def make(bench: Bench, tokens: int, vocabulary: int, dtype: torch.dtype) -> Data:
    draw = torch.Generator(device=bench.device).manual_seed(0)
    where = {"device": bench.device, "generator": draw}
    logits = torch.randn(tokens, vocabulary, **where).mul_(4).to(dtype)
    return Data(logits, torch.randint(0, vocabulary, (tokens,), **where), segments(tokens, bench.device))


def segments(tokens: int, device: torch.device) -> Tensor:
    return torch.arange(0, tokens + 1, min(256, tokens), device=device)


def checked(results: Mapping[str, Tensor], exact: Tensor, *, allowed: float = 2e-2) -> dict[str, float]:
    """Relative errors; stops at one that is no rounding."""
    errors = {name: relative_error(result, exact) for name, result in results.items()}
    wrong = {name: error for name, error in errors.items() if not error < allowed}
    assert not wrong, f"wrong results: {wrong}"
    return errors


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def baselines(data: Data) -> dict[str, Callable[[Tensor], Tensor]]:
    """What runs instead of `per_sample_loss`: logits to token losses."""
    found: dict[str, Callable[[Tensor], Tensor]] = {PLAIN: lambda x: plain(x, data.labels)}
    if data.logits.is_cuda:
        compiled = torch.compile(plain)
        found["torch.compile"] = lambda x: compiled(x, data.labels)
        liger = installed("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction")
        if liger is not None:  # overwrites its logits, so that it gets a copy outside of what others see
            arguments = (data.labels, None, -100, 0.0, 0.0, "none")
            found["liger"] = lambda x: liger.apply(x, *arguments)[0]
    return found


def installed(module: str, name: str) -> Any | None:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def exact_losses(logits: Tensor, labels: Tensor) -> Tensor:
    parts = zip(logits.split(64), labels.split(64), strict=True)
    return torch.cat([plain(x.double(), y) for x, y in parts])


def forward_rows(bench: Bench, data: Data, read: float) -> list[Row]:
    others = {name: f for name, f in baselines(data).items() if name != "liger"}
    both = data.logits, data.logits.flip(0)  # in turn; neither is in a cache when its turn comes
    others |= {
        "dataflex": lambda x: per_sample_loss(x, *data[1:]).token_loss,
        "dataflex, softcap": lambda x: per_sample_loss(x, *data[1:], softcap=30.0).token_loss,
    }
    variants = {name: [lambda f=f, x=x: f(x) for x in both] for name, f in others.items()}
    with torch.no_grad():
        results = {name: f(data.logits) for name, f in others.items() if "softcap" not in name}
        errors = checked(results, exact_losses(data.logits, data.labels))
        floor_ms = data.logits.nbytes / read
        how = dict(against=PLAIN, floor_ms=floor_ms, floor="one read", errors=errors)
        return bench.rows("per_sample_loss forward", data.shape, variants, **how)


def both_rows(bench: Bench, data: Data, copy: float) -> list[Row]:
    """Forward and backward. The gradient is wanted, not added to another, as in the middle of a model."""
    leaves = [logits.detach().requires_grad_() for logits in (data.logits, data.logits.flip(0))]
    ours = {
        "dataflex": lambda x: per_sample_loss(x, *data[1:]).token_loss,
        "dataflex, in place": lambda x: per_sample_loss(x, *data[1:], inplace_backward=True).token_loss,
    }

    def run(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        loss = f(x)
        return torch.autograd.grad(loss, x, torch.ones_like(loss))[0]

    # What overwrites its logits has a copy of its own, made anew before each call.
    spare = data.logits.clone()
    variants: dict[str, Variant | list[Variant]] = {}
    before: dict[str, Variant] = {}
    results = {}
    for name, f in {**baselines(data), **ours}.items():
        if name in ("liger", "dataflex, in place"):
            variants[name] = lambda f=f: run(f, spare.detach().requires_grad_())
            before[name] = lambda: spare.copy_(data.logits)
        else:
            variants[name] = [lambda f=f, x=x: run(f, x) for x in leaves]
        spare.copy_(data.logits)
        first = variants[name]
        results[name] = (first if callable(first) else first[0])()[:8].clone()
    few = data.logits[:8].double().requires_grad_()
    (exact,) = torch.autograd.grad(plain(few, data.labels[:8]).sum(), few)
    errors = checked(results, exact)
    floor_ms = 2 * data.logits.nbytes / copy
    how = dict(against=PLAIN, floor_ms=floor_ms, floor="one read, one write", errors=errors, before=before)
    return bench.rows("per_sample_loss forward + backward", data.shape, variants, **how)


def sketch_rows(bench: Bench, data: Data, read: float) -> list[Row]:
    """Speedup is relative to the loss alone: the aim is 1 / 1.3 on a CPU, 1 / 1.2 on a GPU."""
    fold = {"k1": min(K1, 64 if bench.smoke else K1), "seed": 1, "tensor_id": 2}
    variants: dict[str, Variant] = {
        "loss alone": lambda: per_sample_loss(*data),
        "dataflex": lambda: loss_and_head_sketch(*data, **fold),
    }
    few = data.logits[:8], data.labels[:8], torch.tensor([0, 8], device=bench.device)
    got = loss_and_head_sketch(*few, **fold).sketch
    errors = checked({"dataflex": got}, loss_and_head_sketch(few[0].double(), *few[1:], **fold).sketch)
    floor_ms = (data.logits.nbytes + 4 * fold["k1"] * len(data.logits)) / read
    how = dict(against="loss alone", floor_ms=floor_ms, floor="one read, the sketch written", errors=errors)
    return bench.rows(f"loss_and_head_sketch k1={fold['k1']}", data.shape, variants, **how)


def linear_rows(bench: Bench, tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> list[Row]:
    """Loss and gradients of hidden states (head frozen, as in scoring), and of the head too (training)."""
    draw = torch.Generator(device=bench.device).manual_seed(0)
    where = {"device": bench.device, "generator": draw}
    hidden = torch.randn(tokens, width, **where).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, **where).mul_(width**-0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), **where)
    cu_seqlens = segments(tokens, bench.device)
    ours = lambda h, w: linear_per_sample_loss(h, w, labels, cu_seqlens, reduction="sum").loss.sum()  # noqa: E731
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        PLAIN: lambda h, w: F.cross_entropy((h @ w.T).float(), labels, reduction="sum"),
        "dataflex": ours,
    }
    liger = installed("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss") if hidden.is_cuda else None
    if liger is not None:
        fused = liger(reduction="sum")
        losses["liger"] = lambda h, w: fused(w, h, labels)
    cut = installed("cut_cross_entropy", "linear_cross_entropy") if hidden.is_cuda else None
    if cut is not None:
        losses["cut-cross-entropy"] = lambda h, w: cut(h, w, labels, reduction="sum")
    few = hidden[:8].detach().double().requires_grad_()
    exact_loss = plain(few @ weight.double().T, labels[:8]).sum()
    (exact,) = torch.autograd.grad(exact_loss, few)
    product_ms = 2 * tokens * vocabulary * width / bench.matmul_rate(dtype)
    made = []
    for what, products, leaf in (("hidden", 2, weight), ("hidden and weight", 3, weight.clone().requires_grad_())):
        inputs = [hidden, leaf] if leaf.requires_grad else [hidden]
        variants: dict[str, Variant] = {
            name: (lambda f=f, inputs=inputs, leaf=leaf: torch.autograd.grad(f(hidden, leaf), inputs))
            for name, f in losses.items()
        }
        errors = checked({name: variant()[0][:8] for name, variant in variants.items()}, exact, allowed=5e-2)
        shape = f"{tokens}x{width}x{vocabulary} {str(dtype).removeprefix('torch.')}"
        how = dict(against=PLAIN, floor_ms=products * product_ms, floor=f"{products} products", errors=errors)
        made += bench.rows(f"linear_per_sample_loss, gradients of {what}", shape, variants, **how)
    return made
