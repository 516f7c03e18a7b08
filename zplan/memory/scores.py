"""From q, k and v to the mixed values: fused kernels, eager scores, and the families that write their own.

Legend: B micro-batch, S sequence length, H heads, b bytes of the training dtype.
Source: transformers 5.23.0, integrations/sdpa_attention.py and models/*; torch 2.13.0, derivatives.yaml.
"""

from __future__ import annotations

from zplan.memory.operations import FP32, Sizes
from zplan.memory.tape import Tape, Value, kept_factors


def fused_attention(
    tape: Tape, sizes: Sizes, q: Value, k: Value, v: Value, num_heads: int, q_width: int, k_width: int, v_width: int,
    *, masked: bool, joined: bool = False,
) -> Value:  # fmt: skip
    """sdpa and flash attention: keep q, k, v, the output and one fp32 logsumexp per token and head.

    A mask (a sliding window shorter than the batch under sdpa) rules out grouped queries: keys and values are repeated
    first. Flash attention's backward takes one fp32 number per token and head, and dq in fp32; grouped queries get dk
    and dv of every head.

    Args:
        joined: q and k are new tensors with heads before positions (attention.JOINED_ROTARY).

    Source: torch 2.13.0, derivatives.yaml (_scaled_dot_product_flash_attention),
    aten/native/transformers/cuda/flash_attn/flash_api.cpp (mha_bwd); transformers 5.23.0,
    integrations/sdpa_attention.py (use_gqa_in_sdpa).
    """
    wide, grouped = sizes.bytes(q_width), k_width != q_width
    if masked and grouped:
        k, v = (repeat_heads(tape, sizes, x, k_width, q_width, num_heads) for x in (k, v))
        out = fused_attention(tape, sizes, q, k, v, num_heads, q_width, q_width, q_width, masked=True)
        tape.drop(k, v)
        return out
    if takes_math_kernel(sizes, grouped=grouped, masked=masked):
        return _math_attention(tape, sizes, q, k, v, num_heads, q_width, k_width, joined=joined)
    out_width = num_heads * (v_width // max(k_width // max(q_width // num_heads, 1), 1)) if v_width else q_width
    head_dim = q_width // num_heads
    fast = out_width == q_width and head_dim <= 256 and head_dim % 8 == 0
    flash = fast and not masked and not sizes.on_cpu and sizes.itemsize != FP32
    scratch = _flash_scratch(sizes, num_heads, head_dim) + 2 * wide * grouped if flash else 0
    return tape.apply(
        sizes.bytes(out_width),
        [(q, wide), (k, sizes.bytes(k_width)), (v, sizes.bytes(v_width))],
        saves=(q, k, v),
        saves_output=True,
        extra_saved=sizes.fp32_bytes(num_heads),
        temporary=scratch,
    )


def takes_math_kernel(sizes: Sizes, *, grouped: bool, masked: bool) -> bool:
    """Whether sdpa on a GPU has no fused kernel: flash attention takes half precision alone, the memory-efficient one
    no grouped queries.

    Source: torch 2.13.0, ATen/native/transformers/sdp_utils_cpp.h (check_batch_size_and_num_heads_dense: supports_gqa);
    transformers 5.23.0, integrations/sdpa_attention.py (use_gqa_in_sdpa).
    Limits: later versions of torch give the memory-efficient kernel grouped queries.
    """
    return grouped and not masked and sizes.attention == "sdpa" and sizes.itemsize == FP32 and not sizes.on_cpu


def _math_attention(
    tape: Tape, sizes: Sizes, q: Value, k: Value, v: Value, num_heads: int, q_width: int, k_width: int, *, joined: bool
) -> Value:
    """Attention with the S x S matrix in fp32, causal, keys and values repeated.

    q and the repeated keys are scaled, each a copy; a mask of S x S is made of one in bytes. The softmax looks for rows
    without a key: beside its result stands a byte for every score. The result has heads before positions and is copied
    for the output projection.

    Args:
        joined: q has heads before positions; otherwise a product of several sequences copies it.

    Source: torch 2.13.0, aten/native/transformers/attention.cpp (_scaled_dot_product_attention_math, _safe_softmax).
    """
    square = sizes.length * sizes.length
    num_scores = sizes.micro_batch * num_heads * square
    wide, narrow, scores, batched = sizes.bytes(q_width), sizes.bytes(k_width), FP32 * num_scores, sizes.micro_batch > 1
    queries = tape.apply(wide, [(q, wide)])
    mask = tape.new(FP32 * square)
    tape.touch(square)
    keys, values = (tape.apply(wide, [(x, narrow)]) for x in (k, v))
    scaled = tape.apply(wide, [(keys, wide)])
    flat_queries = tape.apply(wide if batched and not joined else None, [(queries, None)])
    product = tape.apply(scores, [(flat_queries, wide), (scaled, wide)], saves=kept_factors(flat_queries, scaled))
    tape.drop(flat_queries, scaled)
    masked = tape.apply(scores, [(product, None)])
    tape.drop(product)
    weights = tape.apply(scores, [(masked, scores)], saves_output=True, forward_temporary=num_scores)
    tape.drop(masked)
    weights = _attention_dropout(tape, sizes, weights, scores, num_scores)
    out = tape.apply(wide, [(weights, scores), (values, wide)], saves=kept_factors(weights, values))
    tape.drop(weights, values, keys, queries, mask)
    viewed = tape.apply(None, [(out, wide if batched else None)])
    flat = tape.apply(wide, [(viewed, None)])
    tape.drop(out, viewed)
    return flat


def repeat_heads(tape: Tape, sizes: Sizes, x: Value, narrow: int, wide: int, num_heads: int) -> Value:
    """repeat_kv: a copy for every query head, or a view of a single head; its backward sums the copies' gradients."""
    is_single = narrow * num_heads == wide
    num_bytes = None if is_single else sizes.bytes(wide)
    return tape.apply(num_bytes, [(x, sizes.bytes(narrow))], temporary=0 if is_single else sizes.bytes(wide))


def _flash_scratch(sizes: Sizes, num_heads: int, head_dim: int) -> int:
    """softmax_d and the fp32 dq of flash attention's backward: rows in blocks of 128, heads 32 elements wide."""
    rows = sizes.micro_batch * -(-sizes.length // 128) * 128
    return FP32 * rows * num_heads * (1 + -(-head_dim // 32) * 32)


def eager_attention(
    tape: Tape, sizes: Sizes, q: Value, k: Value, v: Value, num_heads: int, q_width: int, k_width: int, v_width: int,
    *, softcap: bool = False, fp32_softmax: bool = True, joined: bool = False,
) -> Value:  # fmt: skip
    """Attention with the S x S matrix, once in the training dtype and twice in fp32 while softmax runs.

    The weights are returned to the layer, which holds them until it ends. A product of batches wants B and H as one
    dimension, which q, k and v do not allow for B > 1 and are copied, unless they have been joined or repeated; so is
    the gradient of the result.

    Args:
        joined: q and k are new tensors with heads before positions (attention.JOINED_ROTARY).

    Source: transformers 5.23.0, models/llama/modeling_llama.py (eager_attention_forward, LlamaDecoderLayer.forward).
    """
    scores = sizes.micro_batch * num_heads * sizes.length * sizes.length
    small, large = scores * sizes.itemsize, scores * FP32
    wide = sizes.bytes(q_width)
    repeats, batched = k_width != q_width, sizes.micro_batch > 1
    out_wide = sizes.bytes(v_width * q_width // k_width)
    if repeats:
        keys = repeat_heads(tape, sizes, k, k_width, q_width, num_heads)
        values = repeat_heads(tape, sizes, v, v_width, q_width, num_heads)
    else:
        keys = tape.apply(wide, [(k, None)]) if batched and not joined else tape.apply(None, [(k, None)])
    queries = tape.apply(wide, [(q, None)]) if batched and not joined else tape.apply(None, [(q, None)])
    product = tape.apply(small, [(queries, wide), (keys, wide)], saves=kept_factors(queries, keys))
    tape.drop(queries)
    if not repeats:
        tape.drop(keys)
    scaled = tape.apply(small, [(product, small)])
    tape.drop(product)
    if softcap:
        scaled = _softcap(tape, scaled, small)
    masked = tape.apply(small, [(scaled, None)])
    tape.drop(scaled)
    weights = _fp32_softmax(tape, masked, small, large if fp32_softmax else small)
    tape.drop(masked)
    weights = _attention_dropout(tape, sizes, weights, small, scores)
    if not repeats:
        values = tape.apply(out_wide if batched else None, [(v, None)])
    out = tape.apply(out_wide, [(weights, small), (values, out_wide)], saves=kept_factors(weights, values))
    tape.drop(values)
    if repeats:
        tape.drop(keys)
    viewed = tape.apply(None, [(out, out_wide if batched else None)])
    flat = tape.apply(out_wide, [(viewed, None)])
    tape.drop(out, viewed)
    tape.hold(weights)
    return flat


def falcon_attention(
    tape: Tape, sizes: Sizes, q: Value, k: Value, v: Value, num_heads: int, q_width: int, k_width: int, v_width: int
) -> Value:
    """Scores divided in place, softmax in the training dtype; shared keys and values are seen by all heads. A product
    of several sequences copies q, and k and v for every head.

    Source: transformers 5.23.0, models/falcon/modeling_falcon.py (FalconAttention.forward, without ALiBi).
    """
    batched = sizes.micro_batch > 1
    small = sizes.micro_batch * num_heads * sizes.length * sizes.length * sizes.itemsize
    wide = sizes.bytes(q_width)
    shared = wide if k_width != q_width and not batched else 0
    k_bytes, v_bytes = (wide, wide) if batched else (sizes.bytes(k_width), sizes.bytes(v_width))
    q = tape.apply(wide if batched else None, [(q, None)])
    k = tape.apply(wide if batched else None, [(k, sizes.bytes(k_width) if batched and k_width != q_width else None)])
    scores = tape.apply(small, [(q, wide), (k, k_bytes)], saves=kept_factors(q, k), temporary=shared)
    tape.drop(q, k)
    masked = tape.apply(small, [(scores, None)])
    weights = tape.apply(small, [(masked, small)], saves_output=True)
    tape.drop(scores, masked)
    v = tape.apply(wide if batched else None, [(v, sizes.bytes(v_width) if batched and v_width != q_width else None)])
    out = tape.apply(wide, [(weights, small), (v, v_bytes)], saves=kept_factors(weights, v), temporary=shared)
    tape.drop(v)
    flat = tape.apply(wide, [(out, None)])
    tape.drop(out)
    tape.hold(weights)
    return flat


def bloom_attention(
    tape: Tape, sizes: Sizes, q: Value, k: Value, v: Value, num_heads: int, q_width: int, k_width: int, v_width: int
) -> Value:
    """ALiBi's scores: one product with the bias folded in, which lives to the end beside its masked copy.

    With more than one sequence q, k and v are copied, as B and H become one dimension.

    Source: transformers 5.23.0, models/bloom/modeling_bloom.py (BloomAttention.forward).
    """
    scores = sizes.micro_batch * num_heads * sizes.length * sizes.length
    small, large, wide = scores * sizes.itemsize, scores * FP32, sizes.bytes(q_width)
    q, k, v = (
        tape.apply(wide, [(x, None)]) if sizes.micro_batch > 1 else tape.apply(None, [(x, None)]) for x in (q, k, v)
    )
    product = tape.apply(small, [(q, wide), (k, wide)], saves=kept_factors(q, k))
    masked = tape.apply(small, [(product, None)])
    weights = _attention_dropout(tape, sizes, _fp32_softmax(tape, masked, small, large), small, scores)
    out = tape.apply(wide, [(weights, small), (v, wide)], saves=kept_factors(weights, v))
    flat = tape.apply(wide, [(out, None)])
    tape.drop(product, masked, out, q, k, v)
    tape.hold(weights)
    return flat


def _attention_dropout(tape: Tape, sizes: Sizes, weights: Value, num_bytes: int, scores: int) -> Value:
    """As `dropout`, on scores: the mask is a byte each."""
    if sizes.attention_dropout == 0.0:
        return weights
    out = tape.apply(num_bytes, [(weights, num_bytes)], extra_saved=num_bytes if sizes.on_cpu else scores)
    tape.drop(weights)
    return out


def _softcap(tape: Tape, scores: Value, num_bytes: int) -> Value:
    """cap * tanh(scores / cap), which keeps the tanh (transformers 5.23.0, models/gemma2/modeling_gemma2.py)."""
    divided = tape.apply(num_bytes, [(scores, num_bytes)])
    tape.drop(scores)
    bent = tape.apply(num_bytes, [(divided, num_bytes)], saves_output=True)
    tape.drop(divided)
    out = tape.apply(num_bytes, [(bent, num_bytes)])
    tape.drop(bent)
    return out


def _fp32_softmax(tape: Tape, x: Value, small: int, large: int) -> Value:
    """softmax(x, dtype=float32).to(x.dtype): a cast up, the softmax, which keeps its output, a cast down."""
    if small == large:
        return tape.apply(large, [(x, large)], saves_output=True)
    wide = tape.apply(large, [(x, small)])
    soft = tape.apply(large, [(wide, large)], saves_output=True)
    tape.drop(wide)
    cast = tape.apply(small, [(soft, large)])
    tape.drop(soft)
    return cast
