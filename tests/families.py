"""Tiny random models of several families, and single-sample float64 autograd as the truth about gradients."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    **_SIZES,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 5, **_EXPERTS}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "cohere": ("CohereConfig", {"use_qk_norm": True}),
    "opt": ("OPTConfig", {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "falcon": ("FalconConfig", {"multi_query": False, "bias": True}),
    "apertus": ("ApertusConfig", {}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "mamba": ("MambaConfig", {"state_size": 4, "time_step_rank": 2}),
}
# Families that are scored in part, or not at all.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox_japanese": ("GPTNeoXJapaneseConfig", {"hidden_dropout": 0.0}),
}
_UNKNOWN = {
    "gpt2": (*_SIZES, "intermediate_size"),
    "opt": ("intermediate_size", "num_key_value_heads"),
    "falcon": ("intermediate_size", "num_key_value_heads"),
    "gpt_neox_japanese": ("num_key_value_heads",),
    "mamba": ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
}


def model(family: str, **changes: Any) -> Any:
    """A random model in float32; biases and norms are random too."""
    name, own = (FAMILIES | OTHERS)[family]
    own = own | changes
    unknown = _UNKNOWN.get(family, ())
    common = {k: v for k, v in _COMMON.items() if k not in unknown}
    config = getattr(transformers, name)(**(common | own))
    config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return net.float()


def with_lora(net: Any, targets: Any = "all-linear") -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM")
        return get_peft_model(net, config)


def sample_gradient(net: torch.nn.Module, sample: dict[str, Any]) -> dict[str, Tensor]:
    """{name: gradient} of one sample's mean loss, by plain autograd on ``net`` as it is."""
    net.zero_grad(set_to_none=True)
    ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
    logits = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    zero = torch.zeros_like
    return {n: zero(p) if p.grad is None else p.grad for n, p in net.named_parameters() if p.requires_grad}


def as_matrix(tensor: Tensor) -> Tensor:
    """A parameter's tensor as the projection sees it: experts below one another, vectors as one row."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
