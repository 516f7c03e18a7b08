"""Ulysses: ranks that share a sequence trade positions for heads around the attention, and reduce gradients in fp32.

Legend: P ranks that share a sequence, B micro-batch, S its whole length, H heads of width n, b bytes of the training
dtype.
Source: deepspeed 0.19.8, runtime/sequence_parallel/ulysses_sp.py (UlyssesSPAttentionHF), sequence/layer.py
(_dim_zero_all_to_all), runtime/engine.py:2173 (sequence_parallel_size).
"""

from __future__ import annotations

from dataclasses import replace

from zplan.memory.operations import Sizes
from zplan.memory.scores import fused_attention
from zplan.memory.tape import Tape, Value
from zplan.values import dataclass

INT64 = 8


def shared_attention(
    tape: Tape, sizes: Sizes, q: Value, k: Value, v: Value, num_heads: int, q_width: int, k_width: int
) -> Value:
    """Attention over whole sequences by a part of the heads: an exchange of q, k and v before it, of its result after.

        q: (B, S / P, H, n) -> (B, S, H / P, n), the same bytes;   k, v: repeated first if they have fewer than P heads

    Every mask is dropped; the positions of the whole sequence are gathered, and held in parts and joined.

    Args:
        sizes: of one rank's part of the sequences.
    """
    ranks = sizes.sequence_parallel_size
    head_dim = q_width // num_heads
    narrow = max(k_width, ranks * head_dim)
    whole = replace(sizes, length=sizes.length * ranks, sequence_parallel_size=1)
    positions = tape.new(2 * INT64 * whole.tokens)
    exchange = _Exchange(tape, sizes)
    parts = exchange.to_heads(q, q_width), *(exchange.to_heads(x, k_width, narrow) for x in (k, v))
    q, k, v = (
        exchange.heads_first(x, width, num_heads=width // ranks // head_dim)
        for x, width in zip(parts, (q_width, narrow, narrow), strict=True)
    )
    widths = (num_heads // ranks, q_width // ranks, narrow // ranks, narrow // ranks)
    out = fused_attention(tape, whole, q, k, v, *widths, masked=False)
    tape.drop(q, k, v)
    mixed = exchange.to_positions(out, q_width, num_heads=num_heads // ranks)
    tape.drop(positions)
    return mixed


@dataclass(frozen=True, slots=True)
class _Exchange:
    """All-to-all between the ranks that share sequences, and the copies that lay tensors out for it."""

    tape: Tape
    sizes: Sizes

    def to_heads(self, x: Value, width: int, wide: int | None = None) -> Value:
        """(S / P, B, H, n) cut by heads and sent: the copy to send goes, what arrived stays.

        Args:
            wide: of all heads after they are repeated.
        """
        num_bytes = self.sizes.bytes(wide or width)
        repeated = self.tape.apply(num_bytes, [(x, self.sizes.bytes(width))]) if wide and wide > width else None
        cut = self.tape.apply(num_bytes, [(x if repeated is None else repeated, None)])
        if repeated is not None:
            self.tape.drop(repeated)
        arrived = self._send(cut, num_bytes)
        self.tape.drop(cut)
        return arrived

    def _send(self, x: Value, num_bytes: int) -> Value:
        """The exchange keeps nothing; its backward lays the gradient out and sends it back."""
        return self.tape.apply(num_bytes, [(x, num_bytes)], temporary=num_bytes)

    def heads_first(self, x: Value, width: int, *, num_heads: int) -> Value:
        """(S, B, H / P, n) to (B, H / P, S, n), as attention takes it: a view of a single head of a single sequence."""
        is_view = self.sizes.micro_batch == 1 and num_heads == 1
        out = self.tape.apply(None if is_view else self.sizes.bytes(width), [(x, None)])
        self.tape.drop(x)
        return out

    def to_positions(self, out: Value, width: int, *, num_heads: int) -> Value:
        """The result back to (B, S / P, H n): sdpa's has heads first, several sequences are laid out anew."""
        tape, num_bytes, several = self.tape, self.sizes.bytes(width), self.sizes.micro_batch > 1
        context = tape.apply(num_bytes if num_heads > 1 and self.sizes.attention == "sdpa" else None, [(out, None)])
        tape.drop(out)
        laid_out = tape.apply(num_bytes if several else None, [(context, None)])
        arrived = self._send(laid_out, num_bytes)
        joined = tape.apply(num_bytes, [(arrived, None)])
        tape.drop(arrived, laid_out, context)
        if not several:
            return joined
        mixed = tape.apply(num_bytes, [(joined, None)])
        tape.drop(joined)
        return mixed
