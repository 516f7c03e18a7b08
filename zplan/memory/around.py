"""What lives around the layers: arguments that every layer is given, what stays of the embedding.

Legend: B micro-batch, S sequence length, T = B * S tokens, h hidden size, H heads, b bytes of the training dtype.
"""

from __future__ import annotations

from zplan.memory.attention import is_masked
from zplan.memory.loss import INT64
from zplan.memory.operations import Sizes
from zplan.memory.trainable import Layout
from zplan.model_shape import ModelShape

DEFAULT_DROPOUT: dict[tuple[str, str], float] = {
    ("gpt2", "resid_pdrop"): 0.1,
    ("gpt2", "attn_pdrop"): 0.1,
    ("gpt2", "embd_pdrop"): 0.1,
    ("opt", "dropout"): 0.1,
}
"""Of a config.json that says nothing; every other family's is 0 (transformers 5.23.0, models/*/configuration_*.py)."""


LATE_NORM = "final_layer_norm"
"""transformers 5.23.0, models/opt/modeling_opt.py (OPTDecoder), made before the layers and run after them."""


def dropout_rate(shape: ModelShape, *keys: str) -> float:
    """The dropout rate under the first of the keys that the model's config has."""
    found = (shape.config.get(key, DEFAULT_DROPOUT.get((shape.model_type, key))) for key in keys)
    return float(next((rate for rate in found if rate is not None), 0.0))


def embedded_bytes(shape: ModelShape, layout: Layout, sizes: Sizes) -> int:
    """T h b + 8 T for a norm behind the embedding (Bloom), a byte an element for a dropout (GPT-2).

    Source: transformers 5.23.0, models/bloom/modeling_bloom.py, models/gpt2/modeling_gpt2.py.
    """
    normed = any(
        weight.group and weight.module.rpartition(".")[2] != LATE_NORM
        for laid in layout.blocks
        if laid.block.role == "embedding"
        for weight in laid.weights
    )
    dropped = dropout_rate(shape, "embd_pdrop") > 0
    mask = sizes.tokens * shape.hidden_size * (sizes.itemsize if sizes.on_cpu else 1)
    return normed * (sizes.bytes(shape.hidden_size) + 2 * sizes.fp32_bytes(1)) + dropped * mask


def arguments_bytes(shape: ModelShape, sizes: Sizes) -> int:
    """Positions (int64), cos and sin of the rotary embedding, masks.

    Source: transformers 5.23.0, masking_utils.py (eager_mask): one B x S x S of the training dtype for each kind of
    layer (full, sliding).
    """
    rotary = 2 * sizes.length * shape.head_dim * sizes.itemsize
    squares = sizes.micro_batch * sizes.length * sizes.length
    kinds = max(len(set(shape.layer_types)), 1) if sizes.attention == "eager" else 0
    masks = kinds * squares * sizes.itemsize
    if is_masked(shape, sizes):
        masks = squares  # a byte each
    return INT64 * sizes.length + rotary + masks


def returned_bytes(shape: ModelShape, sizes: Sizes) -> int:
    """B H S S of the training dtype.

    Source: transformers 5.23.0, models/falcon/modeling_falcon.py, models/bloom/modeling_bloom.py (decoder layers).
    """
    returns = sizes.attention == "eager" and shape.model_type in ("falcon", "bloom")
    return sizes.tokens * sizes.length * shape.num_attention_heads * sizes.itemsize if returns else 0
