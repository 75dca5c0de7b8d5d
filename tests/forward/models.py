"""Small causal models with every kind of output layer, and a batch for them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from dataflex.forward.counted import Counted
from dataflex.ops import shift_labels

VOCABULARY = 131
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SMALL)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SMALL, tie_word_embeddings=True)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SMALL, head_dim=16)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_SMALL, logits_scaling=8.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_SMALL)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, rotary_dim=8)),
}
LORA = ["q_proj", "v_proj", "up_proj", "down_proj"]


def family(name: str, dtype: torch.dtype = torch.float32, kind: str = "full") -> Any:
    """A random model. kind: ``full``, ``frozen head``, ``lora``, ``lora head``, ``saved head`` or ``resized``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net: Any = FAMILIES[name]()
        head = net.get_output_embeddings()
        with torch.no_grad():
            for parameter in head.parameters():  # so that losses are no constant, and a softcap cuts off
                parameter.add_(torch.randn_like(parameter), alpha=0.5 if name != "gemma2" else 8.0)
        if kind == "resized":
            net.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
        if kind == "frozen head":
            head.requires_grad_(False)
        if "lora" in kind or kind == "saved head":
            net = adapted(net, kind)
    net.config.use_cache = False
    return net.to(dtype)


def adapted(net: nn.Module, kind: str) -> Any:
    from peft import LoraConfig, get_peft_model

    more = {"modules_to_save": ["lm_head"]} if kind == "saved head" else {}
    targets = [*LORA, "lm_head"] if kind == "lora head" else LORA
    config = LoraConfig(
        r=3, lora_alpha=6, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM", **more
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by names that are to go
        return get_peft_model(net, config, autocast_adapter_dtype=False)


def batch(packed: bool = False) -> tuple[dict[str, Tensor], Tensor, Counted]:
    """Inputs, raw labels and what the losses are of: three samples with prompts, in rows of their own or in one."""
    draw = torch.Generator().manual_seed(5)
    lengths = (9, 4, 7)
    if packed:
        ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=draw)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        labels = ids.clone()
        labels[0, ends[:-1]] = -100
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        return {"input_ids": ids, "position_ids": positions}, labels, Counted(shift_labels(labels), ends)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=draw)
    mask = (torch.arange(9)[None] < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels, Counted(shift_labels(labels), torch.arange(4) * 9)
