"""Tiny random models of most architectures that transformers calls a causal language model, for tests only."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny_models import VOCABULARY

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # far from uniform, so that answers differ from prompt to prompt
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL = {**_IDS, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
_MAMBA = {
    **_IDS,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
    "expand": 2,
    "initializer_range": 0.2,
    "use_mambapy": False,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # dense decoders
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": {**_GROUPED, "sliding_window": 8},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": _DECODER,
    "phi3": {**_GROUPED, "rope_scaling": None},
    "stablelm": _GROUPED,
    "starcoder2": {**_GROUPED, "residual_dropout": 0.1, "embedding_dropout": 0.1},
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {**_GROUPED, "logit_scale": 0.5},
    "cohere2": {**_GROUPED, "logit_scale": 0.5, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {**_GROUPED, "logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "nemotron": {**_GROUPED, "head_dim": 8},
    "persimmon": {**_DECODER, "hidden_dropout": 0.1},
    "glm": {**_GROUPED, "head_dim": 8},
    "glm4": {**_GROUPED, "head_dim": 8},
    "smollm3": _GROUPED,
    "ernie4_5": {**_GROUPED, "head_dim": 8},
    "exaone4": {**_GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "helium": {**_GROUPED, "head_dim": 8},
    "seed_oss": {**_GROUPED, "head_dim": 8, "residual_dropout": 0.1},
    "arcee": _GROUPED,
    "apertus": _GROUPED,
    "diffllama": _GROUPED,
    "doge": _GROUPED,
    "bitnet": _GROUPED,
    "nanochat": _GROUPED,
    "vaultgemma": {**_GROUPED, "head_dim": 8, "sliding_window": 8},
    "modernbert-decoder": {**_DECODER, "sliding_window": 8, "global_attn_every_n_layers": 2},
    # older decoders, with positions, biases and functional dropout of their own
    "gpt2": _GPT2,
    "gpt_neo": {**_IDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8, "max_position_embeddings": 128, "initializer_range": 0.2, "resid_dropout": 0.1},
    "gpt_neox": {**_DECODER, "hidden_dropout": 0.1},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gpt_bigcode": _GPT2,
    "bloom": {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "initializer_range": 0.2},
    "mpt": {**_IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "resid_pdrop": 0.1, "initializer_range": 0.2},
    "falcon": {**_DECODER, "hidden_dropout": 0.1, "alibi": False, "new_decoder_architecture": False},
    "opt": {**_IDS, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32, "dropout": 0.1, "layerdrop": 0.3, "init_std": 0.2},
    "xglm": {**_IDS, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128, "dropout": 0.1, "layerdrop": 0.3, "init_std": 0.2},
    "biogpt": {**_DECODER, "hidden_dropout_prob": 0.1, "layerdrop": 0.3},
    "openai-gpt": {**_GPT2},
    "ctrl": {**_GPT2, "dff": 48},
    # mixtures of experts
    "mixtral": {**_GROUPED, **_LOCAL, "router_jitter_noise": 0.3},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "gpt_oss": {**_GROUPED, **_LOCAL, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": _EXPERTS,
    "granitemoe": {**_GROUPED, **_LOCAL},
    "phimoe": {**_GROUPED, **_LOCAL, "router_jitter_noise": 0.01},
    "dbrx": {**_IDS, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.1}, "resid_pdrop": 0.1},
    "deepseek_v2": {**_DECODER, **_MLA, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_DECODER, **_MLA, "n_group": 1, "topk_group": 1},
    "glm4_moe": {**_GROUPED, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {**_GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "llama4_text": {**_GROUPED, **_LOCAL, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 64, "interleave_moe_layer_step": 1},
    "jetmoe": {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128, "initializer_range": 0.2},
    # state-space, recurrent and hybrid models
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": _MAMBA,
    "rwkv": {**_IDS, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
    "recurrent_gemma": {**_GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8, "w_init_variance_scale": 1.0},
    "xlstm": {**_IDS, "hidden_size": 32, "embedding_dim": 32, "num_blocks": 2, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 8, "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native", "step_kernel": "native", "mode": "inference", "qk_dim_factor": 0.5, "v_dim_factor": 1.0},
    "jamba": {**_GROUPED, **_LOCAL, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "bamba": {**_GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8},
    "granitemoehybrid": {**_GROUPED, **_LOCAL, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8},
    "falcon_h1": {**_GROUPED, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8},
    "zamba2": {**_GROUPED, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "chunk_size": 8, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "use_mem_rope": False, "hybrid_layer_ids": [1], "adapter_rank": 4},
    "qwen3_next": {**_EXPERTS, **_LINEAR, "head_dim": 8, "shared_expert_intermediate_size": 24},
    "lfm2": {**_GROUPED, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "block_auto_adjust_ff_dim": False},
    "minimax": {**_GROUPED, **_LOCAL, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "nemotron_h": {**_GROUPED, "head_dim": 8, "hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2, "use_mamba_kernels": False},
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_architecture(name: str, seed: int = 0) -> PreTrainedModel:
    """A random causal language model of the architecture, in eval mode.

    Args:
        name: a key of `CONFIGS`.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()
