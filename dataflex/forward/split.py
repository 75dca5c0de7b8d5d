"""A collated batch taken apart into what the model gets and what the losses are made of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataflex.ops import shift_labels
from dataflex.ops.known import IGNORED, moved, with_count, with_values
from dataflex.utils.errors import UserError

WANTED = (
    "a sample's loss is made from logits [batch, tokens, vocabulary], returned as a tensor, as .logits, as a dict's "
    "'logits', or as the first of a tuple"
)


class SplitBatch(NamedTuple):
    """inputs: the model's keyword arguments; labels: [N] int64, shifted; raw_labels: [B, T] as collated;

    cu_seqlens: [S + 1] int64, one segment per sample over the N = B * T flattened tokens.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    raw_labels: Tensor
    cu_seqlens: Tensor


def split_batch(batch: dict[str, Any], device: torch.device) -> SplitBatch:
    """Move a collated batch to ``device`` and take it apart. Without ``cu_seqlens`` every row is a sample.

    What the host knows of it goes along (`dataflex.ops.known`).
    """
    inputs = {k: moved(v, device) for k, v in batch.items() if torch.is_tensor(v)}
    labels, cu_seqlens = inputs.pop("labels"), inputs.pop("cu_seqlens", None)
    for weights in ("sample_weight", "token_weight"):
        inputs.pop(weights, None)
    if cu_seqlens is None:
        rows, tokens = labels.shape
        cu_seqlens = with_values(torch.arange(rows + 1, device=device) * tokens, range(0, rows * tokens + 1, tokens))
    elif batch["cu_seqlens"].device.type == "cpu":
        with_values(cu_seqlens, batch["cu_seqlens"].tolist())
    shifted = shift_labels(labels)
    if batch["labels"].device.type == "cpu":
        with_count(shifted, int((batch["labels"][:, 1:] != IGNORED).sum()))
    return SplitBatch(inputs, shifted, labels, cu_seqlens)


def logits_of(outputs: Any) -> Tensor:
    """The logits [B, T, V] in what a model returned: a tensor, ``.logits``, ``["logits"]`` or the first of a tuple.

    UserError where there are none.
    """
    found = outputs
    if isinstance(outputs, tuple | list) and not hasattr(outputs, "logits"):
        found = outputs[0] if outputs else None
    elif not torch.is_tensor(outputs):
        found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not torch.is_tensor(found):
        raise UserError(f"model: returns a {type(outputs).__name__} without logits: {WANTED}")
    return found


def few_logits(module: Any) -> dict[str, int]:
    """What a forward is called with besides its inputs where its logits are not looked at: one of a row is made."""
    whole = module.get_base_model() if hasattr(module, "get_base_model") else module
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(whole.forward).parameters else {}


class NoLogits:
    """Stands where a model's logits would: whatever is done with it is a UserError."""

    @staticmethod
    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError(
            "outputs.logits: there are none: the losses are made inside of the output layer (fused_head); a hook or "
            "weighter of needs_logits = True keeps them, and so does fused_head: off"
        )

    def __getattr__(self, name: str) -> Any:
        return self.refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        return cls.refuse()


_USES = "getitem setitem iter len bool float int array add radd sub rsub mul rmul truediv matmul neg pow eq lt gt"
for _use in _USES.split():
    setattr(NoLogits, f"__{_use}__", NoLogits.refuse)


def without_logits(outputs: Any) -> Any:
    """What a model returned with `NoLogits` where its logits were; a container is changed in place."""
    if torch.is_tensor(outputs):
        return NoLogits()
    if isinstance(outputs, tuple | list) and not hasattr(outputs, "logits"):
        return type(outputs)([NoLogits(), *outputs[1:]])
    if isinstance(outputs, Mapping):
        outputs["logits"] = NoLogits()  # type: ignore[index]
    else:
        outputs.logits = NoLogits()
    return outputs
