"""Whether a model is what training and scoring are made for: a causal language model that returns its logits.

Found by a forward and a backward of activations of one sample before training, in scoring mode, so that neither
weights nor the random state change. Every rank looks at the same sample.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.scoring.context import evaluating, frozen, leaf_embeddings, release_gathered
from dataflex.scoring.split import WANTED, logits_of, split_batch
from dataflex.utils.errors import UserError

# A causal model's gradients are exact zeros there; of others they were never below a thousandth of the largest.
_NOTHING = 1e-5


def check_model(engine: Any, batch: dict[str, Any]) -> None:
    """UserError of one line unless ``engine.module`` is a causal language model; a collective.

    batch: one collated sample of at least two tokens, the same on every rank.
    """
    module = engine.module
    name = _name(module)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise UserError(f"model: {name} is an encoder-decoder; dataflex trains causal language models only")
    inputs, labels, raw_labels, _ = split_batch(batch, torch.device(engine.device))
    _check_signature(module, name, inputs)
    leaves: list[Tensor] = []
    embeds = any(isinstance(m, nn.Embedding) for m in module.modules())
    with torch.random.fork_rng(), evaluating(module, gradients=embeds), frozen(module), torch.set_grad_enabled(embeds):
        if embeds:
            with leaf_embeddings(module, leaves):
                logits = logits_of(module(**inputs))
        else:
            logits = logits_of(module(**inputs))
        _check_shape(logits, labels, raw_labels, name)
        if embeds and logits.requires_grad:
            _check_causal(logits, leaves, _real(inputs, raw_labels), name)
    release_gathered(engine)


def _name(module: nn.Module) -> str:
    """The class of the model inside an adapter's wrapper."""
    inner: Any = module
    inner = inner.get_base_model() if hasattr(module, "peft_config") else module
    return type(inner).__name__


def _check_signature(module: nn.Module, name: str, inputs: dict[str, Tensor]) -> None:
    """UserError where ``forward`` cannot be called with what the collator made."""
    try:
        inspect.signature(module.forward).bind(**inputs)
    except TypeError as exc:
        raise UserError(
            f"model: {name}.forward does not take the batch ({exc}); it is called with {', '.join(inputs)}, without "
            f"labels: {WANTED}"
        ) from exc


def _check_shape(logits: Tensor, labels: Tensor, raw_labels: Tensor, name: str) -> None:
    rows, tokens = raw_labels.shape
    if logits.dim() != 3 or tuple(logits.shape[:2]) != (rows, tokens):
        raise UserError(f"model: {name} returns {list(logits.shape)} for {rows} x {tokens} tokens: {WANTED}")
    highest = int(labels.max())
    columns = logits.shape[2]
    if highest >= columns:
        raise UserError(f"model: {name} returns {columns} logits a token, the data has label {highest}: {WANTED}")


def _real(inputs: dict[str, Tensor], raw_labels: Tensor) -> Tensor:
    """Places of the first row's tokens that are not padding, int64."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == raw_labels.shape:
        return mask[0].nonzero().flatten()
    return torch.arange(raw_labels.shape[1], device=raw_labels.device)


def _check_causal(logits: Tensor, leaves: list[Tensor], real: Tensor, name: str) -> None:
    """UserError where the first token's logits depend on the tokens after it."""
    made = torch.Generator().manual_seed(0)
    direction = torch.randn(logits.shape[2], generator=made).to(logits.device)
    (logits[0, real[0]].float() * direction).sum().backward()
    for leaf in leaves:
        if leaf.grad is None or leaf.dim() < 2 or leaf.shape[-2] != logits.shape[1]:
            continue
        by_token = leaf.grad.reshape(-1, *leaf.shape[-2:])[0].float().abs().amax(-1)
        if len(real) > 1 and by_token[real[1:]].max() > _NOTHING * by_token.max():
            raise UserError(
                f"model: {name} is no causal language model: what it says of a token depends on the tokens after it "
                "(an encoder, or is_decoder: false)"
            )
