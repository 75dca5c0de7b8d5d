"""Taps on the layers of a model: how each kind of layer's weight gradient is made of what its tap sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dataflex.forward.fused import HeadCall
from dataflex.ops.known import values_of
from dataflex.ops.losses.linear_deltas import LinearLossGrad
from dataflex.ops.losses.linear_products import Products
from dataflex.scoring.gradients.coverage import Adapter, Target, parameter_names
from dataflex.scoring.gradients.experts import Routing, run_experts
from dataflex.scoring.gradients.head_parts import HeadNames
from dataflex.scoring.gradients.norms import normalised
from dataflex.scoring.gradients.rerun import Places, gradients, refuse_own_parameters, watch
from dataflex.scoring.gradients.tap import calls_to, tap
from dataflex.utils.errors import UserError


class Sink(Protocol):
    """Takes the parts of per-sample gradients, [N, ...] over the flattened tokens of the batch."""

    def outer(self, name: str, row: Tensor, col: Tensor, per_token: int = 1) -> None:
        """Parameter [M, K] has gradient sum of row[t] col[t]^T; row [N * per_token, M], col [N * per_token, K]."""

    def at_hand(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """What is delivered of these parameters is delivered inside."""

    def dense(self, name: str, per_token: Tensor) -> None:
        """Parameter [K] has gradient sum of per_token[t]; per_token [N, K]."""

    def rows(self, name: str, row_ids: Tensor, values: Tensor) -> None:
        """Parameter [M, K] has gradient values[t] in row row_ids[t]; row_ids [N], values [N, K]."""

    def experts(self, name: str, row: Tensor, col: Tensor, tokens: Tensor, counts: list[int]) -> None:
        """Part e of parameter [E, M, K], [E * M, K] or [E, K] has gradient sum of row[p] col[p]^T over its rows p.

        row [P, M], col [P, K] sorted by expert; counts: rows of each expert; tokens [P]: the token of each row,
        ascending within an expert.
        """

    def head(self, names: HeadNames, grad: LinearLossGrad) -> None:
        """The parameters of an output layer have the gradient that ``grad`` gives in blocks of the vocabulary."""

    # Whether `sample` wants each sample's gradient; else it is called once, with their sum.
    per_sample: ClassVar[bool]

    def sample(self, name: str, sample: int, grad: Tensor) -> None:
        """Parameter ``name`` has the whole gradient ``grad``, of its own shape, for this sample of the batch."""


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
        self._places = Places(0, 0, torch.zeros(1, dtype=torch.int64))
        self._quiet = False
        self._heads: set[int] = set()
        self._handles: list[Any] = []
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> Taps:
        for target in self.targets:
            if target.kind in ("called", "looked_up", "experts"):
                self._replace_forward(target)
            else:
                hook = partial(self._rerun_hook if target.kind == "rerun" else self._hook, target)
                self._handles.append(target.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward
        self._handles.clear()
        self._replaced.clear()

    def start(self, batch_rows: int, tokens: int, cu_seqlens: Tensor | None = None) -> None:
        """Forget what fired; call before each forward of [batch_rows, tokens / batch_rows] tokens.

        cu_seqlens: [S + 1] int64, where the samples are in the flattened tokens; without it every row is one.
        """
        self.fired.clear()
        self._heads.clear()
        self.batch_rows, self.tokens = batch_rows, tokens
        if cu_seqlens is None:
            cu_seqlens = torch.arange(batch_rows + 1) * (tokens // batch_rows)
        self._places = Places(batch_rows, tokens, torch.tensor(values_of(cu_seqlens)))

    def check_fired(self) -> None:
        """UserError unless every parameter delivered once for each layer that it is used in."""
        expected = Counter(parameter_names(self.targets))
        never = [name for name in expected if not self.fired[name]]
        often = [name for name, times in expected.items() if self.fired[name] not in (0, times)]
        for names, what in (
            (often, "a layer is used several times in one forward"),
            (never, "no gradient reaches, or the forward does not call the layer of"),
        ):
            if names:
                raise UserError(
                    f"gradient features: {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; "
                    f"leave it out with `layers` (a pattern after !)"
                )

    def _hook(self, target: Target, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        return output if self._quiet or id(module) in self._heads else self._tap_lookup(target, output, x)

    def head(self, call: HeadCall) -> Tensor:
        """The token losses of an output layer without logits, tapped in the layer's place."""
        places = {id(module): place for place, module in enumerate(call.modules)}
        self._heads |= set(places)
        mine = [(places[id(t.module)], t.names) for t in self.targets if id(t.module) in places]
        biases = [names["bias"] for _, names in mine if "bias" in names]
        names = HeadNames({at: own["weight"] for at, own in mine if "weight" in own}, *biases)
        if not names.every():
            return call.token_loss

        def deliver(by: Tensor, lse: Tensor, *inputs: Tensor) -> None:
            weights = (weight for _, weight in call.products.pairs)
            products = Products(tuple(zip(inputs, weights, strict=True)), call.products.bias)
            with self._delivering(names.every()):
                self.sink.head(names, LinearLossGrad(products, call.labels, lse, by, call.scale, call.softcap))

        return tap(call.token_loss, deliver, call.lse, *(x for x, _ in call.products.pairs))

    def _tap_lookup(self, target: Target, output: Tensor, x: Tensor) -> Tensor:
        """A layer's output, tapped; positions that all rows share are looked up for each of them."""
        if isinstance(target.module, nn.Embedding):
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            if output.dim() == 2 and self.tokens != len(output) == self.tokens // self.batch_rows:
                output, x = output[None], x[None]
            if output.shape[0] == 1 < self.batch_rows:
                output = output.expand(self.batch_rows, *output.shape[1:])
                x = x.expand(self.batch_rows, *x.shape[1:])
        return tap(output, partial(self._deliver, target), x)

    def _rerun_hook(self, target: Target, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._quiet:
            return output
        refuse_own_parameters(module, output, target.names)

        def found(run: Callable[[], list[Tensor]], deltas: tuple[Tensor, ...]) -> None:
            self._quiet = True
            try:
                places = self._places if self.sink.per_sample else None
                with self._delivering(target.names.values()):
                    for sample, grads in gradients(module, target.names, run, deltas, places):
                        for name, grad in grads.items():
                            self.sink.sample(name, sample, grad)
            finally:
                self._quiet = False

        return watch(module, args, kwargs, output, self.batch_rows, found)

    def _replace_forward(self, target: Target) -> None:
        """Let the module run a forward of ours inside; it is gone again at `__exit__`."""
        module: Any = target.module
        original = module.forward
        assert "forward" not in vars(module), f"{type(module).__name__} already has a forward of its own"
        function, seen = "linear", self._tap_call
        if target.kind == "looked_up":
            function, seen = "embedding", self._tap_lookup

        def called(*args: Any, **kwargs: Any) -> Any:
            if self._quiet:
                return original(*args, **kwargs)
            with calls_to(function, tuple(module.weight.shape), partial(seen, target)):
                return original(*args, **kwargs)

        def experts(*args: Any, **kwargs: Any) -> Tensor:
            return run_experts(module, partial(self._tap_experts, target), *args, **kwargs)

        module.forward = experts if target.kind == "experts" else called
        self._replaced.append(module)

    def _tap_call(self, target: Target, output: Tensor, x: Tensor) -> Tensor:
        if target.names:
            output = tap(output, partial(self._deliver, target), x)
        adapter = target.adapters.get("weight")
        if adapter is None:
            return output

        def deliver(delta: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
            name = next(iter(adapter.names.values()))
            delta, x = self._flat(delta, name), self._flat(x, name)
            with self._delivering(adapter.names.values()):
                if "a" in adapter.names:
                    self.sink.outer(adapter.names["a"], adapter.scaling * delta @ b.to(delta), x)
                if "b" in adapter.names:
                    self.sink.outer(adapter.names["b"], delta, adapter.scaling * x @ a.to(x).T)

        return tap(output, deliver, x, adapter.a, adapter.b)

    def _tap_adapter(self, adapter: Adapter, output: Tensor, x: Tensor, at: Routing) -> Tensor:
        """The LoRA factors of fused experts: x [P, in], output [P, out]."""
        experts = len(at.counts)

        def deliver(delta: Tensor, x: Tensor, tokens: Tensor, a: Tensor, b: Tensor) -> None:
            by_expert = list(zip(torch.split(delta, at.counts), torch.split(x, at.counts), strict=True))
            if "a" in adapter.names:
                down = [d @ b[:, e::experts].to(d) for e, (d, _) in enumerate(by_expert)]
                with self._delivering([adapter.names["a"]]):
                    self.sink.experts(adapter.names["a"], adapter.scaling * torch.cat(down), x, tokens, at.counts)
            if "b" in adapter.names:
                col = x.new_zeros(len(x), a.shape[0])
                at_row = 0
                for e, (_, own) in enumerate(by_expert):
                    col[at_row : at_row + len(own), e::experts] = own @ a.view(experts, -1, a.shape[1])[e].to(own).T
                    at_row += len(own)
                order = torch.argsort(tokens, stable=True)
                per_token = len(tokens) // self.tokens
                with self._delivering([adapter.names["b"]]):
                    self.sink.outer(adapter.names["b"], delta[order], adapter.scaling * col[order], per_token)

        return tap(output, deliver, x, at.tokens, adapter.a, adapter.b)

    def _tap_experts(self, target: Target, attribute: str, output: Tensor, x: Tensor, at: Routing) -> Tensor:
        """``attribute``: the matrix that made ``output`` [P, M] from ``x`` [P, K]."""
        if self._quiet:
            return output
        if attribute in target.adapters:
            output = self._tap_adapter(target.adapters[attribute], output, x, at)
        names = {a: target.names[a] for a in (attribute, f"{attribute}_bias") if a in target.names}
        transposed = bool(target.module.is_transposed)

        def deliver(delta: Tensor, x: Tensor, tokens: Tensor) -> None:
            for a, name in names.items():
                own = (x, delta) if transposed else (delta, x)
                row, col = own if a == attribute else (torch.ones_like(delta[:, :1]), delta)
                with self._delivering([name]):
                    self.sink.experts(name, row, col, tokens, at.counts)

        return tap(output, deliver, x, at.tokens) if names else output

    @contextmanager
    def _delivering(self, names: Iterable[str]) -> Iterator[None]:
        self.fired.update(names)
        with self.sink.at_hand(names):
            yield

    def _deliver(self, target: Target, delta: Tensor, x: Tensor) -> None:
        with self._delivering(target.names.values()):
            self._deliver_all(target, delta, x)

    def _deliver_all(self, target: Target, delta: Tensor, x: Tensor) -> None:
        module, weight, bias = target.module, target.names.get("weight"), target.names.get("bias")
        if bias is not None:
            self.sink.dense(bias, self._by_token(delta, bias))
        if weight is None:
            return
        if target.kind == "norm":
            scaled = normalised(module, x)
            self.sink.dense(weight, self._by_token(scaled * delta.to(scaled.dtype), weight))
        elif isinstance(module, nn.Embedding):
            ids, values = x.reshape(-1), self._flat(delta, weight)
            scale = getattr(module, "embed_scale", None) if target.kind == "embedding" else None
            values = values if scale is None else values * scale
            if module.padding_idx is not None:
                values = values.masked_fill((ids == module.padding_idx)[:, None], 0)
            self.sink.rows(weight, ids, values)
        else:
            row, col = self._flat(delta, weight), self._flat(x, weight)
            self.sink.outer(weight, *((col, row) if target.kind == "conv1d" else (row, col)))

    def _flat(self, t: Tensor, name: str) -> Tensor:
        """[N, K] of a tensor that has one row for each token of the batch."""
        flat = t.reshape(-1, t.shape[-1])
        self._places.refuse_other_orders(t, name)
        if len(flat) != self.tokens:
            raise UserError(
                f"gradient features: the layer of {name} sees {tuple(t.shape)} where the batch has {self.tokens} "
                "tokens; leave it out with `layers`"
            )
        return flat

    def _by_token(self, t: Tensor, name: str) -> Tensor:
        """[N, K], summed over heads where a norm works on [B, T, heads, K], [B, heads, T, K] or [N, heads, K]."""
        if t.dim() == 4:
            t = (t if t.shape[0] * t.shape[1] == self.tokens else t.transpose(1, 2)).sum(2)
        elif t.dim() == 3 and t.shape[0] * t.shape[1] != self.tokens == t.shape[0]:
            t = t.sum(1)
        return self._flat(t, name)
