"""The attention of a decoder layer: plain with its fused or separate projections, latent, and with ALiBi.

Legend: H heads, n and r the straight and the rotated part of a head, v the width of a value, L the latent's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zplan.memory import norms, scores
from zplan.memory import operations as ops
from zplan.memory.layer_modules import LayerModules
from zplan.memory.operations import Modules, Sizes
from zplan.memory.sinks import sink_attention
from zplan.memory.tape import Tape, Value
from zplan.memory.ulysses import shared_attention
from zplan.model_shape import ModelShape

Names = Mapping[str, str]
"""Last part of a module's name -> the name."""
_SPLIT_QKV = ("gpt2", "gpt_neox")
"""Fused q, k, v taken apart by torch.split or torch.chunk; others slice (transformers 5.23.0, modeling_gpt2.py,
modeling_gpt_neox.py, modeling_phi3.py)."""
_ROTATED_BEFORE_NORM = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe"})
"""Families whose norms of q and k follow the rotation (transformers 5.23.0, modeling_hunyuan_v1_dense.py)."""


JOINED_ROTARY = frozenset(
    {"phi3", "gpt_neox", "phi", "stablelm", "glm", "glm4", "glm4_moe", "nemotron", "minimax_m2", "gpt_oss"}
)
"""Families that rotate a part of a head and join it with the rest: the joined q puts heads before positions; flash
attention's output follows it, and is copied for the output projection.

Source: transformers 5.23.0, models/phi3/modeling_phi3.py (apply_rotary_pos_emb: torch.cat), integrations/
sdpa_attention.py (transpose(1, 2).contiguous())."""


def attend(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> Value:
    """The attention's module: projections, scores, output, dropout."""
    shape = layer.shape
    if layer.output is None:
        return tape.apply(sizes.bytes(shape.hidden_size), [(x, None)])
    container = modules.number(layer.output.rpartition(".")[0])
    tape.enter(container)
    widths = attention_widths(shape)
    locals_: list[Value] = []
    if shape.config.get("kv_lora_rank") and layer.latent_norms:
        q, k, v = _latent(tape, layer, sizes, modules, x)
    else:
        q, k, v, *locals_ = _plain(tape, layer, sizes, modules, x)
    if shape.model_type == "gpt_oss" and sizes.attention == "eager":
        mixed = sink_attention(tape, layer, sizes, modules, q, k, v, *widths)
    else:
        mixed = _mix(tape, shape, sizes, q, k, v, widths)
    if follows_queries(shape, sizes, grouped=widths[1] != widths[2]):
        joined = tape.apply(sizes.bytes(widths[1]), [(mixed, sizes.bytes(widths[1]))])
        tape.drop(mixed)
        mixed = joined
    out = ops.linear(tape, modules, sizes, layer.output, mixed, transposed=layer.is_conv1d)
    inner, outer = layer.inner_dropouts[0], layer.dropouts[0]
    if inner:
        out = ops.dropout_module(tape, modules, sizes, inner, out, shape.hidden_size)
    tape.drop(q, k, v, mixed, *locals_)
    tape.exit(container)
    return out if inner else ops.dropout_module(tape, modules, sizes, outer, out, shape.hidden_size)


def follows_queries(shape: ModelShape, sizes: Sizes, *, grouped: bool) -> bool:
    """Whether a fused kernel's output has heads before positions, as a joined q has them."""
    if sizes.sequence_parallel_size > 1 or sizes.attention == "eager" or shape.model_type not in JOINED_ROTARY:
        return False
    masked = is_masked(shape, sizes)
    return not masked and not scores.takes_math_kernel(sizes, grouped=grouped, masked=masked)


def attention_widths(shape: ModelShape) -> tuple[int, int, int, int]:
    """(heads, width of q, of k, of v), all heads of each; latent attention has keys wider than its values."""
    heads, config = shape.num_attention_heads, shape.config
    if config.get("kv_lora_rank"):
        width = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
        return heads, width, width, heads * config["v_head_dim"]
    narrow = (heads if repeats_heads(shape) else shape.num_key_value_heads) * shape.head_dim
    return heads, heads * shape.head_dim, narrow, narrow


def repeats_heads(shape: ModelShape) -> bool:
    """Falcon's new decoder copies a group's key and value for every head as it takes the projection apart.

    Source: transformers 5.23.0, models/falcon/modeling_falcon.py (FalconAttention._split_heads).
    """
    return shape.model_type == "falcon" and bool(shape.config.get("new_decoder_architecture"))


def _mix(
    tape: Tape, shape: ModelShape, sizes: Sizes, q: Value, k: Value, v: Value, widths: tuple[int, int, int, int]
) -> Value:
    if sizes.sequence_parallel_size > 1:
        return shared_attention(tape, sizes, q, k, v, *widths[:3])
    if sizes.attention != "eager":
        return scores.fused_attention(
            tape, sizes, q, k, v, *widths, masked=is_masked(shape, sizes), joined=shape.model_type in JOINED_ROTARY
        )
    if shape.model_type == "falcon":
        return scores.falcon_attention(tape, sizes, q, k, v, *widths)
    if shape.model_type == "bloom":
        return scores.bloom_attention(tape, sizes, q, k, v, *widths)
    softcap = bool(shape.config.get("attn_logit_softcapping", shape.model_type == "gemma2"))
    fp32_softmax = shape.model_type != "gpt2"
    return scores.eager_attention(
        tape, sizes, q, k, v, *widths, softcap=softcap, fp32_softmax=fp32_softmax,
        joined=shape.model_type in JOINED_ROTARY,
    )  # fmt: skip


def _plain(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> tuple[Value, ...]:
    """q, k, v, and what else the attention's frame holds until it returns."""
    q, k, v, *locals_ = _project(tape, layer, sizes, modules, x)
    _, q_width, k_width, _ = attention_widths(layer.shape)
    rotated_first = layer.shape.model_type in _ROTATED_BEFORE_NORM
    if rotated_first:
        q, k = _rotated(tape, layer, sizes, q, k)
    for name in layer.head_norms:
        if name.endswith(("q_norm", "query_layernorm")):
            q = _head_norm(tape, modules, sizes, name, q, q_width)
        else:
            k = _head_norm(tape, modules, sizes, name, k, k_width)
    if not rotated_first:
        q, k = _rotated(tape, layer, sizes, q, k)
    return q, k, v, *locals_


def _rotated(tape: Tape, layer: LayerModules, sizes: Sizes, q: Value, k: Value) -> tuple[Value, Value]:
    """q and k turned, in families that turn them."""
    if not uses_rotary(layer.shape):
        return q, k
    _, q_width, k_width, _ = attention_widths(layer.shape)
    rotated_q = ops.rotary(tape, sizes, q, q_width)
    rotated_k = ops.rotary(tape, sizes, k, k_width)
    tape.drop(q, k)
    return rotated_q, rotated_k


def _latent(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> tuple[Value, Value, Value]:
    """Multi-head latent attention: keys and values out of a narrow latent, part of q and k rotated.

        q (H (n + r)),  latent (L + r),  kv (H (n + v)),  keys (H (n + r))     per token, all kept for backward

    The keys are written into an empty tensor; the backward of each of the two writes copies the whole gradient.

    Source: transformers 5.23.0, models/deepseek_v2/modeling_deepseek_v2.py (DeepseekV2Attention.forward, expand_kv).
    """
    shape, config = layer.shape, layer.shape.config
    heads, wide, _, v_width = attention_widths(shape)
    rotated, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
    straight = heads * config["qk_nope_head_dim"]
    by_norm = {name.rpartition(".")[2]: name for name in layer.latent_norms}
    by_name = {name.rpartition(".")[2]: name for name in layer.projections}
    q = _latent_queries(tape, sizes, modules, by_name, by_norm, config, x)
    q_straight, q_rotated = tape.split(q, 2, sizes.bytes(wide))
    tape.drop(q)
    narrow = ops.linear(tape, modules, sizes, by_name["kv_a_proj_with_mqa"], x)
    to_norm, k_rotated = tape.split(narrow, 2, sizes.bytes(latent + rotated))
    tape.drop(narrow)
    normed = norms.norm(tape, modules, sizes, by_norm["kv_a_layernorm"], to_norm, latent)
    tape.drop(to_norm)
    turned_q = _complex_rotary(tape, sizes, q_rotated, heads * rotated)
    turned_k = _complex_rotary(tape, sizes, k_rotated, rotated)
    tape.drop(q_rotated, k_rotated)
    queries = tape.apply(sizes.bytes(wide), [(q_straight, None), (turned_q, None)])
    both = ops.linear(tape, modules, sizes, by_name["kv_b_proj"], normed)
    tape.drop(normed)
    k_straight, v = tape.split(both, 2, sizes.bytes(straight + v_width))
    tape.drop(both)
    written = tape.apply(sizes.bytes(wide), [(k_straight, sizes.bytes(straight))], temporary=sizes.bytes(wide))
    keys = tape.apply(
        None, [(written, sizes.bytes(wide)), (turned_k, sizes.bytes(rotated))], temporary=sizes.bytes(heads * rotated)
    )
    tape.drop(written, k_straight, turned_k, q_straight, turned_q)
    return queries, keys, v


def _latent_queries(
    tape: Tape, sizes: Sizes, modules: Modules, by_name: Names, by_norm: Names, config: Mapping[str, Any], x: Value
) -> Value:
    """One projection, or two with a norm between them."""
    if "q_b_proj" not in by_name:
        return ops.linear(tape, modules, sizes, by_name["q_proj"], x)
    narrow = ops.linear(tape, modules, sizes, by_name["q_a_proj"], x)
    normed = norms.norm(tape, modules, sizes, by_norm["q_a_layernorm"], narrow, config["q_lora_rank"])
    tape.drop(narrow)
    out = ops.linear(tape, modules, sizes, by_name["q_b_proj"], normed)
    tape.drop(normed)
    return out


def _complex_rotary(tape: Tape, sizes: Sizes, x: Value, width: int) -> Value:
    """Pairs as complex numbers of fp32, turned and cast back; nothing of x is kept."""
    wide = tape.apply(sizes.fp32_bytes(width), [(x, sizes.bytes(width))])
    turned = tape.apply(sizes.fp32_bytes(width), [(wide, sizes.fp32_bytes(width))])
    out = tape.apply(sizes.bytes(width), [(turned, sizes.fp32_bytes(width))])
    tape.drop(wide, turned)
    return out


def _head_norm(tape: Tape, modules: Modules, sizes: Sizes, name: str, x: Value, width: int) -> Value:
    """A norm over each head: the widths are those of all heads, the weight is one head's."""
    out = norms.norm(tape, modules, sizes, name, x, width)
    tape.drop(x)
    return out


def _project(tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, x: Value) -> tuple[Value, ...]:
    """As `_plain`, before rotation. Falcon keeps the fused projection in a local.

    Source: transformers 5.23.0, models/falcon/modeling_falcon.py (FalconAttention.forward: fused_qkv).
    """
    shape = layer.shape
    q_width, k_width = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    outs = [ops.linear(tape, modules, sizes, name, x, transposed=layer.is_conv1d) for name in layer.projections]
    if len(outs) == 3:
        return outs[0], outs[1], outs[2]
    if len(outs) == 1:
        whole = sizes.bytes(q_width + 2 * k_width)
        pieces: tuple[Value, ...] = ()
        if shape.model_type in _SPLIT_QKV:
            pieces = tape.split(outs[0], 3, whole)
        elif not repeats_heads(shape):  # slices, each with a gradient of the whole; Falcon's lists of one index copy
            narrow = sizes.bytes(k_width) if shape.model_type == "falcon" else None
            pieces = tuple(tape.apply(num_bytes, [(outs[0], whole)]) for num_bytes in (None, narrow, narrow))
        if repeats_heads(shape):
            pieces = _for_every_head(tape, shape, sizes, outs[0], whole)
        if shape.model_type == "falcon":
            return *pieces, outs[0]
        tape.drop(outs[0])
        return pieces
    q = tape.apply(sizes.bytes(q_width), [(out, sizes.bytes(q_width)) for out in outs[:1]])
    k = tape.apply(sizes.bytes(k_width), [(out, sizes.bytes(k_width)) for out in outs[-1:]])
    v = tape.apply(sizes.bytes(k_width), [(out, sizes.bytes(k_width)) for out in outs[-1:]])
    tape.drop(*outs)
    return q, k, v


def _for_every_head(tape: Tape, shape: ModelShape, sizes: Sizes, fused: Value, whole: int) -> tuple[Value, ...]:
    """q flattened, a copy; one key and one value a group, copied out of the projection and then for every head."""
    wide, narrow = sizes.bytes(shape.num_attention_heads * shape.head_dim), shape.num_key_value_heads * shape.head_dim
    query = tape.apply(wide, [(fused, whole)])
    key, value = (tape.apply(sizes.bytes(narrow), [(fused, whole)]) for _ in range(2))
    keys, values = (tape.apply(wide, [(x, sizes.bytes(narrow))]) for x in (key, value))
    tape.drop(key, value)
    return query, keys, values


def is_masked(shape: ModelShape, sizes: Sizes) -> bool:
    """Whether sdpa gets a mask and leaves flash attention for it; Falcon always makes one.

    Source: transformers 5.23.0, models/falcon/modeling_falcon.py (create_causal_mask: allow_is_causal_skip=False).
    """
    always = shape.model_type == "falcon"
    return sizes.attention == "sdpa" and (always or is_windowed(shape, sizes.length))


def is_windowed(shape: ModelShape, length: int) -> bool:
    """Whether some layer's window is shorter than the batch, so that sdpa gets a mask instead of `is_causal`.

    Limits: where windows alternate with full attention, every layer is taken as windowed.
    Source: transformers 5.23.0, masking_utils.py (_ignore_causal_mask_sdpa).
    """
    return shape.sliding_window is not None and length >= shape.sliding_window


def uses_rotary(shape: ModelShape) -> bool:
    """Families with learned positions or ALiBi do not rotate q and k."""
    return not shape.model_type.startswith(("gpt2", "opt", "bloom", "t5", "mt5", "umt5", "bart"))
