"""Every public op with every option, once each: what `test_rows` runs on the device and compares with float64.

`OPTIONS` has a row for each parameter of each op's signature, and for each field of those that are dataclasses;
`test_every_op_and_option_has_a_row` holds it to that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataflex import ops
from dataflex.ops import Projection, Sums, Transform
from dataflex.ops.projection.project_kinds import PROJECTIONS
from dataflex.ops.projection.transforms import TRANSFORMS

Arguments = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_KERNELS = {"implementations", "shift_labels", "tensor_id"}
TOKENS, VOCABULARY, WIDTH = 23, 67, 24
# Tensors of the model's dtype; the others are float32, as the optimizer has them.
OF_THE_MODEL = ("logits", "hidden", "weight", "bias", "row", "col", "grad", "values")


class Row(NamedTuple):
    op: str
    option: str
    value: str
    change: Any  # a value, or f(draw, arguments) -> the arguments that change


def randn(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw)


def _labels(draw: torch.Generator) -> Tensor:
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    return labels.where(torch.rand(TOKENS, generator=draw) > 0.3, -100)


def base(op: str, draw: torch.Generator) -> Arguments:
    """The arguments without options; segments of 0, 9 and 14 tokens."""
    cu_seqlens = torch.tensor([0, 9, 9, TOKENS])
    if op in ("per_sample_loss", "loss_and_head_sketch", "linear_per_sample_loss", "merge_vocab_shards"):
        made = {"labels": _labels(draw), "cu_seqlens": cu_seqlens}
        if op == "linear_per_sample_loss":
            return {"hidden": randn(draw, TOKENS, WIDTH), "weight": randn(draw, VOCABULARY, WIDTH), **made}
        logits = {"logits": 3 * randn(draw, TOKENS, VOCABULARY)}
        how = {"k1": 64, "seed": 3, "tensor_id": 7} if op == "loss_and_head_sketch" else {}
        return logits | made | how
    how = {"transform": Transform(), "seed": 1, "tensor_id": 2}
    if op == "project_zero":
        return {"shape": (40, 48), "out": 512, **how}
    if op == "project_dense_":
        return {"out": 512, "grad": randn(draw, 3, 48), **how}
    made = {"out": 512, "cu_seqlens": cu_seqlens, **how}
    if op == "project_rows_":
        ids = torch.randint(0, 40, (TOKENS,), generator=draw)
        return made | {"row_ids": ids, "values": randn(draw, TOKENS, 48)}
    return made | {"row": randn(draw, TOKENS, 40), "col": randn(draw, TOKENS, 48)}


def _shape(arguments: Arguments) -> tuple[int, ...]:
    """Of the parameter that an op projects the gradients of."""
    if "shape" in arguments:
        return tuple(arguments["shape"])
    if "grad" in arguments:
        return (arguments["grad"].shape[1],)
    return (40, 48)


def adam(kind: str = "adam_less") -> Callable[..., Arguments]:
    def change(draw: torch.Generator, arguments: Arguments) -> Arguments:
        shape = _shape(arguments)
        moments = {"exp_avg": 0.1 * randn(draw, *shape), "exp_avg_sq": torch.rand(*shape, generator=draw)}
        return {"transform": Transform(kind, 0.9, 0.99, 1e-4, 3), **(moments if kind != "sgd" else {})}

    return change


def exact(draw: torch.Generator, arguments: Arguments) -> Arguments:
    wanted = {"sqnorm": True, "dots": 3, "directions": randn(draw, 3, *_shape(arguments))}
    return adam()(draw, arguments) | wanted


def kind_of(projection: str) -> Callable[..., Arguments]:
    def change(draw: torch.Generator, arguments: Arguments) -> Arguments:
        return {"kind": projection} | ({} if projection == "kronecker" else adam()(draw, arguments))

    return change


def based(draw: torch.Generator, arguments: Arguments) -> Arguments:
    return exact(draw, arguments) | {"base": Sums(randn(draw, 1, 512), randn(draw, 1), randn(draw, 1, 3))}


def head(draw: torch.Generator, arguments: Arguments) -> Arguments:
    return {"logits": randn(draw, TOKENS, WIDTH), "weight": randn(draw, VOCABULARY, WIDTH)}


def _numbers(count: int) -> Callable[..., Tensor]:
    return lambda draw: torch.rand(count, generator=draw)


def tensor(name: str, count: int) -> Callable[..., Arguments]:
    return lambda draw, arguments: {name: _numbers(count)(draw)}


def counted_too(draw: torch.Generator, arguments: Arguments) -> Arguments:
    return {"ignore_index": 3, "labels": arguments["labels"].where(arguments["labels"] >= 0, 3)}


_LOSS: dict[str, list[Any]] = {
    "ignore_index": [counted_too],
    "reduction": ["sum"],
    "token_weight": [tensor("token_weight", TOKENS)],
    "class_weight": [tensor("class_weight", VOCABULARY)],
    "z_loss": [1e-3],
}
_MORE_LOSS = _LOSS | {"label_smoothing": [0.1], "softcap": [8.0]}
_LINEAR = {"chunk_tokens": [4], "bias": [lambda draw, a: {"bias": randn(draw, VOCABULARY)}]}
_PROJECT: dict[str, list[Any]] = {
    "transform": [adam(kind) for kind in TRANSFORMS],
    "exp_avg": [adam()],
    "exp_avg_sq": [adam("adam")],
    "seed": [2**62 + 5],
    "tensor_id": [2**31 + 1],
    "kind": [kind_of(projection) for projection in PROJECTIONS],
    "sqnorm": [exact],
    "directions": [exact],
    "dots": [lambda draw, a: exact(draw, a) | {"out": None}],
    "row_offset": [8, 5],
    "col_offset": [16, 3],
    "out": [4, 64, 4096, 8192, 16384],
}
_ROWS = {"scale": [0.5, tensor("scale", 3)]}
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "per_sample_loss": _MORE_LOSS | {"vocab_offset": [0], "inplace_backward": [True]},
    "merge_vocab_shards": _LOSS,
    "linear_per_sample_loss": _MORE_LOSS | _LINEAR | {"vocab_offset": [0], "scale": [0.5], "half_logits": [True]},
    "loss_and_head_sketch": _MORE_LOSS
    | {"k1": [16, 128, 2048, 4096, 8192], "seed": [2**62], "tensor_id": [2**31], "inplace_backward": [True]}
    | {"weight": [head], "chunk_tokens": [lambda draw, a: head(draw, a) | {"chunk_tokens": 4}]}
    | {"bias": [lambda draw, a: head(draw, a) | {"bias": randn(draw, VOCABULARY)}]},
    "project_per_sample_grad_": _PROJECT | _ROWS,
    "project_dense_": _PROJECT,
    "project_rows_": _PROJECT | _ROWS | {"base": [based]},
    "project_zero": _PROJECT | {"shape": [lambda draw, a: {"shape": (9, 40)} | adam()(draw, {"shape": (9, 40)})]},
}


def rows() -> Iterator[Row]:
    for op, options in OPTIONS.items():
        yield Row(op, "none", "", {})
        for option, values in options.items():
            for place, value in enumerate(values):
                yield Row(op, option, str(place if callable(value) else value), value)


def arguments_of(row: Row, dtype: torch.dtype) -> Arguments:
    """On the CPU; tensors of the model rounded to ``dtype``."""
    draw = torch.Generator().manual_seed(11)
    made = base(row.op, draw)
    change = (
        row.change(draw, made) if callable(row.change) else {row.option: row.change} if row.option != "none" else {}
    )
    made |= change
    return {name: _rounded(name, value, dtype) for name, value in made.items()}


def _rounded(name: str, value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if name in OF_THE_MODEL and isinstance(value, Tensor) else value


def run(op: str, arguments: Arguments, device: torch.device, wide: bool) -> dict[str, Tensor]:
    """The op's results by name, on the CPU in float64; wide: computed in float64 as well."""

    def there(value: Any) -> Any:
        if isinstance(value, Sums):
            return Sums(*map(there, value.tensors))
        if not isinstance(value, Tensor):
            return value
        value = value.to(device)
        return value.double() if wide and value.is_floating_point() else value

    made = {name: there(value) for name, value in arguments.items()}
    found = _projected(op, made, device, wide) if op.startswith("project") else _losses(op, made)
    return {name: value.detach().double().cpu() for name, value in found.items()}


def _losses(op: str, made: Arguments) -> dict[str, Tensor]:
    leaves = {name: made[name].requires_grad_() for name in OF_THE_MODEL if isinstance(made.get(name), Tensor)}
    call = made | leaves
    if made.get("inplace_backward"):
        call["logits"] = call["logits"] * 1
    if op == "merge_vocab_shards":
        shards, logits = [], call.pop("logits")
        how = {"ignore_index": made.get("ignore_index", -100)}
        for start, stop in ((0, 30), (30, VOCABULARY)):
            shards.append(
                ops.per_sample_loss(
                    logits[:, start:stop], made["labels"], made["cu_seqlens"], vocab_offset=start, **how
                )
            )
        result = ops.merge_vocab_shards(shards, **call)
    else:
        result = getattr(ops, op)(**call)
    found = {name: value for name, value in result._asdict().items() if name != "count"}
    weights = torch.tensor([1.0, 2.0, 3.0], device=result.loss.device, dtype=result.loss.dtype)
    total = (result.loss * weights).sum() + 0.1 * result.token_loss.sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return found | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _projected(op: str, made: Arguments, device: torch.device, wide: bool) -> dict[str, Tensor]:
    where: Any = {"device": device, "dtype": torch.float64 if wide else torch.float32}
    samples, found = 1 if op == "project_zero" else 3, {}
    if made["out"] is not None:
        found["out"] = torch.zeros(samples, made["out"], **where)
    if made.get("sqnorm"):
        found |= {"sqnorm": torch.zeros(samples, **where), "dots": torch.zeros(samples, made["dots"], **where)}
    of = Projection(**{field.name: made[field.name] for field in fields(Projection) if field.name in made})
    rest = {name: made[name] for name in inspect.signature(getattr(ops, op)).parameters if name in made}
    assert getattr(ops, op)(sums := Sums(**found), of=of, **rest) is sums
    return found
