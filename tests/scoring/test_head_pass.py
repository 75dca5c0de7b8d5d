"""less_head's features are the projection of float64 autograd's gradient of the output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dataflex.data.pool import Pool
from dataflex.forward import fused as rule
from dataflex.forward.head import UnknownHead, find_head
from dataflex.ops import Projection, Sums, project_per_sample_grad_, tensor_id
from dataflex.ops.losses.loss_reference import fold
from dataflex.scoring.checks.head_check import known_head
from dataflex.scoring.passes.head_pass import PROJECTED, SKETCH, HeadFeatures
from dataflex.train.selector.less_head_selector import LessHeadSelector
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.forward import models

K1, PROJ, SEED = 64, 512, 5
CPU = torch.device("cpu")


def opened(net: Any, packed: bool) -> rule.FusedHead:
    inputs, labels, counted = models.batch(packed)
    return known_head(net, {**inputs, "labels": labels, "cu_seqlens": counted.cu_seqlens}, device=CPU)


def by_autograd(net: Any, packed: bool) -> tuple[Tensor, Tensor]:
    """Of each sample the gradient of its mean loss by the output layer's weight [S, V, H], and its projection."""
    inputs, _, counted = models.batch(packed)
    weight = find_head(net).base.weight
    weight.requires_grad_()
    logits = net(**inputs).logits.flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, counted.labels, reduction="none", ignore_index=-100)
    grads, features = [], []
    for start, end in zip(counted.cu_seqlens[:-1].tolist(), counted.cu_seqlens[1:].tolist(), strict=True):
        loss = each[start:end].sum() / (counted.labels[start:end] != -100).sum()
        (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
        bucket, sign = fold(len(grad), K1, SEED, tensor_id(SKETCH))
        folded = grad.new_zeros(K1, grad.shape[1]).index_add_(0, bucket, grad * sign[:, None])
        out = grad.new_zeros(1, PROJ)
        rows = torch.eye(K1, dtype=grad.dtype)
        of = Projection(tensor_id(PROJECTED), SEED)
        project_per_sample_grad_(Sums(out), rows, folded, torch.tensor([0, K1]), of)
        grads.append(grad)
        features.append(out[0])
    return torch.stack(grads), torch.stack(features)


@pytest.mark.parametrize(
    ("name", "kind", "packed"),
    [
        ("llama", "full", False),
        ("llama", "frozen head", True),
        ("llama", "lora head", True),
        ("tied", "lora", False),
        ("gemma2", "full", True),
        ("granite", "full", False),
        ("gptj", "full", False),
    ],
)
def test_features_are_the_projected_gradient_of_the_output_layer(
    name: str, kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "CHUNK_TOKENS", {"cpu": 5, "cuda": 5})
    for dtype, room in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        net = models.family(name, dtype, kind).eval()
        inputs, _, counted = models.batch(packed)
        made = HeadFeatures(opened(net, packed), K1, PROJ, SEED).of_batch(net, inputs, counted)
        looked_up = net.get_input_embeddings()  # where it is tied, that is no part of the layer's gradient
        looked_up.weight = torch.nn.Parameter(looked_up.weight.detach().clone())
        _, want = by_autograd(net.double(), packed)
        assert made.dtype is dtype and not made.requires_grad
        assert (made.double() - want).norm() < room * want.norm(), (name, kind, dtype)


def test_inner_products_are_those_of_the_gradients_over_seeds() -> None:
    net = models.family("llama", torch.float64).eval()
    head = opened(net, False)
    inputs, _, counted = models.batch()
    found = torch.stack([HeadFeatures(head, 256, 2048, seed).of_batch(net, inputs, counted) for seed in range(40)])
    mean = (found @ found.mT).mean(0)
    grads = by_autograd(net, False)[0].flatten(1)
    lengths = grads.norm(dim=1)
    apart = (mean - grads @ grads.T).abs() / (lengths[:, None] * lengths)
    assert apart.max() < 0.05


def test_what_does_not_fit_is_said() -> None:
    def made(**more: Any) -> LessHeadSelector:
        def unknown() -> Any:
            raise UnknownHead("the output layer is a Odd with a forward of its own")

        target = Pool.from_datasets(tiny.samples(1, seed=1))
        given = {"scorer": None, "eval_dataset": target, "open_head": unknown, **more}
        return LessHeadSelector([1], None, None, None, **given)

    for more, text in (
        ({"eval_dataset": []}, "less_head: eval_dataset: the target is empty"),
        ({"sketch_dim": 100}, "less_head: sketch_dim: expected a power of two >= 2, got 100"),
        ({"proj_dim": -1}, "less_head: "),
        ({}, "less_head: needs a linear output layer: the output layer is a Odd with a forward of its own"),
    ):
        with pytest.raises(UserError, match=text):
            made(**more)
