"""ZeRO-1 ahead of the last micro-step: hooks make the buckets, every gradient stays, nothing is reduced.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:2287 (process_gradients: setup_buckets,
reduce_ready_partitions_and_remove_grads: is_gradient_accumulation_boundary).
"""

from __future__ import annotations

from typing import Any

from zplan.memory.stage12 import Stage12Engine


class Stage1Earlier(Stage12Engine):
    """Under overlap_comm the last micro-step gives gradients back as they come; the one ahead of it can hold more.

    Args:
        partial: there are gradients of micro-steps before this one.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reduces_in_hooks = False

    def end_backward(self) -> None:
        """The last micro-step holds what comes after, the same or more."""
        for kind, num_bytes in enumerate(self.meter.by_kind):
            self.meter.add(kind, -num_bytes)

    def step(self) -> None:
        """Belongs to the last micro-step."""
