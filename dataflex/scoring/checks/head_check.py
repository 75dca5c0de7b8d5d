"""Whether losses can be made inside of a model's output layer: tried on one sample, beside its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dataflex.forward.counted import Counted
from dataflex.forward.fused import FusedHead
from dataflex.forward.head import UnknownHead, find_head, read_probe
from dataflex.forward.losses import losses_of
from dataflex.forward.split import logits_of, split_batch
from dataflex.scoring.checks.model_check import probing
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger


class OpenHead(Protocol):
    """`open_head` of another model in the same run."""

    def __call__(self, module: nn.Module, *, release: Callable[[], None]) -> FusedHead | None: ...


# Of a loss, in the logits' own rounding steps; float32 sums differ by their order.
_STEPS, _LEAST = 8, 1e-4


def open_head(
    mode: str,
    module: nn.Module,
    batch: dict[str, Any],
    tokens: int,
    *,
    device: torch.device,
    release: Callable[[], None] = lambda: None,
) -> FusedHead | None:
    """The output layer of a model, to make losses inside of it; None for logits, with a line why; a collective.

    mode: ``on``, ``off`` or ``auto``: only where a forward of ``tokens`` tokens pays (`FusedHead.pays`). batch: one
    collated sample, the same on every rank. release: called after each forward, as a scoring pass ends. UserError
    where ``on`` cannot be.
    """
    if mode == "off":
        return None
    try:
        fused = FusedHead(find_head(module), always=mode == "on")
        if not fused.pays(tokens, backward=True):
            return None
        return _tried(fused, module, batch, device, release)
    except UnknownHead as exc:
        if mode == "on":
            raise UserError(f"fused_head: on: {exc}; set auto, or off") from exc
        logger.info(f"fused_head: losses are made of logits: {exc}")
        return None


def known_head(
    module: nn.Module, batch: dict[str, Any], *, device: torch.device, release: Callable[[], None] = lambda: None
) -> FusedHead:
    """The output layer of a model whatever ``fused_head`` says; UnknownHead where no losses are made inside of it.

    batch, release: as `open_head` takes them; a collective.
    """
    return _tried(FusedHead(find_head(module), always=True), module, batch, device, release)


def _tried(
    fused: FusedHead, module: nn.Module, batch: dict[str, Any], device: torch.device, release: Callable[[], None]
) -> FusedHead:
    """With the scale and softcap of the model; UnknownHead unless its losses are those of the logits."""
    inputs, labels, _, cu_seqlens = split_batch(batch, device)
    counted = Counted(labels, cu_seqlens)
    with probing(module, device):
        logits = logits_of(module(**inputs))
        largest = float(logits.abs().amax())
        wanted = losses_of(logits, counted)
        release()
        scale, softcap = _post_processing(fused, module, inputs)
        release()
        fused = replace(fused, scale=scale, softcap=softcap)
        found = fused.losses(module, inputs, counted).losses
        release()
    room = max(_LEAST, _STEPS * torch.finfo(logits.dtype).eps) * (1 + largest)
    for name in ("token_loss", "lse"):
        apart = float((getattr(found, name) - getattr(wanted, name)).abs().amax())
        if not apart <= room:
            raise UnknownHead(f"losses made inside of the output layer differ from those of the logits by {apart:.1e}")
    return fused


def _post_processing(fused: FusedHead, module: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """(scale, softcap), read from a forward that has a probe in the logits' place."""
    dtypes: set[torch.dtype] = set()

    def note(products: Any, _modules: Any) -> Tensor:
        dtypes.update(t.dtype for pair in products.pairs for t in pair)
        return torch.zeros(len(products.pairs[0][0]), device=products.pairs[0][0].device)

    with fused.head.replaced(note) as taken:
        outputs = module(**inputs)
    if len(taken) != 1:
        raise UnknownHead(f"a forward calls the output layer {len(taken)} times")
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UnknownHead(f"the output layer and its input are of different dtypes ({names})")
    return read_probe(logits_of(outputs))
