"""Taps: identity functions on layer outputs that see, in the backward, what a weight gradient is made of.

A layer's weight gradient for a sample is a sum over its tokens of products of the layer's input x and the
gradient delta of the layer's output. The tap saves x with save_for_backward (so that both kinds of activation
checkpointing recompute it) and receives delta in its own backward. Tensor hooks and full-backward hooks would
keep x alive and defeat checkpointing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataflex.scoring.coverage import Adapter, Target, parameter_names
from dataflex.scoring.experts import Routing, run_experts
from dataflex.utils.errors import UserError


class Sink(Protocol):
    """Takes the parts of per-sample gradients, [N, ...] over the flattened tokens of the batch."""

    def outer(self, name: str, row: Tensor, col: Tensor, per_token: int = 1) -> None:
        """Parameter [M, K] has gradient sum of row[t] col[t]^T; row [N * per_token, M], col [N * per_token, K]."""

    def dense(self, name: str, per_token: Tensor) -> None:
        """Parameter [K] has gradient sum of per_token[t]; per_token [N, K]."""

    def rows(self, name: str, row_ids: Tensor, values: Tensor) -> None:
        """Parameter [M, K] has gradient values[t] in row row_ids[t]; row_ids [N], values [N, K]."""

    def experts(self, name: str, row: Tensor, col: Tensor, tokens: Tensor, counts: list[int]) -> None:
        """Part e of parameter [E, M, K], [E * M, K] or [E, K] has gradient sum of row[p] col[p]^T over its rows p.

        row [P, M], col [P, K] sorted by expert; counts: rows of each expert; tokens [P]: the token of each row,
        ascending within an expert.
        """


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, deliver: Callable[..., None], *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        ctx.deliver = deliver
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            ctx.deliver(grads[0], *saved)
        return (grads[0], None, *(None for _ in saved))


def tap(output: Tensor, deliver: Callable[..., None], *saved: Tensor) -> Tensor:
    """``output``, whose gradient delta goes to ``deliver(delta, *saved)`` in the backward."""
    if not output.requires_grad:
        return output
    tapped: Tensor = _Tap.apply(output, deliver, *(s.detach() for s in saved))
    return tapped


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a norm's elementwise scale, float32, of x's shape."""
    x = x if x.dtype is torch.float64 else x.float()
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@contextmanager
def _linear_calls(shape: tuple[int, ...], seen: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Pass the output of every F.linear with a weight of ``shape`` through ``seen(output, input)``.

    ZeRO-3 replaces F.linear itself, by one that no torch function mode sees.
    """
    linear = F.linear

    def tapped(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = linear(input, weight, bias)
        return seen(output, input) if tuple(weight.shape) == shape else output

    F.linear = tapped
    try:
        yield
    finally:
        F.linear = linear


class Taps:
    """Context manager: inside, a backward through the model delivers every target's gradient to ``sink``.

    targets: from `find_targets`. Enter after `scoring_mode`, whose embedding leaves the taps go on top of. Call
    `start` before each forward and `check_fired` after each backward.
    """

    def __init__(self, targets: list[Target], sink: Sink) -> None:
        self.targets = targets
        self.sink = sink
        self.fired: Counter[str] = Counter()
        self.batch_rows, self.tokens = 0, 0
        self._handles: list[Any] = []
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> Taps:
        for target in self.targets:
            if target.kind in ("called", "experts"):
                self._replace_forward(target)
            else:
                hook = partial(self._hook, target)
                self._handles.append(target.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward
        self._handles.clear()
        self._replaced.clear()

    def start(self, batch_rows: int, tokens: int) -> None:
        """Forget what fired; call before each forward of [batch_rows, tokens / batch_rows] tokens."""
        self.fired.clear()
        self.batch_rows, self.tokens = batch_rows, tokens

    def check_fired(self) -> None:
        """UserError unless every parameter delivered once for each layer that it is used in."""
        expected = Counter(parameter_names(self.targets))
        wrong = [name for name, times in expected.items() if self.fired[name] != times]
        if wrong:
            raise UserError(
                "gradient features: a layer is used several times or not at all in one forward: "
                f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}; leave it out with `layers`"
            )

    def _hook(self, target: Target, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if target.kind == "embedding" and output.shape[0] == 1 < self.batch_rows:
            output = output.expand(self.batch_rows, *output.shape[1:])
            x = x.expand(self.batch_rows, *x.shape[1:])
        return tap(output, partial(self._deliver, target), x)

    def _replace_forward(self, target: Target) -> None:
        """Let the module run a forward of ours inside; it is gone again at `__exit__`."""
        module: Any = target.module
        original = module.forward
        assert "forward" not in vars(module), f"{type(module).__name__} already has a forward of its own"

        def called(*args: Any, **kwargs: Any) -> Any:
            with _linear_calls(tuple(module.weight.shape), partial(self._tap_call, target)):
                return original(*args, **kwargs)

        def experts(*args: Any, **kwargs: Any) -> Tensor:
            return run_experts(module, partial(self._tap_experts, target), *args, **kwargs)

        module.forward = called if target.kind == "called" else experts
        self._replaced.append(module)

    def _tap_call(self, target: Target, output: Tensor, x: Tensor) -> Tensor:
        if target.names:
            output = tap(output, partial(self._deliver, target), x)
        adapter = target.adapters.get("weight")
        if adapter is None:
            return output

        def deliver(delta: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
            self.fired.update(adapter.names.values())
            delta, x = self._flat(delta), self._flat(x)
            if "a" in adapter.names:
                self.sink.outer(adapter.names["a"], adapter.scaling * delta @ b.to(delta), x)
            if "b" in adapter.names:
                self.sink.outer(adapter.names["b"], delta, adapter.scaling * x @ a.to(x).T)

        return tap(output, deliver, x, adapter.a, adapter.b)

    def _tap_adapter(self, adapter: Adapter, output: Tensor, x: Tensor, at: Routing) -> Tensor:
        """The LoRA factors of fused experts: x [P, in], output [P, out]."""
        experts = len(at.counts)

        def deliver(delta: Tensor, x: Tensor, tokens: Tensor, a: Tensor, b: Tensor) -> None:
            self.fired.update(adapter.names.values())
            by_expert = list(zip(torch.split(delta, at.counts), torch.split(x, at.counts), strict=True))
            if "a" in adapter.names:
                down = [d @ b[:, e::experts].to(d) for e, (d, _) in enumerate(by_expert)]
                self.sink.experts(adapter.names["a"], adapter.scaling * torch.cat(down), x, tokens, at.counts)
            if "b" in adapter.names:
                col = x.new_zeros(len(x), a.shape[0])
                at_row = 0
                for e, (_, own) in enumerate(by_expert):
                    col[at_row : at_row + len(own), e::experts] = own @ a.view(experts, -1, a.shape[1])[e].to(own).T
                    at_row += len(own)
                order = torch.argsort(tokens, stable=True)
                per_token = len(tokens) // self.tokens
                self.sink.outer(adapter.names["b"], delta[order], adapter.scaling * col[order], per_token)

        return tap(output, deliver, x, at.tokens, adapter.a, adapter.b)

    def _tap_experts(self, target: Target, attribute: str, output: Tensor, x: Tensor, at: Routing) -> Tensor:
        """``attribute``: the matrix that made ``output`` [P, M] from ``x`` [P, K]."""
        if attribute in target.adapters:
            output = self._tap_adapter(target.adapters[attribute], output, x, at)
        names = {a: target.names[a] for a in (attribute, f"{attribute}_bias") if a in target.names}
        transposed = bool(target.module.is_transposed)

        def deliver(delta: Tensor, x: Tensor, tokens: Tensor) -> None:
            self.fired.update(names.values())
            for a, name in names.items():
                if a != attribute:
                    self.sink.experts(name, torch.ones_like(delta[:, :1]), delta, tokens, at.counts)
                else:
                    row, col = (x, delta) if transposed else (delta, x)
                    self.sink.experts(name, row, col, tokens, at.counts)

        return tap(output, deliver, x, at.tokens) if names else output

    def _deliver(self, target: Target, delta: Tensor, x: Tensor) -> None:
        self.fired.update(target.names.values())
        module, weight, bias = target.module, target.names.get("weight"), target.names.get("bias")
        if bias is not None:
            self.sink.dense(bias, self._by_token(delta))
        if weight is None:
            return
        if target.kind == "norm":
            scaled = _normalised(module, x)
            self.sink.dense(weight, self._by_token(scaled * delta.to(scaled.dtype)))
        elif isinstance(module, nn.Embedding):
            ids, values = x.reshape(-1), self._flat(delta)
            scale = getattr(module, "embed_scale", None)
            values = values if scale is None else values * scale
            if module.padding_idx is not None:
                values = values.masked_fill((ids == module.padding_idx)[:, None], 0)
            self.sink.rows(weight, ids, values)
        else:
            row, col = self._flat(delta), self._flat(x)
            self.sink.outer(weight, *((col, row) if target.kind == "conv1d" else (row, col)))

    def _flat(self, t: Tensor) -> Tensor:
        """[N, K] of a tensor that has one row for each token of the batch."""
        flat = t.reshape(-1, t.shape[-1])
        if len(flat) != self.tokens:
            raise UserError(
                f"gradient features: a layer sees {tuple(t.shape)} where the batch has {self.tokens} tokens; "
                "leave it out with `layers`"
            )
        return flat

    def _by_token(self, t: Tensor) -> Tensor:
        """[N, K], summed over heads where a norm works on [B, T, heads, K], [B, heads, T, K] or [N, heads, K]."""
        if t.dim() == 4:
            t = (t if t.shape[0] * t.shape[1] == self.tokens else t.transpose(1, 2)).sum(2)
        elif t.dim() == 3 and t.shape[0] * t.shape[1] != self.tokens == t.shape[0]:
            t = t.sum(1)
        return self._flat(t)
