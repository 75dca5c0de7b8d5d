"""What every form of the per-sample loss takes, and its checks: once, before any memory is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex.ops.projection.segments import check_segments

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LossOptions:
    """The scalars. ``vocab_offset`` is None for a whole vocabulary, else the first column of this shard."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    vocab_offset: int | None = None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {self.reduction!r}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected 0 <= label_smoothing < 1, got {self.label_smoothing}")
        for name, value in (("z_loss", self.z_loss), ("softcap", self.softcap)):
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        if self.vocab_offset is not None and self.vocab_offset < 0:
            raise ValueError(f"vocab_offset: expected >= 0, got {self.vocab_offset}")
        if self.vocab_offset is not None and (self.label_smoothing or self.z_loss):
            raise ValueError("vocab_offset: expected no label_smoothing and no z_loss on a shard, got one of them")

    @property
    def mean(self) -> bool:
        return self.reduction == "mean"

    @property
    def sharded(self) -> bool:
        return self.vocab_offset is not None

    def scalars(self) -> tuple[int, bool, float, float, float, int, bool]:
        """In the order of the internal ops' schemas."""
        smooth, offset = self.label_smoothing, self.vocab_offset or 0
        return self.ignore_index, self.mean, smooth, self.z_loss, self.softcap, offset, self.sharded


def check_loss(
    name: str,
    logits: Tensor,
    vocabulary: int,
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
) -> None:
    """ValueError where the tensors do not fit; ``logits`` [N, ...] is called ``name``.

    Labels and segments are looked at on the CPU only: elsewhere that would wait for the device.
    """
    tokens = logits.shape[0]
    if logits.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {logits.dtype}")
    if vocabulary < 1:
        raise ValueError("logits: expected a vocabulary of at least 1, got 0")
    if labels.shape != (tokens,):
        raise ValueError(f"labels: expected [{tokens}], got {tuple(labels.shape)}")
    if labels.dtype is not torch.int64:
        raise ValueError(f"labels: expected int64, got {labels.dtype}")
    for what, weight, size in (("token_weight", token_weight, tokens), ("class_weight", class_weight, vocabulary)):
        if weight is not None and (weight.shape != (size,) or not weight.is_floating_point()):
            raise ValueError(f"{what}: expected floats [{size}], got {weight.dtype} {tuple(weight.shape)}")
    if options.sharded and (token_weight is not None or class_weight is not None):
        raise ValueError("vocab_offset: expected no weights on a shard (merge_vocab_shards takes them), got some")
    others = {"labels": labels, "cu_seqlens": cu_seqlens, "token_weight": token_weight, "class_weight": class_weight}
    for what, tensor in others.items():
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{what}: expected on {logits.device} like {name}, got {tensor.device}")
    check_segments(cu_seqlens, tokens)
    if labels.device.type == "cpu":
        _check_labels(labels, vocabulary, options)


def _check_labels(labels: Tensor, vocabulary: int, options: LossOptions) -> None:
    strange = labels < 0
    if not options.sharded:
        strange = strange | (labels >= vocabulary)
    strange &= labels != options.ignore_index
    if strange.any():
        most = "" if options.sharded else f" to {vocabulary - 1}"
        least = "at least 0" if options.sharded else "0"
        raise ValueError(f"labels: expected {least}{most} or {options.ignore_index}, got {int(labels[strange][0])}")
