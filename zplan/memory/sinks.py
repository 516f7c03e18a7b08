"""Attention with a sink in every row of scores (gpt-oss), which transformers has as the eager one only.

Legend: B micro-batch, S sequence length, H heads.
"""

from __future__ import annotations

from zplan.memory import operations as ops
from zplan.memory.layer_modules import LayerModules
from zplan.memory.operations import Modules, Sizes
from zplan.memory.scores import repeat_heads
from zplan.memory.tape import Tape, Value, kept_factors

INT64 = 8


def sink_attention(
    tape: Tape, layer: LayerModules, sizes: Sizes, modules: Modules, q: Value, k: Value, v: Value,
    num_heads: int, q_width: int, k_width: int, v_width: int,
) -> Value:  # fmt: skip
    """Scores, masked, joined by one column of sinks, less their largest, through softmax; the column is cut off again.

        B H S S b for the product, the scaled and the masked scores; B H S (S + 1) b from the sinks on

    The masked scores live until the weights are there, the shifted ones to the end. The largest keeps its places; its
    gradient is a tensor of zeros but for them.

    Source: transformers 5.23.0, models/gpt_oss/modeling_gpt_oss.py (eager_attention_forward).
    """
    rows = sizes.micro_batch * num_heads * sizes.length
    small, more = rows * sizes.length * sizes.itemsize, rows * (sizes.length + 1) * sizes.itemsize
    wide = sizes.bytes(q_width)
    keys = repeat_heads(tape, sizes, k, k_width, q_width, num_heads)
    values = repeat_heads(tape, sizes, v, v_width, q_width, num_heads)
    product = tape.apply(small, [(q, wide), (keys, wide)], saves=kept_factors(q, keys))
    scaled = tape.apply(small, [(product, small)])
    tape.drop(product)
    masked = tape.apply(small, [(scaled, None)])
    tape.drop(scaled)
    sinks = [(i, w) for i, w in enumerate(layer.laid.weights) if w.name.endswith(".sinks")]
    joined = tape.apply(more, [(masked, None)], weights=ops.gradients_of(sinks))
    shifted = tape.apply(more, [(joined, more)], extra_saved=rows * INT64, temporary=more)
    tape.drop(joined)
    weights = tape.apply(more, [(shifted, more)], saves_output=True)
    cut = tape.apply(None, [(weights, more)])
    tape.drop(masked, weights)
    out = tape.apply(wide, [(cut, small), (values, wide)], saves=kept_factors(cut, values))
    viewed = tape.apply(None, [(out, wide if sizes.micro_batch > 1 else None)])
    flat = tape.apply(wide, [(viewed, None)])
    tape.drop(out, viewed, keys, values, shifted)
    tape.hold(cut)
    return flat
