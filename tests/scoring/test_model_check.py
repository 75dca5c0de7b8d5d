"""A model that is no causal language model, or returns no logits, is refused in one line before training."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

import dataflex
from dataflex.data.encoding.collate import Collator
from dataflex.scoring.checks.head_check import open_head
from dataflex.scoring.checks.model_check import check_model, check_packing, refusal
from dataflex.utils.errors import UserError
from tests import families
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.scoring.test_coverage import PlainEngine, pool
from tests.test_initialize import Bigram, collate

WHERE = [(0, 1), (3, 2)]  # ZeRO stage, ranks
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class Returns(Bigram):
    """The bigram model with its logits in another shape of answer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids)
        answers: dict[str, Any] = {
            "tensor": logits,
            "dict": {"logits": logits},
            "tuple": (logits, None),
            "odd dict": {"scores": logits},
            "loss": logits.mean(),
            "last only": logits[:, -1:],
        }
        return answers[self.how]


class OwnLoss(Bigram):
    """Wants the labels."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any, labels: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input_ids).mean()


def models() -> dict[str, Any]:
    bert, llama = transformers.BertConfig(**SIZES), transformers.LlamaConfig(**SIZES, pad_token_id=0)
    t5 = transformers.T5Config(vocab_size=259, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16)
    mamba = transformers.MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4)
    answers = ("tensor", "dict", "tuple", "odd dict", "loss", "last only")
    return {
        **{how: lambda how=how: Returns(how) for how in answers},
        "own loss": OwnLoss,
        "encoder": lambda: transformers.BertLMHeadModel(bert),
        "decoder": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True)),
        "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(t5),
        "classifier": lambda: transformers.LlamaForSequenceClassification(llama),
        "token classifier": lambda: transformers.LlamaForTokenClassification(llama),
        "experts": lambda: tiny.model("moe"),
        "adapter": lambda: tiny.model("lora"),
        "packed": lambda: tiny.model("lora"),
        "packed states": lambda: transformers.MambaForCausalLM(mamba),
    }


def check(stage: int) -> dict[str, Any]:
    """What `initialize` says of each model, or the first step's loss; the random state after it, if it moved."""
    found = {}
    for name, make in models().items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = make()
        state = torch.get_rng_state()
        try:
            engine = dataflex.initialize(
                model=net,
                config=tiny.ds_config(stage),
                dataflex={"max_steps": 1},
                train_dataset=tiny.samples(8, 1),
                data_collator=Collator(0, packing=True, cutoff_len=64) if name.startswith("packed") else collate,
            )
            assert torch.equal(state, torch.get_rng_state())
            found[name] = [engine.training_step(batch) for batch in engine.batches()]
        except UserError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, int], list[dict[str, Any]]]:
    target = "tests.scoring.test_model_check:check"
    return {(stage, ranks): run_ranks(target, ranks, stage=stage) for stage, ranks in WHERE}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("odd dict", "model: returns a dict without logits: a sample's loss is made from logits"),
        ("loss", r"model: Returns returns \[\] for 1 x \d+ tokens: a sample's loss is made from logits"),
        ("last only", r"model: Returns returns \[1, 1, 259\] for 1 x \d+ tokens"),
        (
            "own loss",
            "model: OwnLoss.forward does not take the batch .*'labels'.*called with input_ids, att",
        ),
        ("encoder", "model: BertLMHeadModel is no causal language model: what it says of a token depends on"),
        ("encoder-decoder", "model: T5ForConditionalGeneration is an encoder-decoder; dataflex trains causal"),
        ("classifier", r"model: LlamaForSequenceClassification returns \[1, 2\] for 1 x"),
        ("packed states", "packing: MambaForCausalLM does not keep samples of one row apart: .*set packing: false"),
        ("token classifier", "model: LlamaForTokenClassification returns 2 logits a token, the data has label"),
    ],
)
def test_another_kind_of_model_is_refused_alike_on_all_ranks(name: str, text: str, where: Any, found: Any) -> None:
    for rank in found[where]:
        assert re.match(text, rank[name]), rank[name]
        assert "\n" not in rank[name]


@pytest.mark.parametrize("where", WHERE)
def test_logits_in_a_dict_or_a_tuple_train_like_a_tensor(where: Any, found: Any) -> None:
    for rank in found[where]:
        assert 4 < rank["tensor"][0] < 7
        assert rank["dict"] == rank["tuple"] == rank["tensor"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["decoder", "experts", "adapter", "packed"])
def test_a_causal_language_model_trains(name: str, where: Any, found: Any) -> None:
    for rank in found[where]:
        assert 4 < rank[name][0] < 7


@pytest.mark.parametrize(
    ("family", "apart"),
    [("llama", True), ("gemma3", True), ("mixtral", True), ("gpt_oss", False), ("mamba", False)],
)
def test_samples_of_one_row_must_not_see_each_other(family: str, apart: bool) -> None:
    net, (first, second) = families.model(family).eval(), pool(2)
    packs = Collator(0, packing=True, cutoff_len=64)
    row, alone = packs([first, second]), packs([second])
    start = len(first["input_ids"])
    found, wanted = (net(**{k: v for k, v in b.items() if k.endswith("ids")}).logits[0] for b in (row, alone))
    assert torch.allclose(found[start:], wanted, atol=1e-4) == apart
    check_packing(PlainEngine(net), Collator(0), first)
    if apart:
        check_packing(PlainEngine(net), packs, first)
        check_packing(PlainEngine(net.to(torch.bfloat16)), packs, first)
        return
    with pytest.raises(UserError, match=r"packing: \w+ does not keep samples of one row apart.*set packing: false"):
        check_packing(PlainEngine(net), packs, first)


class Differs(Bigram):
    """Its logits are ``by`` of themselves larger where a second sample begins in the row, without a gradient."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input_ids) * (1 + self.by * int((position_ids == 0).sum() > 1))


@pytest.mark.parametrize(
    ("dtype", "by", "apart"),
    [
        (torch.float32, 0.002, True),
        (torch.float32, 0.05, False),
        (torch.bfloat16, 0.05, True),
        (torch.bfloat16, 0.5, False),
    ],
)
def test_logits_of_one_row_may_differ_by_what_their_dtype_rounds(dtype: torch.dtype, by: float, apart: bool) -> None:
    how = (PlainEngine(Differs(by).to(dtype)), Collator(0, packing=True, cutoff_len=64), tiny.samples(1, 1)[0])
    if apart:
        check_packing(*how)
        return
    with pytest.raises(UserError, match="packing: Differs does not keep samples of one row apart"):
        check_packing(*how)


def test_looking_at_a_model_without_a_backward_checkpoints_nothing() -> None:
    """Reentrant checkpointing warns (here: fails) where it is to keep what has no gradient."""
    net: Any = tiny.model().train()
    net.config.use_cache = False
    net.enable_input_require_grads()
    net.activation_checkpointing_enable({"use_reentrant": True})
    sample = tiny.samples(1, 1)[0]
    batch = Collator(0, packing=True, cutoff_len=64)([sample])
    assert open_head("on", net, batch, 64, device=torch.device("cpu")) is not None
    check_packing(PlainEngine(net), Collator(0, packing=True, cutoff_len=64), sample)
    assert refusal(PlainEngine(net), 8) is None
    check_model(PlainEngine(net), batch)
    assert net.training and all(layer.training for layer in net.modules())


def test_a_model_with_tokens_first_is_seen_through() -> None:
    batch = Collator(0)(pool(1))
    sizes = {"vocab_size": 97, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    net = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes))
    with pytest.raises(UserError, match="XLNetLMHeadModel is no causal language model"):
        check_model(PlainEngine(net), batch)
    check_model(PlainEngine(transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes, attn_type="uni"))), batch)


def test_a_model_without_gradients_in_evaluation_mode_is_refused() -> None:
    class Reversible(Bigram):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # type: ignore[override]
            return Backwards.apply(super().forward(input_ids))

    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise AssertionError("use `model.train()`")

    with pytest.raises(UserError, match=r"model: Reversible has no gradient in evaluation mode.*use `model.train"):
        check_model(PlainEngine(Reversible()), collate(tiny.samples(1, 1)))
