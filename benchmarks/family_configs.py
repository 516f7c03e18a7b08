"""One config of each family that people fine-tune: real widths, few layers.

What is not written is the default of transformers for the family, which is that of a released model for most of them.
Layers are as few as show every kind of layer of the family.
"""

from __future__ import annotations

from typing import Any

TWO = {"num_hidden_layers": 2}


def _of(model_type: str, **values: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TWO, **values}


def _wrapped(wrapper: str, **text: Any) -> dict[str, Any]:
    """A vision-language wrapper around a text tower."""
    return {"model_type": wrapper, "text_config": {**TWO, **text}}


_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 2": _of("llama"),
    "Llama 3": _of("llama", num_key_value_heads=8, intermediate_size=14336, vocab_size=128256),
    "Llama 4": _of("llama4_text", num_hidden_layers=4),
    "Llama 4, wrapper": _wrapped("llama4", num_hidden_layers=4),
    "Mistral": _of("mistral"),
    "Mistral Small 3": _of("mistral", hidden_size=5120, head_dim=128, intermediate_size=32768, vocab_size=131072,
                           sliding_window=None),
    "Mistral 3, wrapper": _wrapped("mistral3", model_type="mistral"),
    "Ministral": _of("ministral", head_dim=128, layer_types=["sliding_attention"] * 2),
    "Ministral 3": _of("ministral3"),
    "Mixtral": _of("mixtral"),
    "Qwen 2.5": _of("qwen2", hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944),
    "Qwen 2 MoE": _of("qwen2_moe"),
    "Qwen 3": _of("qwen3", num_key_value_heads=8, intermediate_size=12288),
    "Qwen 3 MoE": _of("qwen3_moe", head_dim=128),
    "Qwen3-Next": _of("qwen3_next", num_hidden_layers=4, num_experts=64),
    "Qwen 3.5": _of("qwen3_5_text", num_hidden_layers=4),
    "Qwen 3.5 MoE": _of("qwen3_5_moe_text", num_hidden_layers=4, num_experts=64),
    "Qwen2.5-VL, wrapper": _wrapped("qwen2_5_vl", hidden_size=2048, num_attention_heads=16, num_key_value_heads=2,
                                    intermediate_size=11008),
    "Qwen3-VL, wrapper": _wrapped("qwen3_vl", hidden_size=2560, num_key_value_heads=8, intermediate_size=9728),
    "Gemma": _of("gemma"),
    "Gemma 2": _of("gemma2"),
    "Gemma 3": _of("gemma3_text", sliding_window=512, **_SLIDING),
    "Gemma 3, wrapper": _wrapped("gemma3", hidden_size=2560, intermediate_size=10240, sliding_window=1024),
    "Gemma 3n": _of("gemma3n_text", num_hidden_layers=5, intermediate_size=[16384] * 5, num_kv_shared_layers=0,
                    activation_sparsity_pattern=[0.0] * 5),
    "Gemma 4": _of("gemma4_text", num_hidden_layers=6),
    "Phi 2": _of("phi", hidden_size=2560, intermediate_size=10240),
    "Phi 3": _of("phi3"),
    "Phi 4": _of("phi3", hidden_size=5120, num_attention_heads=40, num_key_value_heads=10, intermediate_size=17920,
                 vocab_size=100352, sliding_window=None),
    "Phi 3.5 MoE": _of("phimoe"),
    "gpt-oss": _of("gpt_oss", num_local_experts=32),
    "GLM 4": _of("glm4"),
    "GLM 4, earlier": _of("glm"),
    "GLM 4.5": _of("glm4_moe", head_dim=128),
    "GLM 4.7 Flash": _of("glm4_moe_lite"),
    "DeepSeek V2": _of("deepseek_v2", hidden_size=2048, num_attention_heads=16, q_lora_rank=None,
                       first_k_dense_replace=1, intermediate_size=10944, moe_intermediate_size=1408,
                       n_shared_experts=2, num_experts_per_tok=6),
    "DeepSeek V3": _of("deepseek_v3", first_k_dense_replace=1, n_routed_experts=32),
    "Kimi K2": _of("deepseek_v3", first_k_dense_replace=1, num_attention_heads=64, num_key_value_heads=64,
                   vocab_size=163840, n_routed_experts=48, n_group=1, topk_group=1),
    "Kimi Linear": _of("kimi_linear", num_hidden_layers=4, num_experts=32),
    "OLMo": _of("olmo"),
    "OLMo 2": _of("olmo2", vocab_size=100352),
    "OLMo 3": _of("olmo3", vocab_size=100352, **_SLIDING),
    "OLMoE": _of("olmoe"),
    "SmolLM2": _of("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                   vocab_size=49152, tie_word_embeddings=True),
    "SmolLM3": _of("smollm3", num_hidden_layers=4),
    "Granite 3": _of("granite", num_key_value_heads=8, intermediate_size=12800, tie_word_embeddings=True),
    "Granite 3 MoE": _of("granitemoe", hidden_size=1536, num_attention_heads=24, num_key_value_heads=8,
                         intermediate_size=512, num_local_experts=40, num_experts_per_tok=8, vocab_size=49155),
    "Granite 4": _of("granitemoehybrid", hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
                     layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=8192,
                     vocab_size=100352, mamba_n_heads=64),
    "Granite 4, attention only": _of("granitemoehybrid", hidden_size=2048, num_attention_heads=32,
                                     num_key_value_heads=8, layer_types=["attention"] * 2, num_local_experts=0,
                                     shared_intermediate_size=8192, vocab_size=100352),
    "Falcon": _of("falcon"),
    "Falcon, new decoder": _of("falcon", hidden_size=8192, num_attention_heads=128, num_kv_heads=8, bias=False,
                               new_decoder_architecture=True),
    "Falcon H1": _of("falcon_h1", hidden_size=2048, num_attention_heads=8, num_key_value_heads=2),
    "Falcon Mamba": _of("falcon_mamba"),
    "Nemotron": _of("nemotron", hidden_size=3072, intermediate_size=9216, num_attention_heads=24,
                    num_key_value_heads=8),
    "Nemotron H": {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp", "attention", "mlp"]},
    "Cohere": _of("cohere"),
    "Cohere 2": _of("cohere2", hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
                    **_SLIDING),
    "EXAONE 4": _of("exaone4", num_key_value_heads=8, sliding_window=None, layer_types=["full_attention"] * 2),
    "Hunyuan": _of("hunyuan_v1_dense", head_dim=128, num_key_value_heads=8, vocab_size=128167),
    "Hunyuan MoE": _of("hunyuan_v1_moe", num_experts=16, moe_topk=1, head_dim=128, num_key_value_heads=8,
                       intermediate_size=3072, vocab_size=128167),
    "ERNIE 4.5": _of("ernie4_5"),
    "ERNIE 4.5 MoE": _of("ernie4_5_moe"),
    "MiniMax": _of("minimax"),
    "MiniMax M2": _of("minimax_m2", num_local_experts=32),
    "StableLM": _of("stablelm"),
    "StarCoder 2": _of("starcoder2"),
    "GPT-2": _of("gpt2", n_layer=2),
    "GPT-NeoX": _of("gpt_neox"),
    "GPT-J": _of("gptj", n_layer=2, tie_word_embeddings=False),
    "GPT-Neo": {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "GPT BigCode": _of("gpt_bigcode", n_embd=2048, n_head=16, n_layer=2),
    "CodeGen": _of("codegen", n_layer=2),
    "OPT": _of("opt", hidden_size=2048, num_attention_heads=32, ffn_dim=8192, word_embed_proj_dim=2048),
    "BLOOM": _of("bloom", hidden_size=2048, n_head=16, n_layer=2),
    "MPT": _of("mpt", d_model=4096, n_heads=32, n_layers=2),
    "JetMoE": _of("jetmoe"),
    "Helium": _of("helium"),
    "DBRX": {"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 2, "vocab_size": 100352,
             "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
             "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}},
    "Mamba": _of("mamba"),
    "Mamba 2": _of("mamba2"),
    "Jamba": _of("jamba", num_hidden_layers=8),
    "LFM2": _of("lfm2", num_hidden_layers=3, layer_types=["conv", "conv", "full_attention"]),
    "T5": {"model_type": "t5", "d_model": 1024, "num_layers": 2, "num_heads": 16, "d_ff": 4096},
    "BitNet": _of("bitnet"),
    "Seed-OSS": _of("seed_oss"),
    "Apertus": _of("apertus", num_key_value_heads=8),
    "Arcee": _of("arcee"),
    "InternLM 3": _of("internlm3"),
    "dots.llm1": _of("dots1", n_shared_experts=1, num_experts_per_tok=6, moe_intermediate_size=1408, n_group=1,
                     topk_group=1, n_routed_experts=32, first_k_dense_replace=1),
    "MiniCPM 3": _of("minicpm3"),
}  # fmt: skip
"""Family -> config.json."""
