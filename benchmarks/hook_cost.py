"""Forward and backward of a small Llama with LoRA, with and without features of every sample."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from measure import Variant, relative_error
from torch import Tensor

from dataflex.ops import Transform, per_sample_loss, shift_labels
from dataflex.ops.losses.linear_deltas import LinearLossGrad
from dataflex.scoring.context import scoring_mode
from dataflex.scoring.gradients.coverage import find_targets, parameter_names
from dataflex.scoring.gradients.head_parts import HeadNames
from dataflex.scoring.gradients.sinks import ProjectingSink
from dataflex.scoring.gradients.taps import Taps

SEED, PROJ_DIM, VOCABULARY, RANK = 0, 8192, 8192, 8


class Nothing:
    """A sink that drops what it is given: what the taps alone cost."""

    def at_hand(self, names: Iterable[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def outer(self, name: str, row: Tensor, col: Tensor, per_token: int = 1) -> None: ...

    def dense(self, name: str, per_token: Tensor) -> None: ...

    def rows(self, name: str, row_ids: Tensor, values: Tensor) -> None: ...

    def experts(self, name: str, row: Tensor, col: Tensor, tokens: Tensor, counts: list[int]) -> None: ...

    def head(self, names: HeadNames, grad: LinearLossGrad) -> None: ...


def features_of(sink: ProjectingSink) -> Tensor:
    """The features of the batch that went through the sink."""
    features = sink.finish().out
    assert features is not None
    return features


def model(device: torch.device, smoke: bool) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    width, layers = (64, 2) if smoke else (512, 8)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=8,
        use_cache=False,
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora).to(device)


def forward_backward(device: torch.device, smoke: bool) -> tuple[dict[str, Variant], float]:
    """The variants to time, and the features' error against those of float64 moments and sums."""
    net = model(device, smoke)
    rows, tokens = (2, 16) if smoke else (8, 256)
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=draw).to(device)
    cu_seqlens = torch.arange(rows + 1, device=device) * tokens
    targets = find_targets(net)
    shapes = dict(net.named_parameters())
    moments = {n: (0.01 * torch.randn_like(shapes[n]), torch.rand_like(shapes[n])) for n in parameter_names(targets)}
    moments = {name: (m.detach(), v.detach()) for name, (m, v) in moments.items()}
    sink = ProjectingSink(Transform("adam_less"), SEED, PROJ_DIM, moments)

    def step() -> None:
        logits = net(input_ids=ids).logits
        per_sample_loss(logits.flatten(0, 1), shift_labels(ids), cu_seqlens).loss.sum().backward()

    def tapped(receiver: Any) -> None:
        with scoring_mode(net, gradients=True), Taps(targets, receiver) as taps:
            taps.start(rows, rows * tokens)
            step()

    def features() -> Tensor:
        sink.start(cu_seqlens)
        tapped(sink)
        return features_of(sink)

    def training() -> None:
        net.zero_grad(set_to_none=True)
        step()

    got = features()
    wide_moments = {name: (m.double(), v.double()) for name, (m, v) in moments.items()}
    wide = ProjectingSink(sink.transform, SEED, PROJ_DIM, wide_moments, dtype=torch.float64)
    wide.start(cu_seqlens)
    tapped(wide)
    error = relative_error(got, features_of(wide))
    assert error < 1e-3, f"wrong features: {error}"
    return {
        "training: LoRA's own gradients": training,
        "without features": lambda: tapped(Nothing()),
        "with features": features,
    }, error
