"""Tiny configs of the causal language models of transformers, by rules for the names of their fields.

The rules make most families small; `OWN` has what is left of a family. Everything that is no size (dropout, biases,
ties, activation functions, which layer is of which kind) is as the family's default has it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY = 97
SIZES = {
    32: "hidden_size n_embd d_model embedding_size emb_dim embedding_dim dim_model lru_width word_embed_proj_dim "
    "attention_hidden_size input_embedding_size output_embedding_size feed_forward_size",
    48: "intermediate_size d_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size n_inner "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
    "dense_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size mamba_d_ssm",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k num_query_groups num_key_value_groups n_group "
    "linear_num_key_heads index_n_heads top_k_experts swa_num_key_value_heads",
    4: "rotary_dim num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim qk_nope_head_dim "
    "linear_num_value_heads mamba_n_heads swa_num_attention_heads linear_num_heads mamba_num_heads "
    "chunk_size mamba_chunk_size attention_head_count",
    8: "head_dim v_head_dim kv_lora_rank qk_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state "
    "mamba_d_head time_step_rank mamba_dt_rank kv_channels swa_head_dim state_size ssm_state_size mamba_head_dim "
    "index_head_dim dim_head d_head linear_head_dim laurel_rank adapter_rank hidden_size_per_layer_input "
    "attention_head_size rel_extent global_head_dim o_lora_rank hc_lowrank",
    24: "q_lora_rank router_hidden_size",
    128: "index_topk max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length "
    "model_max_length original_max_position_embeddings max_target_positions",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    1: "topk_group",
}
_SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Sizes of a family that the rules above get wrong.
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_group": 1, "num_experts_per_tok": 2, "n_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron_h": {"n_groups": 2},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_buckets": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16]},
    "roc_bert": {
        "pronunciation_vocab_size": 97,
        "shape_vocab_size": 97,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Kept out of the table: their kind is in it by another family.
ENCODERS = (
    "bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta-prelayernorm "
    "roc_bert roformer xlm-roberta xlm-roberta-xl xmod xlm"
)
DECODERS = "bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper"
# The families that most models have are the first rows.
FIRST = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neo gpt_neox gptj gpt_bigcode opt bloom mpt "
    "falcon olmo olmo2 olmo3 cohere cohere2 granite glm glm4 stablelm starcoder2 smollm3 mixtral qwen2_moe qwen3_moe "
    "phimoe olmoe gpt_oss dbrx deepseek_v2 deepseek_v3 llama4_text granitemoe jamba mamba mamba2 falcon_mamba "
    "falcon_h1 bamba zamba2 nemotron_h qwen3_next lfm2 recurrent_gemma rwkv bitnet doge biogpt xglm exaone4 ernie4_5 "
    "seed_oss hunyuan_v1_dense arcee apertus minimax glm4_moe dots1 helium nemotron persimmon codegen ctrl"
)


def families() -> list[str]:
    """The model types of the table: those that transformers has a causal language model of text alone for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    out = {*ENCODERS.split(), *DECODERS.split()}
    every = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in out and not _is_composite(name)]
    first = FIRST.split()
    return [name for name in first if name in every] + [name for name in every if name not in first]


def tiny_config(family: str) -> Any:
    """The family's config with small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(kind)}
    changed = {name: size for name, size in (_SIZE_OF | _IDS).items() if name in known}
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    changed = {n: s for n, s in changed.items() if n in _IDS or isinstance(defaults[n], int)}
    if "qk_rope_head_dim" in known:  # latent attention: every head has keys of its own
        latent = {"head_dim": _SIZE_OF["qk_rope_head_dim"], "num_key_value_heads": _SIZE_OF["num_attention_heads"]}
        changed |= {name: size for name, size in latent.items() if name in known}
    config = kind(**(changed | OWN.get(family, {})))
    config.use_cache = False
    return config


def _is_composite(family: str) -> bool:
    """Whether the family's config has a part of its own for text, images or sound."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parts = CONFIG_MAPPING[family].sub_configs
    return any(
        name.endswith(("text_config", "vision_config", "audio_config", "coder_config", "coder")) for name in parts
    )
