"""ZeRO-1 and 2 that accumulate half-precision gradients in fp32: one flat buffer of a rank's partition for each group.

Legend: b bytes of the training dtype, n elements of a gradient, S elements of one rank's partition of a group.
Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py (_use_compact_grad_partition_buffer and what asks it;
use_grad_accum_attribute at stage 1).
"""

from __future__ import annotations

from typing import Any

from zplan.memory.meter import Kind
from zplan.memory.stage12 import FP32, Stage12Engine


class Stage2InFp32(Stage12Engine):
    """The buckets are those of the training dtype; what they bring is added into 4 S at once, and that is what steps,
    or what is copied to the host in the last micro-step.

    Limits: without Muon, which the engine leaves out as well (limits.py).
    """

    def __init__(self, *args: Any, reduced: int, **options: Any) -> None:
        super().__init__(*args, reduced=reduced, **options)
        self.group_of = {number: place for place, group in enumerate(self.items.groups) for number in group}
        self.built: set[int] = set()
        self.arrives_in_fp32 = reduced == FP32

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
        """Beside the bucket's own temporaries a slice in fp32, where it was not reduced in fp32; of what is cast for
        the reduction only the copy is left then (allreduce_bucket, _add_to_grad_partition_buffer: source.to)."""
        own = [self.cut.mine[number] for number in self.bucket if number in self.cut.mine]
        for number in self.bucket:
            if number in self.cut.mine:
                self._build(self.group_of[number])
        temporaries, added = super()._reduction_bytes(), 0 if self.arrives_in_fp32 else FP32 * max(own, default=0)
        return max(temporaries, (self.cast * self.bucket_numel if self.cast else temporaries) + added)

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
        """A gradient larger than the bucket stays until the epilogue, unless it is copied to the host now."""
        if number not in self.cut.mine:
            super()._after_reduction(number)
        elif self.zero.offloads_optimizer and self.is_last:
            self.meter.touch(Kind.TEMPORARIES, 2 * FP32 * self.cut.mine[number])
            self._free(number)

    def end_backward(self) -> None:
        """No gradient is left but those in the buffers (_clear_param_grad_only)."""
        super().end_backward()
        for number in list(self.own):
            self._free(number)
        self._build_all()

    def step(self) -> None:
        """The buffer is the gradient, and goes after its group's update; on the host there is a copy of it then."""
        if not self.zero.offloads_optimizer:
            self.meter.touch(Kind.TEMPORARIES, 2 * FP32 * self.cut.largest_fragment)
        for kind in (Kind.GRADIENTS, Kind.BUCKETS):
            self.meter.add(kind, -self.meter.by_kind[kind])


class Stage1InFp32(Stage2InFp32):
    """Each gradient becomes an fp32 one that stays with its parameter (grad_accum), and the buckets are fp32.

        4 n of every gradient until it is reduced, 4 * reduce_bucket_size a bucket

    A reduced gradient of another rank's partition is a view of its bucket until it is forgotten: behind the step, or in
    it without offload. The bucket lives as long.

    Source: deepspeed 0.19.8, stage_1_and_2.py:1234 (_fill_param_grad_accum_attribute), :2631 (_clear_param_grad_only),
    :2898 (free_grad_in_param_list), :3256 (setup_buckets).
    """

    def __init__(self, *args: Any, itemsize: int, reduced: int, **options: Any) -> None:
        super().__init__(*args, itemsize=FP32, reduced=reduced, **options)
        self.made = itemsize
        self.cast = 0 if self.arrives_in_fp32 else reduced
        self.filled, self.viewed = 0, set[int]()

    def begin_micro_step(self) -> None:
        """Nothing is reduced before the last micro-step."""
        if self.partial:
            self._keep_all_gradients()
            self._set_up_buckets()

    def gradient(self, number: int) -> None:
        """Autograd's gradient beside the fp32 one that it becomes, or is added to."""
        made, kept = self.made * self.items.numel[number], FP32 * self.items.numel[number]
        self.meter.add(Kind.GRADIENTS, made)
        self._set_up_buckets()
        if number in self.own:
            self.meter.touch(Kind.GRADIENTS, kept)
        else:
            self._own(number)
        self.meter.add(Kind.GRADIENTS, -made)
        if self.reduces_in_hooks:
            self._enqueue(number)

    def _reduce(self) -> None:
        super()._reduce()
        self.filled = 1 - self.filled if self.zero.overlaps_comm else 0

    def _append(self, number: int) -> None:
        super()._append(number)
        if number not in self.cut.mine and number not in self.own:
            self.viewed.add(self.filled)

    def _after_reduction(self, number: int) -> None:
        if number in self.cut.mine and self.contiguous:
            self.meter.touch(Kind.TEMPORARIES, 2 * FP32 * self.cut.mine[number] if self.zero.offloads_optimizer else 0)
            self._free(number)

    def end_backward(self) -> None:
        """What is left is reduced; buckets go that nothing looks at any more."""
        if not self.reduces_in_hooks:
            for group in self.items.groups:
                for number in group:
                    self._enqueue(number)
        self._reduce()
        self._build_all()
        seen = FP32 * self.zero.reduce_bucket_size * len(self.viewed)
        self.meter.add(Kind.BUCKETS, seen - self.meter.by_kind[Kind.BUCKETS])
