"""ZeRO-2 that accumulates half-precision gradients in fp32: one flat buffer of the rank's partition for each group.

Legend: S elements of one rank's partition of a group.
Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py (_use_compact_grad_partition_buffer and what asks it).
"""

from __future__ import annotations

from typing import Any

from zplan.memory.meter import Kind
from zplan.memory.stage12 import FP32, Stage12Engine


class Stage2InFp32(Stage12Engine):
    """The buckets are those of the training dtype; what they bring is added into 4 S at once, and that is what steps.

    Limits: without offload and without Muon, which the engine leaves out as well (limits.py).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.group_of = {number: place for place, group in enumerate(self.items.groups) for number in group}
        self.built: set[int] = set()

    def begin_micro_step(self) -> None:
        """The buffers of earlier micro-steps are there."""
        if self.partial:
            self._build_all()

    def _build(self, group: int) -> None:
        """zeros(S) in fp32, when the first slice of the partition is reduced (_get_compact_grad_partition_buffer)."""
        if group not in self.built:
            self.built.add(group)
            self.meter.add(Kind.GRADIENTS, FP32 * self.cut.sizes[group])

    def _build_all(self) -> None:
        for group in range(len(self.cut.sizes)):
            self._build(group)

    def _reduction_bytes(self) -> int:
        """Beside the bucket's own temporaries a slice in fp32, where it was not reduced in fp32
        (_add_to_grad_partition_buffer: source.to)."""
        own = [self.cut.mine[number] for number in self.bucket if number in self.cut.mine]
        for number in self.bucket:
            if number in self.cut.mine:
                self._build(self.group_of[number])
        cast = 0 if self.cast == FP32 else FP32 * max(own, default=0)
        return super()._reduction_bytes() + cast

    def _slices(self) -> list[tuple[int, int]]:
        """Slices of this rank go to places of their own and are not joined."""
        found: list[tuple[int, int]] = []
        for number in self.bucket:
            for owner, numel in self.cut.pieces[number]:
                if found and found[-1][0] == owner and owner != self.cut.rank:
                    numel += found.pop()[1]
                found.append((owner, numel))
        return found

    def _after_reduction(self, number: int) -> None:
        if number not in self.cut.mine:
            super()._after_reduction(number)
        elif self.contiguous:
            self._free(number)

    def end_backward(self) -> None:
        """No gradient is left but those in the buffers (_clear_param_grad_only)."""
        super().end_backward()
        for number in list(self.own):
            self._free(number)
        self._build_all()

    def step(self) -> None:
        """The buffer is the gradient, and goes after its group's update."""
        self.meter.touch(Kind.TEMPORARIES, 2 * FP32 * self.cut.largest_fragment)
        for size in self.cut.sizes:
            self.meter.add(Kind.GRADIENTS, -FP32 * size)
