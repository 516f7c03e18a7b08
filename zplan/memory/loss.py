"""The loss path: logits, their tiles and their gradients, by loss, by trainability of the head, on GPU and CPU.

Legend: T tokens, h hidden size, V vocabulary, b bytes of the training dtype.
Source: trl 1.16.0, trl/kernels/chunked_logprob.py and trl/trainer/utils.py (add_fused_lm_head); transformers 5.23.0,
loss/loss_utils.py (ForCausalLMLoss).
"""

from __future__ import annotations

from zplan.model_shape import ModelShape
from zplan.recipe import Loss
from zplan.values import dataclass

FP32 = 4
INT64 = 8
VOCAB_TILE = 32_768
"""trl/trainer/utils.py (_CHUNKED_LOGPROB_CHUNK_SIZE): the buffer is this wide even for smaller vocabularies."""
TOKEN_TILE = 4_096
"""trl/kernels/chunked_logprob.py (TOKEN_CHUNK_SIZE)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCost:
    """Bytes of the loss around the final hidden states."""

    forward: int
    """Live at most while the loss is computed."""
    kept: int
    """Saved for backward."""
    backward: int
    """Live at most in its backward, without `kept`, before the head's gradient leaves."""
    hidden_gradient: int
    """Gradient of the final hidden states that goes on to the last norm."""
    reads_hidden: bool = True
    """Keeps the final hidden states themselves for its backward; otherwise they go with its forward."""
    spread: int = 0
    """Temporaries while that gradient is scattered to all positions."""
    logits: int = 0
    """Logits of the training dtype, live while the head's own module runs; 0 if the loss reads the head's weight."""
    head: int = 0
    """Live at most in the backward of the head's own module."""


def loss_cost(
    loss: Loss, shape: ModelShape, *, micro_batch: int, length: int, itemsize: int, head_trains: bool, on_cpu: bool,
    shifted: bool = True,
) -> LossCost:  # fmt: skip
    """The bytes of one micro-batch's loss, all tokens supervised.

    Args:
        head_trains: the output weight gets a gradient.
        on_cpu: tiles are folded by torch operations instead of the Triton kernel.
        shifted: labels are shifted here, so that the last position is not scored; where ranks share a sequence they
            come shifted.
    """
    if loss in ("nll", "chunked_nll"):
        return _tiled(shape, micro_batch, length, itemsize, head_trains, on_cpu, shifted)
    if loss == "liger":
        return _liger(shape, micro_batch * length, itemsize, head_trains)
    return _full(shape, micro_batch * length, itemsize, head_trains)


def _tiled(
    shape: ModelShape, micro_batch: int, length: int, b: int, head_trains: bool, on_cpu: bool, shifted: bool
) -> LossCost:
    """TRL's tiles.

        tile = min(T, 4096) * 32768 * b;  backward adds 4 T h, and 4 V h (+ b V h) if the head trains

    On a GPU the supervised positions are copied out first and their gradient is scattered back; elsewhere every
    position is scored and torch operations fold a tile through fp32 copies (3 forward, 7.25 backward).
    """
    tokens, width, vocab = micro_batch * max(length - shifted, 1), shape.hidden_size, shape.vocab_size
    rows, columns = min(tokens, TOKEN_TILE), min(vocab, VOCAB_TILE)
    tile = rows * VOCAB_TILE * b
    vectors = 7 * tokens * FP32
    copies = on_cpu and (micro_batch == 1 or not shifted)
    scored = 0 if copies else tokens * width * b
    kept = scored + tokens * (INT64 + 2 * FP32)
    fold_forward = 3 * FP32 * rows * columns if on_cpu else 0
    fold_backward = 29 * rows * columns if on_cpu else 0
    gradients = tokens * width * FP32 + (vocab * width * FP32 if head_trains else 0)
    products = (b != FP32) * FP32 * (rows * columns + columns * width) if on_cpu else 0
    cast = (b != FP32) * b * (tokens * width + (vocab * width if head_trains else 0))
    hidden = micro_batch * length * width * b
    return LossCost(
        forward=kept + tile + vectors + fold_forward,
        kept=kept,
        backward=gradients + tile + max(fold_backward, products, cast - 0),
        hidden_gradient=hidden,
        reads_hidden=copies,
        spread=0 if copies else hidden,
    )


def _full(shape: ModelShape, tokens: int, b: int, head_trains: bool) -> LossCost:
    """Full logits: b V and an fp32 copy, of which the log-softmax is kept; two fp32 gradients beside it.

        backward = T V (4 + 4 + 4), then b T V and the gradients of the head's module

    Capped logits (Gemma 2) keep their tanh, b V, as well.
    """
    logits = tokens * shape.vocab_size
    capped = bool(shape.config.get("final_logit_softcapping", shape.model_type == "gemma2"))
    tanh = logits * b if capped else 0
    copy = FP32 if b != FP32 else 0
    hidden = tokens * shape.hidden_size * b
    weight = shape.vocab_size * shape.hidden_size * b if head_trains else 0
    return LossCost(
        forward=logits * (b + copy + FP32) + tanh,
        kept=logits * FP32 + tanh,
        backward=2 * FP32 * logits,
        hidden_gradient=hidden,
        reads_hidden=head_trains,
        logits=logits * b,
        head=logits * b + hidden + weight,
    )


def _liger(shape: ModelShape, tokens: int, b: int, head_trains: bool) -> LossCost:
    """Liger's fused linear cross entropy: gradients are made in forward, logits one chunk at a time.

        chunk = next power of two of T / ceil(V / h)

    Source: liger-kernel, ops/fused_linear_cross_entropy.py.
    """
    increments = -(-shape.vocab_size // shape.hidden_size)
    chunk = 1 << max(0, (-(-tokens // increments) - 1).bit_length())
    hidden = tokens * shape.hidden_size * b
    weight = shape.vocab_size * shape.hidden_size * b if head_trains else 0
    rows = min(chunk, tokens)
    return LossCost(
        forward=hidden + weight + rows * shape.vocab_size * (b + FP32),
        kept=hidden + weight,
        backward=hidden,
        hidden_gradient=hidden,
        reads_hidden=False,
    )
