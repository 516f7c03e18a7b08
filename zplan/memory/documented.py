"""The 4.5x rule of the documentation, as documented."""

from __future__ import annotations

from zplan.zero_config import ZeroConfig

DOCUMENTED_FACTOR = (9, 2)
"""4.5 as a fraction: `torch.empty(int(self.reduce_bucket_size * 4.5))`, twice, in DeepSpeed before 0.4.0 (removed in
2021-05)."""


def documented_bucket_bytes(zero: ZeroConfig, *, itemsize: int = 2) -> int | None:
    """GPU memory of the buckets under overlap_comm as the documentation states it; None where it states none.

        4.5 * (allgather_bucket_size + reduce_bucket_size) * bytes        with overlap_comm
              (allgather_bucket_size + reduce_bucket_size) * bytes        without

    The documentation's example: buckets of 5e8 -> 5e8 x 2 bytes x 2 x 4.5 = 9 GB. It is stated for ZeRO-2 and its
    predecessor stage; ZeRO-3 has no allgather_bucket_size.

    Limits: the installed engine allocates reduce_bucket_size once or twice and no allgather bucket (stage12.py).
    Source: transformers 5.23.0, docs/source/en/deepspeed.md (overlap_comm); deepspeed v0.3.16,
    runtime/zero/stage2.py (intermediate buffers).
    """
    if zero.stage not in (1, 2):
        return None
    times, over = DOCUMENTED_FACTOR if zero.overlaps_comm else (1, 1)
    return (zero.allgather_bucket_size + zero.reduce_bucket_size) * itemsize * times // over
