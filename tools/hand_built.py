"""Shapes of families whose code is not in transformers, written from their published modeling files.

Each is checked against its published parameter count by the test of the catalogue.
"""

from __future__ import annotations

from typing import Any

from zplan.catalog.shapes import make_shape
from zplan.model_shape import Block, ModelShape, ParameterKind, ParameterShape


def _parameters(*rows: tuple[str, ParameterKind, tuple[int, ...]]) -> tuple[ParameterShape, ...]:
    return tuple(ParameterShape(name=name, kind=kind, shape=shape) for name, kind, shape in rows)


def _model(
    name: str, family: str, architecture: str, path: str, sizes: dict[str, Any], embedding: str, layer: tuple[ParameterShape, ...],
    norm: str, head: str,
) -> ModelShape:  # fmt: skip
    h, vocab = sizes["hidden_size"], sizes["vocab_size"]
    blocks = (
        Block(role="embedding", path="", parameters=_parameters((embedding, "embedding", (vocab, h)))),
        Block(role="layer", path=path, parameters=layer, repeat=sizes["num_hidden_layers"]),
        Block(role="head", path="", parameters=_parameters((norm, "norm", (h,)), (head, "linear", (vocab, h)))),
    )
    return make_shape(
        name=name, architecture=architecture, blocks=blocks, config={"model_type": family, **sizes}, resolved=sizes,
        source=f"{architecture} of the model's own modeling file (not in transformers), checked against the published count",
    )  # fmt: skip


def _sizes(h: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, length: int) -> dict[str, Any]:
    return {
        "hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": ffn, "vocab_size": vocab, "max_position_embeddings": length, "tie_word_embeddings": False,
    }  # fmt: skip


def qwen(name: str, h: int, layers: int, heads: int, ffn: int, vocab: int) -> ModelShape:
    """First generation: one biased c_attn, w1 and w2 of half the config's intermediate_size each."""
    layer = _parameters(
        ("ln_1.weight", "norm", (h,)), ("attn.c_attn.weight", "linear", (3 * h, h)), ("attn.c_attn.bias", "bias", (3 * h,)),
        ("attn.c_proj.weight", "linear", (h, h)), ("ln_2.weight", "norm", (h,)), ("mlp.w1.weight", "linear", (ffn, h)),
        ("mlp.w2.weight", "linear", (ffn, h)), ("mlp.c_proj.weight", "linear", (h, ffn)),
    )  # fmt: skip
    sizes = _sizes(h, layers, heads, heads, ffn, vocab, 8192)
    return _model(
        name,
        "qwen",
        "QWenLMHeadModel",
        "transformer.h.{}",
        sizes,
        "transformer.wte.weight",
        layer,
        "transformer.ln_f.weight",
        "lm_head.weight",
    )


def internlm2(name: str, h: int, layers: int, heads: int, kv: int, ffn: int) -> ModelShape:
    """One wqkv for queries, keys and values."""
    packed = h + 2 * kv * (h // heads)
    layer = _parameters(
        ("attention.wqkv.weight", "linear", (packed, h)), ("attention.wo.weight", "linear", (h, h)),
        ("feed_forward.w1.weight", "linear", (ffn, h)), ("feed_forward.w3.weight", "linear", (ffn, h)),
        ("feed_forward.w2.weight", "linear", (h, ffn)), ("attention_norm.weight", "norm", (h,)), ("ffn_norm.weight", "norm", (h,)),
    )  # fmt: skip
    sizes = _sizes(h, layers, heads, kv, ffn, 92544, 32768)
    return _model(
        name,
        "internlm2",
        "InternLM2ForCausalLM",
        "model.layers.{}",
        sizes,
        "model.tok_embeddings.weight",
        layer,
        "model.norm.weight",
        "output.weight",
    )


def baichuan2(name: str, h: int, layers: int, heads: int, ffn: int) -> ModelShape:
    """One W_pack for queries, keys and values."""
    layer = _parameters(
        ("self_attn.W_pack.weight", "linear", (3 * h, h)), ("self_attn.o_proj.weight", "linear", (h, h)),
        ("mlp.gate_proj.weight", "linear", (ffn, h)), ("mlp.down_proj.weight", "linear", (h, ffn)),
        ("mlp.up_proj.weight", "linear", (ffn, h)), ("input_layernorm.weight", "norm", (h,)),
        ("post_attention_layernorm.weight", "norm", (h,)),
    )  # fmt: skip
    sizes = _sizes(h, layers, heads, heads, ffn, 125696, 4096)
    return _model(
        name,
        "baichuan",
        "BaichuanForCausalLM",
        "model.layers.{}",
        sizes,
        "model.embed_tokens.weight",
        layer,
        "model.norm.weight",
        "lm_head.weight",
    )


def chatglm3(name: str) -> ModelShape:
    """Two key-value groups; gate and up projection in one matrix."""
    h, layers, heads, kv, ffn = 4096, 28, 32, 2, 13696
    packed = h + 2 * kv * 128
    layer = _parameters(
        ("input_layernorm.weight", "norm", (h,)), ("self_attention.query_key_value.weight", "linear", (packed, h)),
        ("self_attention.query_key_value.bias", "bias", (packed,)), ("self_attention.dense.weight", "linear", (h, h)),
        ("post_attention_layernorm.weight", "norm", (h,)), ("mlp.dense_h_to_4h.weight", "linear", (2 * ffn, h)),
        ("mlp.dense_4h_to_h.weight", "linear", (h, ffn)),
    )  # fmt: skip
    sizes = _sizes(h, layers, heads, kv, ffn, 65024, 8192)
    return _model(
        name, "chatglm", "ChatGLMForConditionalGeneration", "transformer.encoder.layers.{}", sizes,
        "transformer.embedding.word_embeddings.weight", layer, "transformer.encoder.final_layernorm.weight",
        "transformer.output_layer.weight",
    )  # fmt: skip


HAND_BUILT: list[tuple[ModelShape, list[str], int]] = [
    (qwen("qwen-1.8b", 2048, 24, 16, 5504, 151936), ["Qwen/Qwen-1_8B", "Qwen/Qwen-1_8B-Chat"], 1_836_828_672),
    (qwen("qwen-7b", 4096, 32, 32, 11008, 151936), ["Qwen/Qwen-7B", "Qwen/Qwen-7B-Chat"], 7_721_324_544),
    (qwen("qwen-14b", 5120, 40, 40, 13696, 152064), ["Qwen/Qwen-14B", "Qwen/Qwen-14B-Chat"], 14_167_290_880),
    (qwen("qwen-72b", 8192, 80, 64, 24576, 152064), ["Qwen/Qwen-72B", "Qwen/Qwen-72B-Chat"], 72_287_920_128),
    (
        internlm2("internlm2-1.8b", 2048, 24, 16, 8, 8192),
        ["internlm/internlm2-1_8b", "internlm/internlm2-chat-1_8b"],
        1_889_110_016,
    ),
    (
        internlm2("internlm2-7b", 4096, 32, 32, 8, 14336),
        ["internlm/internlm2-7b", "internlm/internlm2-chat-7b"],
        7_737_708_544,
    ),
    (
        internlm2("internlm2-20b", 6144, 48, 48, 8, 16384),
        ["internlm/internlm2-20b", "internlm/internlm2-chat-20b"],
        19_861_149_696,
    ),
    (
        baichuan2("baichuan2-7b", 4096, 32, 32, 11008),
        ["baichuan-inc/Baichuan2-7B-Base", "baichuan-inc/Baichuan2-7B-Chat"],
        7_505_973_248,
    ),
    (
        baichuan2("baichuan2-13b", 5120, 40, 40, 13696),
        ["baichuan-inc/Baichuan2-13B-Base", "baichuan-inc/Baichuan2-13B-Chat"],
        13_896_668_160,
    ),
    (chatglm3("chatglm3-6b"), ["THUDM/chatglm3-6b", "zai-org/chatglm3-6b"], 6_243_584_000),
]
