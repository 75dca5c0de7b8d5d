"""Whether training steps may do without logits: what the hooks say, and what is said of it on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dataflex.core.hook import Hook, TokenWeigher, Weigher
from dataflex.forward.fused import FusedHead
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger


def logit_readers(hooks: Sequence[Hook]) -> list[str]:
    """The hooks that may look at the logits of the training forward."""
    shown = [h for h in hooks if isinstance(h, Weigher) or type(h).on_losses is not Hook.on_losses]
    return [hook.identity for hook in shown if hook.needs_logits]


def training_head(fused: FusedHead | None, hooks: Sequence[Hook], most_tokens: int) -> FusedHead | None:
    """``fused``, or None where a hook may read the logits of the training forward.

    Says how the losses of a run are made. most_tokens: of a forward. UserError where a hook reads logits that
    ``fused_head: on`` shall leave out.
    """
    if fused is None:
        return None
    late = [hook.identity for hook in hooks if isinstance(hook, TokenWeigher) and hook.late]
    weighers = [hook.identity for hook in hooks if isinstance(hook, Weigher)] + late
    if readers := logit_readers(hooks):
        text = f"{', '.join(readers)} may read logits (a hook or weighter that does not sets needs_logits = False)"
        if fused.always:
            raise UserError(f"fused_head: on: {text}; set auto, or off")
        logger.info(f"fused_head: scoring makes its losses without logits, training with them: {text}")
        return None
    vocabulary, hidden = fused.head.shape
    fused = replace(fused, twice=fused.head.trained and bool(weighers))
    least = fused.least_tokens(most_tokens)
    layer = f"the output layer ({hidden:,} x {vocabulary:,})"
    if not fused.pays(most_tokens, backward=True):
        again = f", which {', '.join(weighers)} would have the backward make again" if fused.twice else ""
        logger.info(f"fused_head: training makes its losses with logits{again}: too few to leave them out")
        return fused
    which = f"forwards of {least:,} tokens or more" if least else "forwards"
    text = f"fused_head: {which} make no logits; {layer}"
    if not fused.head.trained:
        text += " is frozen"
    elif weighers:
        text += f" is trained: {', '.join(weighers)} weighs by the losses, so the backward makes them again in chunks"
    else:
        text += " is trained: its gradient is made together with the losses"
    logger.info(text)
    return fused
