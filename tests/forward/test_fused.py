"""Losses made inside of the output layer are those of its logits, with their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dataflex.forward import fused as rule
from dataflex.forward.fused import FusedHead
from dataflex.forward.head import UnknownHead, find_head
from dataflex.forward.losses import Forward
from dataflex.scoring.checks.head_check import open_head
from dataflex.utils.errors import UserError
from tests.forward import models
from tests.forward.pairs import every_pair, every_row, pairs

CPU = torch.device("cpu")
# family, kind of head, dtype, packed, activation checkpointing, weights known before.
AXES = (
    tuple(models.FAMILIES),
    ("full", "frozen head", "lora", "lora head", "saved head", "resized"),
    ("double", "bfloat16", "float16"),
    (False, True),
    (True, False),
    (True, False),
)
CASES = every_pair(AXES)
EVERY = [row for row in every_row(AXES) if row not in CASES]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "CHUNK_TOKENS", {"cpu": 5, "cuda": 5})


def opened(net: nn.Module, packed: bool = False, mode: str = "on") -> FusedHead | None:
    inputs, labels, counted = models.batch(packed)
    collated = {**inputs, "labels": labels, "cu_seqlens": counted.cu_seqlens}
    return open_head(mode, net, collated, 1 << 20, device=CPU)


def run(net: Any, forward: Forward, packed: bool, known: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses, lse and gradients of a weighted loss."""
    net.zero_grad(set_to_none=True)
    inputs, _, counted = models.batch(packed)
    tokens = len(counted.labels)
    counted = replace(
        counted, token_weight=torch.linspace(0.5, 2, tokens), class_weight=torch.linspace(1, 3, _columns(net))
    )
    factors = torch.linspace(0.1, 1, tokens)
    losses, _, total, _ = forward(net, inputs, counted, factors=factors if known else None)
    assert forward.fused is None or (total is not None) == (known and forward.fused.head.trained)
    ((losses.token_loss * factors).sum() if total is None else total).backward()
    grads = {n: p.grad.double() for n, p in net.named_parameters() if p.grad is not None}
    return [losses.loss.detach().double(), losses.lse.detach().double()], grads


def _columns(net: Any) -> int:
    return int(find_head(net).shape[0])


CONDITIONS = ("name", "kind", "dtype", "packed", "checkpointed", "known")


@pytest.mark.parametrize(CONDITIONS, CASES)
def test_losses_and_gradients_are_those_of_the_logits(
    name: str, kind: str, dtype: str, packed: bool, checkpointed: bool, known: bool
) -> None:
    check(name, kind, dtype, packed, checkpointed, known)


@pytest.mark.slow
@pytest.mark.parametrize(CONDITIONS, EVERY)
def test_losses_and_gradients_under_all_conditions(
    name: str, kind: str, dtype: str, packed: bool, checkpointed: bool, known: bool
) -> None:
    check(name, kind, dtype, packed, checkpointed, known)


def test_every_pair_of_conditions_occurs() -> None:
    assert set().union(*map(pairs, CASES)) == set().union(*map(pairs, every_row(AXES)))


def check(name: str, kind: str, dtype: str, packed: bool, checkpointed: bool, known: bool) -> None:
    exact = dtype == "double"
    net = models.family(name, getattr(torch, dtype), kind).train()
    if checkpointed:
        net.enable_input_require_grads()
        net.activation_checkpointing_enable({"use_reentrant": False})
    fused = opened(net, packed)
    assert fused is not None
    losses, grads = run(net, Forward(fused), packed, known)
    plain, wanted = run(net, Forward(), packed, known)
    if not exact:  # within what the plain path in bfloat16 is off
        truth, gradients = run(net.double(), Forward(), packed, known)
    assert set(grads) == set(wanted)
    for place, (mine, theirs) in enumerate(zip(losses, plain, strict=True)):
        if exact:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        else:
            assert (mine - truth[place]).norm() <= 2 * (theirs - truth[place]).norm() + 1e-3 * truth[place].norm()
    for key, mine in grads.items():
        if exact:
            assert (mine - wanted[key]).norm() <= 1e-6 * wanted[key].norm() + 1e-9, key
        else:
            want = gradients[key]
            assert (mine - want).norm() <= 2 * (wanted[key] - want).norm() + 1e-2 * want.norm(), key


def test_what_a_model_makes_of_its_logits_is_read() -> None:
    found = {}
    for name in ("llama", "gemma2", "granite", "cohere"):
        fused = opened(models.family(name))
        assert fused is not None
        found[name] = fused.scale, fused.softcap
    assert found == {"llama": (1.0, 0.0), "gemma2": (1.0, 30.0), "granite": (0.125, 0.0), "cohere": (0.0625, 0.0)}


class Odd(nn.Module):
    """A model around another one that does something of its own with the logits."""

    def __init__(self, net: nn.Module, what: str) -> None:
        super().__init__()
        self.net, self.what = net, what

    def get_output_embeddings(self) -> Any:
        return None if self.what == "nameless" else self.net.lm_head

    def forward(self, **inputs: Any) -> Any:
        outputs = self.net(**inputs)
        if self.what == "shifted":
            outputs.logits = outputs.logits + 1.0
        if self.what == "masked":
            outputs.logits = outputs.logits * (torch.arange(outputs.logits.shape[-1]) != 2)
        if self.what == "cut":
            outputs.logits = outputs.logits[..., 1:]
        if self.what == "twice":
            self.net.lm_head(self.net.model.embed_tokens(inputs["input_ids"]))
        if self.what == "past the layer":
            outputs.logits = self.net.model(**inputs)[0] @ self.net.lm_head.weight.T
        return outputs


@pytest.mark.parametrize("what", ["nameless", "shifted", "masked", "cut", "twice", "past the layer"])
def test_an_unknown_head_keeps_its_logits_and_says_why(what: str, caplog: pytest.LogCaptureFixture) -> None:
    net = Odd(models.family("llama"), what)
    with pytest.raises(UserError, match="fused_head: on: .*; set auto, or off"):
        opened(net)
    assert opened(net, mode="off") is None
    with caplog.at_level("INFO", logger="dataflex"):
        assert opened(net, mode="auto") is None
    assert caplog.messages[-1].startswith("fused_head: losses are made of logits: ")
    assert "forward" not in vars(net.net.lm_head)


def test_a_head_of_another_dtype_or_form_is_unknown() -> None:
    net = models.family("llama")
    net.lm_head.to(torch.bfloat16).register_forward_pre_hook(lambda _m, args: (args[0].bfloat16(),))
    assert opened(net) is not None  # its input comes in its dtype
    net = models.family("llama", kind="lora head")
    net.base_model.model.lm_head.lora_B["default"].to(torch.bfloat16)
    with pytest.raises(UnknownHead, match="another dtype"):
        find_head(net)


def test_reading_logits_that_were_not_made_is_an_error() -> None:
    net = models.family("llama")
    forward = Forward(opened(net))
    inputs, _, counted = models.batch()
    outputs = forward(net, inputs, counted).outputs
    for use in (
        lambda x: x.shape,
        lambda x: x[0],
        lambda x: torch.softmax(x, -1),
        lambda x: x * 2,
        lambda x: list(x),
        lambda x: x.float(),
    ):
        with pytest.raises(UserError, match=r"outputs.logits: there are none"):
            use(outputs.logits)
        with pytest.raises(UserError, match=r"outputs.logits: there are none"):
            use(outputs["logits"])
        with pytest.raises(UserError, match=r"outputs.logits: there are none"):
            use(outputs[0])
    assert net(**inputs).logits.shape[-1] == models.VOCABULARY  # a forward of the user's own has them


def test_the_rule_takes_the_plain_way_where_it_needs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "CHUNK_TOKENS", {"cpu": 512, "cuda": 2048})
    head, small = (nn.Linear(8, columns, bias=False) for columns in (128_256, 500))

    def pays(layer: nn.Linear, tokens: int, backward: bool = True) -> bool:
        return FusedHead(find_head(Odd(_Held(layer), ""))).pays(tokens, backward=backward)

    assert not pays(head, 512)  # one chunk
    assert not pays(head, 513, backward=False)
    assert pays(head, 600)
    assert pays(head, 1100, backward=False)
    assert not pays(small, 40_000)  # 160 MB
    assert pays(small, 1 << 17)
    half = nn.Linear(128, 1000, bias=False).bfloat16()
    least = FusedHead(find_head(Odd(_Held(half), ""))).least_tokens(1 << 20)
    assert least == 50_332  # 192 MiB of logits and their gradient; its own gradient in float32 is less
    assert replace(FusedHead(find_head(Odd(_Held(head), ""))), twice=True).least_tokens(1 << 20) == 1047  # 1 GiB


class _Held(nn.Module):
    def __init__(self, lm_head: nn.Linear) -> None:
        super().__init__()
        self.lm_head = lm_head


class Ends(nn.Module):
    """A model whose logits go through something last; ``seen`` are they, and the gradient they got."""

    def __init__(self, net: Any, end: Any) -> None:
        super().__init__()
        self.net, self.end = net, end
        self.seen: list[Tensor] = []

    def forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.end(self.net(**inputs).logits)
        self.seen.append(logits.detach())
        logits.register_hook(self.seen.append)
        return logits


@pytest.mark.parametrize(
    ("name", "end", "inplace"),
    [
        ("llama", lambda x: x, True),
        ("gemma2", lambda x: x, True),
        ("granite", lambda x: x[:], True),
        ("llama", torch.tanh, False),
        ("llama", lambda x: torch.tanh(x)[:, :, :], False),
        ("llama", lambda x: torch.tanh(x) * 2, True),
        ("llama", lambda x: x.exp().log(), True),
        ("llama", lambda x: x.cumsum(-1), False),
    ],
)
def test_a_gradient_takes_the_place_of_logits_that_no_one_reads(name: str, end: Any, inplace: bool) -> None:
    inputs, _, counted = models.batch()
    found = {}
    for keeps in (True, False):
        inner = models.family(name)
        inner.enable_input_require_grads()
        inner.activation_checkpointing_enable({"use_reentrant": False})
        net = Ends(inner, end)
        Forward(keeps_logits=keeps)(net, inputs, counted).losses.loss.sum().backward()
        logits, gradient = net.seen
        assert (logits.data_ptr() == gradient.data_ptr()) == (inplace and not keeps)
        found[keeps] = [p.grad for p in net.parameters()]
    for kept, mine in zip(found[True], found[False], strict=True):
        assert kept is mine is None or torch.equal(kept, mine)
