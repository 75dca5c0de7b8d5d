"""Tiny stand-ins for tests: a byte-level tokenizer and a random Llama, both without a download."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from dataflex.demo.byte_tokenizer import byte_tokenizer as demo_tokenizer


def byte_tokenizer(chat_template: str | None = None, eos: bool = True) -> PreTrainedTokenizerFast:
    """The demo's byte-level tokenizer (vocabulary of 259), by default without a chat template."""
    return demo_tokenizer(chat_template, eos)


def tiny_llama(vocab: int = 259, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random two-layer Llama (hidden size 32, grouped heads, sdpa) on the CPU in fp32.

    ``overrides`` go to `LlamaConfig`. The global random state is left as it was.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


def tiny_mixtral(vocab: int = 259, seed: int = 0, **overrides: Any) -> MixtralForCausalLM:
    """A random two-layer Mixtral (hidden size 32, four experts, two for each token) on the CPU in fp32."""
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(MixtralConfig(**(settings | overrides)))
