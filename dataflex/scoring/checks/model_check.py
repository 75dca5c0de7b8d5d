"""Whether a model is what training and scoring are made for: a causal language model that returns its logits.

Found by a forward and a backward of activations of one sample before training, in scoring mode, so that neither
weights nor the random state change; and, where samples share rows, of two in one row. Every rank looks at the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.forward.split import WANTED, logits_of, split_batch
from dataflex.scoring.context import evaluating, frozen, leaf_embeddings, release_gathered
from dataflex.utils.errors import UserError, brief

# A causal model's gradients are exact zeros there; of others they were never below a thousandth of the largest.
_NOTHING = 1e-5
# Of a packed sample's logits against those alone; bf16 and fp16 round, and an expert may change.
_SAME, _SAME_HALF = 1e-2, 0.2
# The probe takes so many tokens of what a sample has for each.
_PROBED, _PER_TOKEN = 16, ("input_ids", "labels", "attention_mask", "token_weight")


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
    with probing(module, torch.device(engine.device), leaves):
        logits = logits_of(module(**inputs))
        _check_shape(logits, labels, raw_labels, name)
        if logits.requires_grad:
            _check_causal(logits, leaves, _real(inputs, raw_labels), name)
    release_gathered(engine)


def refusal(engine: Any, tokens: int) -> str | None:
    """Why ``engine.module`` cannot be run on a row of so many tokens, or None where it can; a collective."""
    device = torch.device(engine.device)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    why = None
    with probing(engine.module, device):
        try:
            engine.module(input_ids=ids, attention_mask=torch.ones_like(ids))
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError) as exc:
            why = brief(exc)
    release_gathered(engine)
    return why


@contextmanager
def probing(module: nn.Module, device: torch.device, leaves: list[Tensor] | None = None) -> Iterator[None]:
    """Scoring mode; the random state stays as it is.

    leaves: takes the embeddings, where the model has any; without it, or with a model of none, there is no gradient,
    and no checkpointing of activations that a backward would need.
    """
    embeds = leaves is not None and any(isinstance(m, nn.Embedding) for m in module.modules())
    watched = leaf_embeddings(module, leaves) if embeds else nullcontext()
    modes = (evaluating(module, gradients=embeds), frozen(module), torch.set_grad_enabled(embeds), watched)
    with ExitStack() as stack:
        for mode in (torch.random.fork_rng([device] if device.type == "cuda" else []), *modes):
            stack.enter_context(mode)
        yield


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
    if len(real) > 1 and _depends(logits[0, real[0]], leaves, logits.shape[1], real[1:], name):
        raise UserError(
            f"model: {name} is no causal language model: what it says of a token depends on the tokens after it "
            "(an encoder, or is_decoder: false)"
        )


def _depends(logits: Tensor, leaves: list[Tensor], width: int, tokens: Tensor, name: str) -> bool:
    """Whether ``logits`` [..., V] depend on the embeddings of ``tokens``, places in rows of ``width`` tokens.

    leaves: embeddings, [..., width, K], or [width, rows, K] of a model that has tokens first.
    """
    made = torch.Generator().manual_seed(0)
    direction = torch.randn(logits.shape[-1], generator=made).to(logits.device)
    try:
        (logits.float() * direction).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as exc:  # reversible layers, operators without a derivative
        raise UserError(
            f"model: {name} has no gradient in evaluation mode, in which samples are scored: {brief(exc)}"
        ) from exc
    for leaf in leaves:
        places = [place for place in range(leaf.dim() - 1) if leaf.shape[place] == width]
        if leaf.grad is None or not places:
            continue
        by_token = leaf.grad.float().abs().movedim(places[-1], 0).flatten(1).amax(1)
        if by_token[tokens].max() > _NOTHING * by_token.max():
            return True
    return False


def check_packing(engine: Any, collator: Callable[[list[Any]], dict[str, Any]], sample: dict[str, Any]) -> None:
    """UserError of one line where the collator packs and samples of one row see each other; a collective.

    sample: of at least two tokens, the same on every rank; a row is made of its beginning, twice.
    """
    sample = {key: value[:_PROBED] if key in _PER_TOKEN else value for key, value in sample.items()}
    batch = collator([sample, sample])
    if "cu_seqlens" not in batch or len(batch["labels"]) > 1:
        return
    module, device = engine.module, torch.device(engine.device)
    name, size = _name(module), len(sample["input_ids"])
    alone, packed = (split_batch(made, device).inputs for made in (collator([sample]), batch))
    with probing(module, device):
        wanted = logits_of(module(**alone))[0, :size].float()
    release_gathered(engine)
    leaves: list[Tensor] = []
    with probing(module, torch.device(engine.device), leaves):
        logits = logits_of(module(**packed))
        found = logits[0, size : 2 * size]
        first = torch.arange(size, device=device)
        seen = found.requires_grad and _depends(found, leaves, logits.shape[1], first, name)
    release_gathered(engine)
    error = (found.detach().float() - wanted).norm() / wanted.norm()
    if seen or error > (_SAME if found.dtype is torch.float32 else _SAME_HALF):
        raise UserError(
            f"packing: {name} does not keep samples of one row apart: what it says of the second depends on the first "
            "(position_ids that begin again do not tell it where a sample begins); set packing: false"
        )
