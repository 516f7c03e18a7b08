"""ZeRO-1 and 2 ahead of the last micro-step, which can hold more: the last gives gradients back as it reduces them.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:2287 (process_gradients: setup_buckets,
reduce_ready_partitions_and_remove_grads: is_gradient_accumulation_boundary), :2143 (copy_grads_in_partition).
"""

from __future__ import annotations

from zplan.memory.stage12 import Stage12Engine
from zplan.zero_config import ZeroConfig


def can_hold_more(zero: ZeroConfig) -> bool:
    """Stage 1 under overlap_comm reduces nothing before the last micro-step and keeps what that gives back; stage 2
    with offload keeps gradients that are larger than the bucket until the epilogue."""
    return zero.overlaps_comm if zero.stage == 1 else zero.stage == 2 and zero.offloads_optimizer


class Earlier:
    """An engine that is not in its last micro-step: what comes behind the backward is the last one's to count."""

    def __init__(self, engine: Stage12Engine) -> None:
        self.engine = engine
        self.begin_micro_step, self.gradient = engine.begin_micro_step, engine.gradient

    def end_backward(self) -> None:
        """The last micro-step holds what comes after, the same or more."""
        if self.engine.stage == 2:
            self.engine.end_backward()
        for kind, num_bytes in enumerate(self.engine.meter.by_kind):
            self.engine.meter.add(kind, -num_bytes)

    def step(self) -> None:
        """Belongs to the last micro-step."""
