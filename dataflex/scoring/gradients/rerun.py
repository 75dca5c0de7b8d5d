"""Parameters of any module at all: the module runs once more in the backward, and plain autograd goes through it.

What reaches a module's output at the tokens of one sample is the gradient of that sample alone, so one backward
through the module from the output's gradient, all other samples masked out, is the sample's gradient of every
parameter inside. It costs one more forward of the module and a backward of it for every sample: for the parameters
whose mathematics no other tap knows (convolutions, state-space decays, norms and gates of a family's own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from dataflex.utils.errors import UserError

Gradients = dict[str, Tensor]


class Places(NamedTuple):
    """Where the samples of a batch of B rows and N = B * T tokens are: sample s is tokens cu[s] to cu[s + 1]."""

    rows: int
    tokens: int
    cu_seqlens: Tensor

    def refuse_other_orders(self, t: Tensor, name: str) -> None:
        """UserError, about the parameter ``name``, where ``t`` is [T, B, ...]: tokens first, rows second."""
        first = t.shape[:2]
        if t.dim() > 2 and first[0] != self.rows > 1 and first == (self.tokens // self.rows, self.rows):
            raise UserError(
                f"gradient features: the layer of {name} sees {tuple(t.shape)}, tokens first, for {self.rows} rows of "
                f"{first[0]} tokens; leave it out with `layers`"
            )

    def mask(self, delta: Tensor, sample: int, name: str) -> Tensor:
        """``delta`` [B, ...] or [N, ...], zero outside the sample.

        UserError, about the parameter ``name``, where its samples cannot be told apart.
        """
        start, stop = self.cu_seqlens[sample : sample + 2].tolist()
        alone = len(self.cu_seqlens) - 1 == self.rows
        self.refuse_other_orders(delta, name)
        out = torch.zeros_like(delta, memory_format=torch.contiguous_format)
        if len(delta) == self.rows and alone:
            out[sample] = delta[sample]
        elif len(delta) == self.tokens:
            out[start:stop] = delta[start:stop]
        elif delta.dim() > 2 and len(delta) * delta.shape[1] == self.tokens:
            flat = out.view(self.tokens, *delta.shape[2:])
            flat[start:stop] = delta.reshape(flat.shape)[start:stop]
        else:
            raise UserError(
                f"gradient features: the layer of {name} returns {tuple(delta.shape)} for {self.rows} rows of "
                f"{self.tokens // self.rows} tokens{'' if alone else ' of packed samples'}; leave it out with `layers`"
            )
        return out


class _Watched(torch.autograd.Function):
    """A module's outputs; their gradients go to ``deliver(deltas, saved inputs)``."""

    @staticmethod
    def forward(ctx: Any, deliver: Callable[..., None], inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[:inputs])
        ctx.deliver, ctx.inputs = deliver, inputs
        ctx.set_materialize_grads(False)
        return tuple(output.data for output in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            ctx.deliver(deltas, ctx.saved_tensors)
        return (None, None, *(None for _ in range(ctx.inputs)), *deltas)


def watch(module: nn.Module, args: Any, kwargs: Any, output: Any, rows: int, found: Callable[..., None]) -> Any:
    """``output``, in whose backward ``found(run, deltas)`` is called; for a forward hook.

    run: computes the outputs again that the deltas belong to, those that something was made of. An output of one row
    that all ``rows`` of the batch share becomes one for each.
    """
    leaves, spec = tree.tree_flatten(output)
    wanted = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf) and leaf.requires_grad]
    if not wanted:
        return output
    inputs, form = tree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(inputs) if torch.is_tensor(leaf)]
    tensors = [inputs[i].detach() for i in places]
    rest = [None if torch.is_tensor(leaf) else leaf for leaf in inputs]

    def deliver(deltas: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]) -> None:
        def run() -> list[Tensor]:
            again = list(rest)
            for i, value in zip(places, saved, strict=True):
                again[i] = value.detach()
            own_args, own_kwargs = tree.tree_unflatten(again, form)
            outputs = tree.tree_flatten(module(*own_args, **own_kwargs))[0]
            return [_for_each_row(outputs[i], rows) for i, d in zip(wanted, deltas, strict=True) if d is not None]

        found(run, tuple(delta for delta in deltas if delta is not None))

    before = [_for_each_row(leaves[i], rows) for i in wanted]
    for i, tapped in zip(wanted, _Watched.apply(deliver, len(tensors), *tensors, *before), strict=True):
        leaves[i] = tapped
    return tree.tree_unflatten(leaves, spec)


def refuse_own_parameters(module: nn.Module, output: Any, names: dict[str, str]) -> None:
    """UserError where a module hands out one of the parameters ``names``, which something else then uses."""
    given = {id(leaf) for leaf in tree.tree_flatten(output)[0]}
    for path, p in module.named_parameters():
        if path in names and id(p) in given:
            raise UserError(
                f"gradient features: the module of {names[path]} returns it, and another uses it; leave it out with "
                "`layers`"
            )


def _for_each_row(output: Tensor, rows: int) -> Tensor:
    shared = output.dim() > 1 and output.shape[0] == 1 < rows
    return output.expand(rows, *output.shape[1:]) if shared else output


def gradients(
    module: nn.Module,
    names: dict[str, str],
    run: Callable[[], list[Tensor]],
    deltas: tuple[Tensor, ...],
    places: Places | None,
) -> Iterator[tuple[int, Gradients]]:
    """(sample, {name: gradient}) for each sample; without ``places`` once, (0, their sum).

    names: {path of a parameter inside the module: full name}.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    wanted = [own[path] for path in names]
    with _trained(module, wanted), torch.enable_grad():
        outputs = run()
        count = 1 if places is None else len(places.cu_seqlens) - 1
        for sample in range(count):
            parts = deltas if places is None else [places.mask(d, sample, next(iter(names.values()))) for d in deltas]
            pairs = [(o, d.to(o)) for o, d in zip(outputs, parts, strict=True) if o.requires_grad]
            grads = torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [d for _, d in pairs],
                retain_graph=sample < count - 1,
                allow_unused=True,
            )
            shapes = [getattr(p, "ds_shape", p.shape) for p in wanted]
            yield (
                sample,
                {
                    name: deltas[0].new_zeros(shape) if grad is None else grad.detach()
                    for name, shape, grad in zip(names.values(), shapes, grads, strict=True)
                },
            )


@contextmanager
def _trained(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters require grad, and no layer inside recomputes its activations."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for m in training:
            m.training = True
