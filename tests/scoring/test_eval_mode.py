"""While scoring, activation checkpointing recomputes and turns nothing else on, whatever reads ``training``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dataflex.scoring.context import evaluating
from tests import families
from tests.scoring.test_coverage import PROJ_DIM, SEED, error, gradients, pool, projected, scorer

# Dropout of 0.1 wherever the family has it; most of these read ``training`` in the decoder layer itself.
DROPOUT: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "opt": ("OPTConfig", ["q_proj", "fc2"], {"ffn_dim": 24, "dropout": 0.1, "attention_dropout": 0.1}),
    "xglm": (
        "XGLMConfig",
        ["q_proj", "fc2"],
        {
            "d_model": 16,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 24,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
        },
    ),
    "biogpt": (
        "BioGptConfig",
        ["q_proj", "fc2"],
        {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "activation_dropout": 0.1},
    ),
    "dbrx": (
        "DbrxConfig",
        ["Wqkv", "out_proj"],
        {
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "resid_pdrop": 0.1,
            "emb_pdrop": 0.1,
            "attn_config": {"attn_pdrop": 0.1, "kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "doge": ("DogeConfig", ["q_proj", "down_proj"], {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "falcon": (
        "FalconConfig",
        ["query_key_value"],
        {"hidden_dropout": 0.1, "attention_dropout": 0.1, "new_decoder_architecture": False},
    ),
    "gpt2": ("GPT2Config", ["c_attn"], {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}


def model(family: str) -> Any:
    """A random one with LoRA whose own dropout is 0.1 too, in train mode."""
    from peft import LoraConfig, get_peft_model

    name, targets, own = DROPOUT[family]
    sizes = {"vocab_size": families.VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0}
    known = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        common = sizes | ({} if "n_embd" in own or "d_model" in own else known)
        config = getattr(transformers, name)(**(common | own))
        config.use_cache = False
        net = transformers.AutoModelForCausalLM.from_config(config).float()
        lora = LoraConfig(
            r=3, lora_alpha=6, lora_dropout=0.1, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM"
        )
        return get_peft_model(net, lora).train()


def checkpointed(net: Any, reentrant: bool) -> Any:
    net.enable_input_require_grads()
    net.activation_checkpointing_enable({"use_reentrant": reentrant})
    return net


def calls_of_a_block(net: Any) -> list[int]:
    """One number, which counts the forwards of an attention layer inside a decoder layer from now on."""
    count = [0]
    ends = tuple(f".0.{name}" for name in ("self_attn", "self_attention", "attn", "norm_attn_norm"))
    inside = next(m for n, m in net.named_modules() if n.endswith(ends))
    inside.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", DROPOUT)
def test_features_with_dropout_and_checkpointing_equal_autograd_in_eval_mode(family: str, reentrant: bool) -> None:
    net, samples = model(family), pool()
    dtype = torch.float32 if family == "xglm" else torch.float64  # its attention mask is of float32's range
    truth = projected(gradients(net, samples, dtype=dtype))
    checkpointed(net, reentrant)
    modes = [m.training for m in net.modules()]
    state, calls = torch.get_rng_state(), calls_of_a_block(net)
    got = scorer(net).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED)
    assert error(got, truth) < 1e-5
    assert calls[0] % 2 == 0 and calls[0] > 0
    assert modes == [m.training for m in net.modules()] and all(modes)
    assert torch.equal(state, torch.get_rng_state())
    assert not any("in_eval" in repr(vars(m).get("_gradient_checkpointing_func")) for m in net.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_while_scoring_recomputes_each_block_once(reentrant: bool) -> None:
    """Twice the forwards of a pass without, so that its activations are not kept; also of a model in eval mode."""
    counts = []
    for net in (model("opt"), checkpointed(model("opt"), reentrant), checkpointed(model("opt"), reentrant).eval()):
        calls = calls_of_a_block(net)
        scorer(net).gradient_features(pool(), proj_dim=PROJ_DIM, seed=SEED)
        counts.append(calls[0])
    assert counts[1] == counts[2] == 2 * counts[0] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_while_scoring_keeps_few_activations(reentrant: bool) -> None:
    """Bytes that autograd holds on to after a scoring forward: less than half of what it holds without."""
    held = []
    for net in (model("opt"), checkpointed(model("opt"), reentrant)):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, into: dict[int, int] = kept) -> torch.Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.randint(3, families.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
        decoder = net.get_base_model().model.decoder
        hidden = torch.randn(4, 64, 16, requires_grad=True)
        with (
            evaluating(net, gradients=True),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            decoder(attention_mask=torch.ones_like(ids), inputs_embeds=hidden)
        held.append(sum(kept.values()))
    assert held[1] < held[0] / 2, held
