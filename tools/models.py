"""The catalogue's source: published config.json values of each model, with its Hub ids and published parameter count.

Values are those of the config.json on the model's Hub page; what is not written is transformers' default for the family.
Those of MORE_MODELS come from other projects' copies of them, named there, and are held to the published count.
`tools/build_catalog.py` turns this into zplan/catalog/shapes/*.json.
"""

from __future__ import annotations

from typing import Any

Entry = tuple[str, list[str], dict[str, Any], int | None]
"""Name, Hub ids, config.json, published number of parameters (None: only transformers' count is known)."""


def _llama(h: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab, **more,
    }  # fmt: skip


def _qwen(
    kind: str, h: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {**_llama(h, layers, heads, kv, ffn, vocab, tie_word_embeddings=tied, **more), "model_type": kind}


def _gemma2(h: int, layers: int, heads: int, kv: int, head_dim: int, ffn: int) -> dict[str, Any]:
    return {
        **_llama(h, layers, heads, kv, ffn, 256000, head_dim=head_dim, max_position_embeddings=8192),
        "model_type": "gemma2",
        "sliding_window": 4096,
    }


def _gemma3(
    h: int, layers: int, heads: int, kv: int, head_dim: int, ffn: int, vocab: int, window: int
) -> dict[str, Any]:
    return {
        **_llama(h, layers, heads, kv, ffn, vocab, head_dim=head_dim, max_position_embeddings=131072),
        "model_type": "gemma3_text",
        "sliding_window": window,
    }


def _gemma3_seeing(h: int, layers: int, heads: int, kv: int, head_dim: int, ffn: int) -> dict[str, Any]:
    """Gemma 3 from 4 B on: the trainer loads SigLIP beside the text tower."""
    siglip = {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = _gemma3(h, layers, heads, kv, head_dim, ffn, 262208, 1024)
    return {"model_type": "gemma3", "text_config": text, "vision_config": siglip}


def _gpt2(h: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": h,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": 50257,
        "n_positions": 1024,
    }


def _neox(h: int, layers: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * h, "vocab_size": vocab, "tie_word_embeddings": False, "max_position_embeddings": 2048, **more,
    }  # fmt: skip


def _opt(h: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * h,
        "vocab_size": 50272, "word_embed_proj_dim": h, "max_position_embeddings": 2048,
    }  # fmt: skip


def _bloom(h: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "bloom", "hidden_size": h, "n_layer": layers, "n_head": heads, "vocab_size": 250880}


# transformers 5 ties T5's head to its embedding whatever config.json says (models/t5/configuration_t5.py): flan-t5 and
# mt0 count one vocabulary matrix less there than their papers do, so no published count is given for them.
def _t5(
    kind: str, d: int, kv: int, ff: int, layers: int, heads: int, vocab: int, act: str, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": kind, "d_model": d, "d_kv": kv, "d_ff": ff, "num_layers": layers, "num_decoder_layers": layers,
        "num_heads": heads, "vocab_size": vocab, "feed_forward_proj": act, "tie_word_embeddings": tied, "is_encoder_decoder": True,
    }  # fmt: skip


def _starcoder2(h: int, layers: int, heads: int, kv: int, ffn: int, tied: bool = True) -> dict[str, Any]:
    return {
        **_llama(h, layers, heads, kv, ffn, 49152, max_position_embeddings=16384, tie_word_embeddings=tied),
        "model_type": "starcoder2",
        "sliding_window": 4096,
    }


def _qwen_vl(kind: str, h: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, tied: bool) -> dict[str, Any]:
    return _qwen("qwen2", h, layers, heads, kv, ffn, vocab, tied, max_position_embeddings=32768)


# Of the same sizes: Lightning-AI/litgpt, litgpt/config.py.
_CODERS = ("0.5b", "1.5b", "3b", "7b", "14b", "32b")
_QWEN25_KIN = {
    size: [
        f"Qwen/Qwen2.5-Coder-{size.upper()}",
        f"Qwen/Qwen2.5-Coder-{size.upper()}-Instruct",
        *(["Qwen/QwQ-32B"] if size == "32b" else []),
    ]
    for size in _CODERS
}
_QWEN3_KIN = {"4b": ["Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"]}


MODELS: list[Entry] = [
    ("mistral-7b", ["mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.2", "HuggingFaceH4/zephyr-7b-beta"],
     {**_llama(4096, 32, 32, 8, 14336, 32000, max_position_embeddings=32768), "model_type": "mistral", "sliding_window": 4096}, 7_241_732_096),
    ("mistral-7b-v0.3", ["mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"],
     {**_llama(4096, 32, 32, 8, 14336, 32768, max_position_embeddings=32768), "model_type": "mistral", "sliding_window": None}, 7_248_023_552),
    ("mixtral-8x7b", ["mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"],
     {**_llama(4096, 32, 32, 8, 14336, 32000, max_position_embeddings=32768), "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}, 46_702_792_704),
    ("llama-2-7b", ["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"], _llama(4096, 32, 32, 32, 11008, 32000, max_position_embeddings=4096), 6_738_415_616),
    ("llama-2-13b", ["meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"], _llama(5120, 40, 40, 40, 13824, 32000, max_position_embeddings=4096), 13_015_864_320),
    ("llama-2-70b", ["meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"], _llama(8192, 80, 64, 8, 28672, 32000, max_position_embeddings=4096), 68_976_648_192),
    ("llama-3.1-8b", ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"],
     _llama(4096, 32, 32, 8, 14336, 128256, max_position_embeddings=131072), 8_030_261_248),
    ("llama-3.1-70b", ["meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B"],
     _llama(8192, 80, 64, 8, 28672, 128256, max_position_embeddings=131072), 70_553_706_496),
    ("llama-3.1-405b", ["meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Meta-Llama-3.1-405B"],
     _llama(16384, 126, 128, 8, 53248, 128256, max_position_embeddings=131072), 405_853_388_800),
    ("llama-3.2-1b", ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"], _llama(2048, 16, 32, 8, 8192, 128256, max_position_embeddings=131072, head_dim=64, tie_word_embeddings=True), 1_235_814_400),
    ("llama-3.2-3b", ["meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"], _llama(3072, 28, 24, 8, 8192, 128256, max_position_embeddings=131072, head_dim=128, tie_word_embeddings=True), 3_212_749_824),
    *[
        (f"qwen2.5-{size}", [f"Qwen/Qwen2.5-{size.upper()}", f"Qwen/Qwen2.5-{size.upper()}-Instruct", *_QWEN25_KIN.get(size, [])],
         _qwen("qwen2", h, layers, heads, kv, ffn, vocab, tied, max_position_embeddings=32768), count)
        for size, h, layers, heads, kv, ffn, vocab, tied, count in (
            ("0.5b", 896, 24, 14, 2, 4864, 151936, True, 494_032_768), ("1.5b", 1536, 28, 12, 2, 8960, 151936, True, 1_543_714_304),
            ("3b", 2048, 36, 16, 2, 11008, 151936, True, 3_085_938_688), ("7b", 3584, 28, 28, 4, 18944, 152064, False, 7_615_616_512),
            ("14b", 5120, 48, 40, 8, 13824, 152064, False, 14_770_033_664), ("32b", 5120, 64, 40, 8, 27648, 152064, False, 32_763_876_352),
            ("72b", 8192, 80, 64, 8, 29568, 152064, False, 72_706_203_648),
        )
    ],
    *[
        (f"qwen3-{size}", [f"Qwen/Qwen3-{size.upper()}", f"Qwen/Qwen3-{size.upper()}-Base", *_QWEN3_KIN.get(size, [])],
         _qwen("qwen3", h, layers, heads, kv, ffn, 151936, tied, head_dim=128, max_position_embeddings=40960), count)
        for size, h, layers, heads, kv, ffn, tied, count in (
            ("0.6b", 1024, 28, 16, 8, 3072, True, 596_049_920), ("1.7b", 2048, 28, 16, 8, 6144, True, 1_720_574_976),
            ("4b", 2560, 36, 32, 8, 9728, True, 4_022_468_096), ("8b", 4096, 36, 32, 8, 12288, False, 8_190_735_360),
            ("14b", 5120, 40, 40, 8, 17408, False, 14_768_307_200), ("32b", 5120, 64, 64, 8, 25600, False, 32_762_123_264),
        )
    ],
    ("qwen3-30b-a3b", ["Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Base", "Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B-Thinking-2507"],
     {**_qwen("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, False, head_dim=128, max_position_embeddings=40960), "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1}, 30_532_122_624),
    ("gemma-2-2b", ["google/gemma-2-2b", "google/gemma-2-2b-it"], _gemma2(2304, 26, 8, 4, 256, 9216), 2_614_341_888),
    ("gemma-2-9b", ["google/gemma-2-9b", "google/gemma-2-9b-it"], _gemma2(3584, 42, 16, 8, 256, 14336), 9_241_705_984),
    ("gemma-2-27b", ["google/gemma-2-27b", "google/gemma-2-27b-it"], _gemma2(4608, 46, 32, 16, 128, 36864), 27_227_128_320),
    ("gemma-3-1b", ["google/gemma-3-1b-pt", "google/gemma-3-1b-it"], _gemma3(1152, 26, 4, 1, 256, 6912, 262144, 512), 999_885_952),
    ("gemma-3-4b", ["google/gemma-3-4b-pt", "google/gemma-3-4b-it"], _gemma3_seeing(2560, 34, 8, 4, 256, 10240), 4_300_079_472),
    ("gemma-3-12b", ["google/gemma-3-12b-pt", "google/gemma-3-12b-it"], _gemma3_seeing(3840, 48, 16, 8, 256, 15360), 12_187_325_040),
    ("gemma-3-27b", ["google/gemma-3-27b-pt", "google/gemma-3-27b-it"], _gemma3_seeing(5376, 62, 32, 16, 128, 21504), 27_432_406_640),
    ("phi-3-mini", ["microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-mini-instruct"],
     {**_llama(3072, 32, 32, 32, 8192, 32064, max_position_embeddings=4096), "model_type": "phi3", "sliding_window": 2047, "pad_token_id": 32000}, 3_821_079_552),
    ("phi-4", ["microsoft/phi-4", "microsoft/Phi-4-reasoning", "microsoft/Phi-4-reasoning-plus"], {**_llama(5120, 40, 40, 10, 17920, 100352, max_position_embeddings=16384), "model_type": "phi3", "sliding_window": None, "pad_token_id": 100349}, 14_659_507_200),
    ("gpt2", ["openai-community/gpt2"], _gpt2(768, 12, 12), 124_439_808),
    ("gpt2-medium", ["openai-community/gpt2-medium"], _gpt2(1024, 24, 16), 354_823_168),
    ("gpt2-large", ["openai-community/gpt2-large"], _gpt2(1280, 36, 20), 774_030_080),
    ("gpt2-xl", ["openai-community/gpt2-xl"], _gpt2(1600, 48, 25), 1_557_611_200),
    *[
        (f"pythia-{size}", [f"EleutherAI/pythia-{size}", f"EleutherAI/pythia-{size}-deduped"], _neox(h, layers, heads, vocab), count)
        for size, h, layers, heads, vocab, count in (
            ("70m", 512, 6, 8, 50304, 70_426_624), ("160m", 768, 12, 12, 50304, 162_322_944), ("410m", 1024, 24, 16, 50304, 405_334_016),
            ("1b", 2048, 16, 8, 50304, 1_011_781_632), ("1.4b", 2048, 24, 16, 50304, 1_414_647_808), ("2.8b", 2560, 32, 32, 50304, 2_775_208_960),
            ("6.9b", 4096, 32, 32, 50432, 6_857_302_016), ("12b", 5120, 36, 40, 50688, 11_846_072_320),
        )
    ],
    ("gpt-neox-20b", ["EleutherAI/gpt-neox-20b"], _neox(6144, 44, 64, 50432), 20_554_567_680),
    ("gpt-j-6b", ["EleutherAI/gpt-j-6b"], {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400, "tie_word_embeddings": False}, 6_050_882_784),
    ("falcon-7b", ["tiiuae/falcon-7b", "tiiuae/falcon-7b-instruct"], {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False}, 6_921_720_704),
    ("falcon-40b", ["tiiuae/falcon-40b", "tiiuae/falcon-40b-instruct"], {"model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8, "vocab_size": 65024, "parallel_attn": True, "bias": False, "new_decoder_architecture": True}, 41_303_293_952),
    *[
        (f"opt-{size}", [f"facebook/opt-{size}"], _opt(h, layers, heads), count)
        for size, h, layers, heads, count in (
            ("1.3b", 2048, 24, 32, 1_315_758_080), ("2.7b", 2560, 32, 32, 2_651_596_800), ("6.7b", 4096, 32, 32, 6_658_473_984),
            ("13b", 5120, 40, 40, 12_853_473_280), ("30b", 7168, 48, 56, 29_974_540_288), ("66b", 9216, 64, 72, None),
        )
    ],
    ("gpt-oss-20b", ["openai/gpt-oss-20b"], {**_llama(2880, 24, 64, 8, 2880, 201088, head_dim=64, max_position_embeddings=131072), "model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128}, 20_914_757_184),
    ("deepseek-v2-lite", ["deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite-Chat"],
     {**_llama(2048, 27, 16, 16, 10944, 102400, max_position_embeddings=163840), "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
      "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "norm_topk_prob": False, "topk_method": "greedy", "n_group": 1, "topk_group": 1}, 15_706_484_224),
    ("smollm2-135m", ["HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"], _llama(576, 30, 9, 3, 1536, 49152, max_position_embeddings=8192, tie_word_embeddings=True), 134_515_008),
    ("smollm2-360m", ["HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct"], _llama(960, 32, 15, 5, 2560, 49152, max_position_embeddings=8192, tie_word_embeddings=True), 361_821_120),
    ("smollm2-1.7b", ["HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B-Instruct"], _llama(2048, 24, 32, 32, 8192, 49152, max_position_embeddings=8192, tie_word_embeddings=True), 1_711_376_384),
    *[
        (f"bloom-{size}", [f"bigscience/bloom-{size}" if size != "176b" else "bigscience/bloom", f"bigscience/bloomz-{size}" if size != "176b" else "bigscience/bloomz"], _bloom(h, layers, heads), count)
        for size, h, layers, heads, count in (
            ("560m", 1024, 24, 16, 559_214_592), ("1b1", 1536, 24, 16, 1_065_314_304), ("1b7", 2048, 24, 16, 1_722_408_960),
            ("3b", 2560, 30, 32, 3_002_557_440), ("7b1", 4096, 30, 32, 7_069_016_064), ("176b", 14336, 70, 112, 176_247_271_424),
        )
    ],
    ("yi-6b", ["01-ai/Yi-6B", "01-ai/Yi-6B-Chat", "01-ai/Yi-1.5-6B"], _llama(4096, 32, 32, 4, 11008, 64000), 6_061_035_520),
    ("yi-9b", ["01-ai/Yi-9B", "01-ai/Yi-1.5-9B", "01-ai/Yi-1.5-9B-Chat"], _llama(4096, 48, 32, 4, 11008, 64000), 8_829_407_232),
    ("yi-34b", ["01-ai/Yi-34B", "01-ai/Yi-34B-Chat", "01-ai/Yi-1.5-34B"], _llama(7168, 60, 56, 8, 20480, 64000), 34_388_917_248),
    *[
        (f"qwen1.5-{size}", [f"Qwen/Qwen1.5-{size.upper()}", f"Qwen/Qwen1.5-{size.upper()}-Chat"],
         _qwen("qwen2", h, layers, heads, kv, ffn, vocab, tied, max_position_embeddings=32768), count)
        for size, h, layers, heads, kv, ffn, vocab, tied, count in (
            ("0.5b", 1024, 24, 16, 16, 2816, 151936, True, 463_987_712), ("1.8b", 2048, 24, 16, 16, 5504, 151936, False, 1_836_828_672),
            ("4b", 2560, 40, 20, 20, 6912, 151936, False, 3_950_369_280), ("7b", 4096, 32, 32, 32, 11008, 151936, False, 7_721_324_544),
            ("14b", 5120, 40, 40, 40, 13696, 152064, False, 14_167_290_880), ("32b", 5120, 64, 40, 8, 27392, 152064, False, 32_512_218_112),
            ("72b", 8192, 80, 64, 64, 24576, 152064, False, 72_287_920_128),
        )
    ],
    ("starcoder2-3b", ["bigcode/starcoder2-3b"], _starcoder2(3072, 30, 24, 2, 12288), 3_030_371_328),
    ("starcoder2-7b", ["bigcode/starcoder2-7b"], _starcoder2(4608, 32, 36, 4, 18432), 7_173_923_840),
    ("starcoder2-15b", ["bigcode/starcoder2-15b"], _starcoder2(6144, 40, 48, 4, 24576, False), 15_957_889_024),
    ("olmo-2-1b", ["allenai/OLMo-2-0425-1B", "allenai/OLMo-2-0425-1B-Instruct"], {**_llama(2048, 16, 16, 16, 8192, 100352, max_position_embeddings=4096), "model_type": "olmo2"}, None),
    ("olmo-2-7b", ["allenai/OLMo-2-1124-7B", "allenai/OLMo-2-1124-7B-Instruct"], {**_llama(4096, 32, 32, 32, 11008, 100352, max_position_embeddings=4096), "model_type": "olmo2"}, 7_298_617_344),
    ("olmo-2-13b", ["allenai/OLMo-2-1124-13B", "allenai/OLMo-2-1124-13B-Instruct"], {**_llama(5120, 40, 40, 40, 13824, 100352, max_position_embeddings=4096), "model_type": "olmo2"}, None),
    ("olmo-2-32b", ["allenai/OLMo-2-0325-32B", "allenai/OLMo-2-0325-32B-Instruct"], {**_llama(5120, 64, 40, 8, 27648, 100352, max_position_embeddings=4096), "model_type": "olmo2"}, None),
    ("granite-3-2b", ["ibm-granite/granite-3.0-2b-base", "ibm-granite/granite-3.0-2b-instruct", "ibm-granite/granite-3.1-2b-instruct"], {**_llama(2048, 40, 32, 8, 8192, 49155, tie_word_embeddings=True, max_position_embeddings=4096), "model_type": "granite"}, None),
    ("granite-3-8b", ["ibm-granite/granite-3.0-8b-base", "ibm-granite/granite-3.0-8b-instruct", "ibm-granite/granite-3.1-8b-instruct"], {**_llama(4096, 40, 32, 8, 12800, 49155, tie_word_embeddings=True, max_position_embeddings=4096), "model_type": "granite"}, None),
    *[
        (f"t5-{size}", [f"google-t5/t5-{size}"], _t5("t5", d, kv, ff, layers, heads, 32128, "relu", True), count)
        for size, d, kv, ff, layers, heads, count in (
            ("small", 512, 64, 2048, 6, 8, 60_506_624), ("base", 768, 64, 3072, 12, 12, 222_903_552), ("large", 1024, 64, 4096, 24, 16, 737_668_096),
            ("3b", 1024, 128, 16384, 24, 32, 2_851_598_336), ("11b", 1024, 128, 65536, 24, 128, 11_307_321_344),
        )
    ],
    *[
        (f"flan-t5-{size}", [f"google/flan-t5-{size}"], _t5("t5", d, 64, ff, layers, heads, 32128, "gated-gelu", False), None)
        for size, d, ff, layers, heads in (
            ("small", 512, 1024, 8, 6), ("base", 768, 2048, 12, 12), ("large", 1024, 2816, 24, 16),
            ("xl", 2048, 5120, 24, 32), ("xxl", 4096, 10240, 24, 64),
        )
    ],
    *[
        (f"mt0-{size}", [f"bigscience/mt0-{size}"], _t5("mt5", d, 64, ff, layers, heads, 250112, "gated-gelu", False), None)
        for size, d, ff, layers, heads in (
            ("small", 512, 1024, 8, 6), ("base", 768, 2048, 12, 12), ("large", 1024, 2816, 24, 16),
            ("xl", 2048, 5120, 24, 32), ("xxl", 4096, 10240, 24, 64),
        )
    ],
    ("qwen2-vl-2b", ["Qwen/Qwen2-VL-2B-Instruct"], _qwen_vl("qwen2", 1536, 28, 12, 2, 8960, 151936, True), None),
    ("qwen2-vl-7b", ["Qwen/Qwen2-VL-7B-Instruct"], _qwen_vl("qwen2", 3584, 28, 28, 4, 18944, 152064, False), None),
    ("qwen2-vl-72b", ["Qwen/Qwen2-VL-72B-Instruct"], _qwen_vl("qwen2", 8192, 80, 64, 8, 29568, 152064, False), None),
    ("qwen2.5-vl-3b", ["Qwen/Qwen2.5-VL-3B-Instruct"], _qwen_vl("qwen2", 2048, 36, 16, 2, 11008, 151936, True), None),
    ("qwen2.5-vl-7b", ["Qwen/Qwen2.5-VL-7B-Instruct"], _qwen_vl("qwen2", 3584, 28, 28, 4, 18944, 152064, False), None),
    ("qwen2.5-vl-32b", ["Qwen/Qwen2.5-VL-32B-Instruct"], _qwen_vl("qwen2", 5120, 64, 40, 8, 27648, 152064, False), None),
    ("qwen2.5-vl-72b", ["Qwen/Qwen2.5-VL-72B-Instruct"], _qwen_vl("qwen2", 8192, 80, 64, 8, 29568, 152064, False), None),
]  # fmt: skip

_LITGPT = "Lightning-AI/litgpt, litgpt/config.py"
_NEMO = "kevinstephano/thunder_model_blocks, mistral/mistral_config.py"
_OSS = "transformers 5.23.0, configuration_gpt_oss.py; docs.nvidia.com/nemo/megatron-bridge, gpt-oss"
_SMOL = "transformers 5.23.0, configuration_smollm3.py"
MORE_MODELS: list[tuple[Entry, str]] = [
    (("mistral-nemo-12b", ["mistralai/Mistral-Nemo-Base-2407", "mistralai/Mistral-Nemo-Instruct-2407"],
      {**_llama(5120, 40, 32, 8, 14336, 131072, head_dim=128, max_position_embeddings=128000), "model_type": "mistral", "sliding_window": None}, 12_247_782_400), _NEMO),
    (("mistral-small-24b", ["mistralai/Mistral-Small-24B-Base-2501", "mistralai/Mistral-Small-24B-Instruct-2501"],
      {**_llama(5120, 40, 32, 8, 32768, 131072, head_dim=128, max_position_embeddings=32768), "model_type": "mistral", "sliding_window": None}, 23_572_403_200), _LITGPT),
    (("mistral-large-123b", ["mistralai/Mistral-Large-Instruct-2407", "mistralai/Mistral-Large-Instruct-2411"],
      {**_llama(12288, 88, 96, 8, 28672, 32768, max_position_embeddings=32768), "model_type": "mistral", "sliding_window": None}, 122_610_069_504), _LITGPT),
    (("mixtral-8x22b", ["mistralai/Mixtral-8x22B-Instruct-v0.1"],
      {**_llama(6144, 56, 48, 8, 16384, 32768, max_position_embeddings=65536), "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}, 140_630_071_296), _LITGPT),
    (("qwen3-235b-a22b", ["Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-235B-A22B-Instruct-2507", "Qwen/Qwen3-235B-A22B-Thinking-2507"],
      {**_qwen("qwen3_moe", 4096, 94, 64, 4, 12288, 151936, False, head_dim=128, max_position_embeddings=40960), "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True, "decoder_sparse_step": 1}, 235_093_634_560), _LITGPT),
    (("phi-4-mini", ["microsoft/Phi-4-mini-instruct", "microsoft/Phi-4-mini-reasoning"],
      {**_llama(3072, 32, 24, 8, 8192, 200064, tie_word_embeddings=True, max_position_embeddings=131072), "model_type": "phi3", "sliding_window": 262144, "pad_token_id": 199999, "partial_rotary_factor": 0.75}, 3_836_021_760), _LITGPT),
    (("gemma-2b", ["google/gemma-2b", "google/gemma-2b-it"],
      {**_llama(2048, 18, 8, 1, 16384, 256000, head_dim=256, max_position_embeddings=8192), "model_type": "gemma"}, 2_506_172_416), _LITGPT),
    (("gemma-7b", ["google/gemma-7b", "google/gemma-7b-it"],
      {**_llama(3072, 28, 16, 16, 24576, 256000, head_dim=256, max_position_embeddings=8192), "model_type": "gemma"}, 8_537_680_896), _LITGPT),
    (("tinyllama-1.1b", ["TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"],
      _llama(2048, 22, 32, 4, 5632, 32000, max_position_embeddings=2048), 1_100_048_384), _LITGPT),
    (("smollm3-3b", ["HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B-Base"],
      {**_llama(2048, 36, 16, 4, 11008, 128256, tie_word_embeddings=True, max_position_embeddings=65536), "model_type": "smollm3"}, 3_075_098_624), _SMOL),
    (("gpt-oss-120b", ["openai/gpt-oss-120b"],
      {**_llama(2880, 36, 64, 8, 2880, 201088, head_dim=64, max_position_embeddings=131072), "model_type": "gpt_oss", "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128}, 116_829_156_672), _OSS),
]  # fmt: skip
"""An entry, and where its values were read."""
