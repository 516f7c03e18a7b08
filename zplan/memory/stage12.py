"""ZeRO-1 and ZeRO-2 during a step: what happens to each gradient, in the order in which they come.

Legend: b bytes of the training dtype, N ranks, S elements of one rank's partition of a group.
Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py; line numbers at each rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import ceil

from zplan.memory.exchange import PLAIN, Exchange
from zplan.memory.instances import Instances
from zplan.memory.meter import Kind, Meter
from zplan.memory.muon import Precision, precision, updates_bytes
from zplan.memory.muon_offload import Piece, stage12_update_bytes
from zplan.values import dataclass
from zplan.zero_config import ZeroConfig

ALIGNMENT = 2
"""nccl_start_alignment_factor: groups are padded to a multiple of 2 N elements (stage_1_and_2.py:400)."""
FP32 = 4
MUON_COPIES = 3
"""Beside a matrix's gradient, in its dtype: the momentum, its copy and the update (Stage12Engine._orthogonalise)."""


@dataclass(frozen=True, slots=True)
class Partitions:
    """How the flat groups are cut over the ranks, seen from the rank that holds most."""

    sizes: tuple[int, ...]
    """S per group, in elements."""
    padded: tuple[int, ...]
    """N * S per group."""
    rank: int
    """The rank whose partition touches the most elements."""
    touched_by_rank: tuple[int, ...]
    """Elements of the parameters that touch each rank's partitions, whole parameters counted."""
    largest_fragment: int
    """Largest piece of one parameter within the partition, in elements."""
    largest_numel: int
    """Largest trainable parameter, in elements."""
    pieces: tuple[tuple[tuple[int, int], ...], ...]
    """(rank, elements) of the pieces into which each parameter is cut; none for a frozen one."""
    mine: Mapping[int, int]
    """Parameter -> elements within this rank's partition."""
    dealt: bool = False
    """The parameters lie in the flat groups as round_robin_gradients deals them."""

    @property
    def touched_numel(self) -> int:
        """Of the rank that is looked at."""
        return self.touched_by_rank[self.rank]


FEW_RANKS, MOST_LARGE = 4, 3
"""Where all ranks are looked at, and else the number of parameters whose holders are."""


@lru_cache(1024)
def worst_ranks(items: Instances, num_ranks: int, *, dealt: bool = False) -> tuple[int, ...]:
    """Ranks one of which holds most at any moment of a step: all of a few, else the first, the last, the one whose
    partition touches the most elements, and those at both ends of the largest parameters.

    Limits: found by looking at all ranks of some 400 drawn configurations (tests/memory/test_worst_rank.py): a rank
    that is not looked at had up to 0.5 % more, in two of them.
    """
    if num_ranks <= FEW_RANKS:
        return tuple(range(num_ranks))
    cut = partition(items, num_ranks, dealt=dealt)
    found = {0, num_ranks - 1, cut.rank}
    trained = [number for number, pieces in enumerate(cut.pieces) if pieces]
    for number in sorted(trained, key=lambda number: -items.numel[number])[:MOST_LARGE]:
        found |= {cut.pieces[number][0][0], cut.pieces[number][-1][0]}
    return tuple(sorted(found))


@lru_cache(1024)
def partition(items: Instances, num_ranks: int, rank: int | None = None, *, dealt: bool = False) -> Partitions:
    """Cut every optimizer group into N equal partitions.

    Args:
        rank: whose bytes to count; None takes the rank whose partition touches the most elements.
        dealt: round_robin_gradients: every N-th parameter of a group comes first, then those after them, and so on.

    The formula, per group:

        S = ceil(group / 2 N) * 2

    Source: deepspeed 0.19.8, stage_1_and_2.py:400 (nccl_start_alignment_factor), get_data_parallel_partitions, :901
    (_round_robin_reorder).
    """
    sizes = tuple(
        ceil(sum(items.numel[p] for p in group) / (ALIGNMENT * num_ranks)) * ALIGNMENT for group in items.groups
    )
    pieces: list[tuple[tuple[int, int], ...]] = [()] * len(items.numel)
    for size, group in zip(sizes, items.groups, strict=True):
        order = [number for turn in range(num_ranks) for number in group[turn::num_ranks]] if dealt else group
        offset = 0
        for number in order:
            pieces[number] = _pieces(offset, items.numel[number], size)
            offset += items.numel[number]
    touched = _touched(items, pieces, num_ranks)
    if rank is None:
        of_muon = _touched(items, pieces, num_ranks, among=items.muon) if items.muon else [0] * num_ranks
        rank = max(range(num_ranks), key=lambda one: touched[one] + MUON_COPIES * of_muon[one])
    mine = {number: numel for number, cut in enumerate(pieces) for owner, numel in cut if owner == rank}
    return Partitions(
        sizes=sizes,
        padded=tuple(size * num_ranks for size in sizes),
        rank=rank,
        touched_by_rank=touched,
        largest_fragment=max(mine.values(), default=0),
        largest_numel=max(items.numel[number] for group in items.groups for number in group),
        pieces=tuple(pieces),
        mine=mine,
        dealt=dealt,
    )


def _pieces(offset: int, numel: int, size: int) -> tuple[tuple[int, int], ...]:
    """Elements of one parameter in each partition that it overlaps."""
    end = offset + numel
    owners = range(offset // size, (end - 1) // size + 1)
    return tuple((owner, min(end, (owner + 1) * size) - max(offset, owner * size)) for owner in owners)


def _touched(
    items: Instances, pieces: Sequence[tuple[tuple[int, int], ...]], num_ranks: int, among: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Elements of the parameters that touch each rank's partitions, whole parameters counted."""
    touched = [0] * num_ranks
    for number in range(len(pieces)) if among is None else among:
        for owner, _ in pieces[number]:
            touched[owner] += items.numel[number]
    return tuple(touched)


@lru_cache(1024)
def muon_offload_bytes(
    items: Instances, num_ranks: int, rank: int, *, dealt: bool = False, on_cpu: bool = False
) -> tuple[int, int]:
    """Gather buffers that Muon keeps with offload, and the most that its update has live above them."""
    cut = partition(items, num_ranks, rank, dealt=dealt)
    pieces = [Piece(shape, cut.pieces[number], cut.mine.get(number, 0)) for number, shape in items.muon.items()]
    return stage12_update_bytes(pieces, num_ranks=num_ranks, is_scaled=items.in_fp16, of=precision(FP32, on_cpu=on_cpu))


class Stage12Engine:
    """Replays hooks, bucket and reduction of one micro-step.

    Args:
        reduced: bytes of an element while ranks add gradients.
        partial: gradients of earlier micro-steps are already there (gradient accumulation, last micro-step).
        is_last: it is the micro-step that steps.
    """

    def __init__(
        self, meter: Meter, items: Instances, cut: Partitions, zero: ZeroConfig, *, itemsize: int, reduced: int,
        partial: bool, num_ranks: int, of_muon: Precision, exchange: Exchange = PLAIN, is_last: bool = True,
    ) -> None:  # fmt: skip
        self.num_ranks, self.of_muon = num_ranks, of_muon
        self.meter, self.items, self.cut, self.zero = meter, items, cut, zero
        self.itemsize, self.partial, self.is_last = itemsize, partial, is_last
        self.cast = reduced if reduced != itemsize or exchange.communicated else 0
        self.stage = zero.stage
        self.contiguous = zero.contiguous_gradients or zero.offloads_optimizer
        self.reduces_in_hooks = self.stage == 2 or (zero.overlaps_comm and is_last)
        self.bucket: list[int] = []
        self.bucket_numel = 0
        self.own: dict[int, int] = {}
        self.has_partition_buffer = False
        self.has_buckets = False
        self.waiting: list[int] = []
        self.orthogonalised = [] if zero.offloads_optimizer else [p for p in items.muon if p in cut.mine]

    def begin_micro_step(self) -> None:
        """What earlier micro-steps left: stage 2 its own gradients (on the host under offload); stage 1, which reduces
        nothing before the last micro-step, all gradients and the buckets.

        Source: deepspeed 0.19.8, stage_1_and_2.py:2293 (reduce_ready_partitions_and_remove_grads), engine.py:3085
        (allreduce_gradients).
        """
        if not self.partial:
            return
        if self.stage == 1:
            self._keep_all_gradients()
            self._set_up_buckets()
        elif not self.zero.offloads_optimizer:
            self.meter.add(Kind.GRADIENTS, self.itemsize * self.cut.touched_numel)

    @property
    def bucket_bytes(self) -> int:
        """reduce_bucket_size * b * (2 if overlap_comm else 1), live from the first gradient to the epilogue.

        Source: deepspeed 0.19.8, stage_1_and_2.py:2287 (process_gradients), :3256 (setup_buckets).
        """
        return self.zero.reduce_bucket_size * self.itemsize * (2 if self.zero.overlaps_comm else 1)

    def _set_up_buckets(self) -> None:
        if self.contiguous and not self.has_buckets:
            self.has_buckets = True
            self.meter.add(Kind.BUCKETS, self.bucket_bytes)

    def _keep_all_gradients(self) -> None:
        self.own = {p: self.itemsize * self.items.numel[p] for group in self.items.groups for p in group}
        self.meter.add(Kind.GRADIENTS, sum(self.own.values()))

    def _own(self, number: int) -> None:
        self.own[number] = self.itemsize * self.items.numel[number]
        self.meter.add(Kind.GRADIENTS, self.own[number])

    def _free(self, number: int) -> None:
        if number in self.own:
            self.meter.add(Kind.GRADIENTS, -self.own.pop(number))

    def gradient(self, number: int) -> None:
        """AccumulateGrad ran: keep the gradient, or add it to the one of earlier micro-steps, then maybe reduce."""
        if number in self.own:
            self.meter.touch(Kind.GRADIENTS, self.itemsize * self.items.numel[number])
        elif self.has_buckets and self.reduces_in_hooks and self._fits(number):
            self.meter.touch(Kind.GRADIENTS, self.itemsize * self.items.numel[number])  # copied into the bucket at once
            self._append(number)
            return
        else:
            self._own(number)
        if not self.has_buckets:
            self._set_up_buckets()
        if self.reduces_in_hooks:
            self._enqueue(number)

    def _fits(self, number: int) -> bool:
        return self.bucket_numel + self.items.numel[number] <= self.zero.reduce_bucket_size

    def _append(self, number: int) -> None:
        self.bucket.append(number)
        self.bucket_numel += self.items.numel[number]

    def _enqueue(self, number: int) -> None:
        numel = self.items.numel[number]
        if not self._fits(number):
            self._reduce()
        if self.contiguous and numel <= self.zero.reduce_bucket_size:
            self._free(number)
        elif self.zero.offloads_optimizer:
            # a clone takes the place of an oversized gradient (_offload_gradient_safety_enabled)
            self.meter.touch(Kind.GRADIENTS, self.itemsize * numel)
        self._append(number)

    def end_backward(self) -> None:
        """The epilogue: what is left is reduced, buckets go, the partition's gradients stay for the step.

        Source: deepspeed 0.19.8, stage_1_and_2.py:1016 (independent_gradient_partition_epilogue).
        """
        if not self.reduces_in_hooks:
            for group in self.items.groups:
                for number in group:
                    self._enqueue(number)
        self._reduce()
        for number in self.waiting:
            self._free(number)
        self.waiting = []
        for number in list(self.own):
            if self.contiguous or number not in self.cut.mine:
                self._free(number)
        self._orthogonalise()
        if self.stage == 2 and self.partial and not self.zero.offloads_optimizer:
            # this micro-step's gradients were added to the earlier ones (stage_1_and_2.py:1043)
            for number in list(self.own):
                self._free(number)
            if self.has_partition_buffer:
                self.meter.add(Kind.GRADIENTS, -self.itemsize * self.cut.touched_numel)
        self.meter.add(Kind.BUCKETS, -self.meter.by_kind[Kind.BUCKETS])

    def _orthogonalise(self) -> None:
        """Muon's updates of the whole matrices that touch the partition, beside their gradients, which go then; a flat
        buffer that also has some of AdamW's stays.

        Source: deepspeed 0.19.8, stage_1_and_2.py:1016 (independent_gradient_partition_epilogue: get_flat_partition).
        """
        self.meter.touch(
            Kind.TEMPORARIES, updates_bytes((self.items.muon[number] for number in self.orthogonalised), self.of_muon)
        )
        for number in self.orthogonalised:
            self._free(number)
        of_earlier_micro_steps = self.stage == 2 and self.partial and not self.contiguous
        self.meter.add(Kind.GRADIENTS, 0 if of_earlier_micro_steps else self._updates_bytes)
        if self.has_partition_buffer and len(self.orthogonalised) == len(self.cut.mine):
            self.meter.add(Kind.GRADIENTS, -self.itemsize * self.cut.touched_numel)

    @property
    def _updates_bytes(self) -> int:
        return self.itemsize * sum(self.items.numel[number] for number in self.orthogonalised)

    def _reduce(self) -> None:
        if not self.bucket:
            return
        self.meter.touch(Kind.TEMPORARIES, self._reduction_bytes())
        if self.zero.overlaps_comm and not self.contiguous:
            for number in self.waiting:
                self._free(number)
            self.waiting = []
        for number in self.bucket:
            self._after_reduction(number)
        self.bucket, self.bucket_numel = [], 0

    def _reduction_bytes(self) -> int:
        """Temporaries of one bucket's reduction: slices of several owners are flattened once more, and what is reduced
        in another dtype is copied.

        Source: deepspeed 0.19.8, stage_1_and_2.py (average_tensor, allreduce_and_copy_with_multiple_ranks,
        allreduce_bucket, gradient_reduction_w_predivide).
        """
        if self.contiguous:
            return self._flattened_bytes() if self.zero.reduce_scatter else self.cast * self.bucket_numel
        return self._copied_bytes(self.bucket_numel, len(self.bucket))

    def _copied_bytes(self, numel: int, count: int) -> int:
        """`count` tensors made one, and cast; a single one is a view."""
        return numel * (self.cast + (self.itemsize if count > 1 else 0))

    def _flattened_bytes(self) -> int:
        """Slices of the bucket by owner are flattened until they exceed the bucket size.

        Source: deepspeed 0.19.8, stage_1_and_2.py (average_tensor, allreduce_and_scatter); torch 2.13.0,
        torch/csrc/utils/tensor_flatten.h (flatten_dense_tensors).
        """
        if len(self.bucket) == 1 and len(self.cut.pieces[self.bucket[0]]) == 1 and not self.cast:
            return 0
        largest = numel = count = 0
        for _, size in self._slices():
            numel, count = numel + size, count + 1
            if numel > self.zero.reduce_bucket_size:
                largest, numel, count = max(largest, self._copied_bytes(numel, count)), 0, 0
        return max(largest, self._copied_bytes(numel, count))

    def _slices(self) -> list[tuple[int, int]]:
        """(owner, elements) in the order of the bucket, neighbours of one owner as one slice."""
        found: list[tuple[int, int]] = []
        for number in self.bucket:
            for owner, numel in self.cut.pieces[number]:
                if found and found[-1][0] == owner:
                    numel += found.pop()[1]
                found.append((owner, numel))
        return found

    def _after_reduction(self, number: int) -> None:
        if self.stage == 2 and number not in self.cut.mine:
            if self.zero.overlaps_comm and not self.contiguous:
                self.waiting.append(number)
            else:
                self._free(number)
        elif self.contiguous and number in self.cut.mine:
            if self.zero.offloads_optimizer:
                if not self.is_last:
                    return  # one that is larger than the bucket stays until the epilogue (copy_grads_in_partition)
                self.meter.touch(Kind.TEMPORARIES, 2 * FP32 * self.cut.mine[number])
            elif not self.has_partition_buffer:
                self.meter.add(Kind.GRADIENTS, self.itemsize * self.cut.touched_numel)
                self.has_partition_buffer = True
            self._free(number)

    def step(self) -> None:
        """Per group: a flat copy of the partition's gradients and its fp32 cast, then the optimizer.

            gradients + b S + 4 S      (the cast only below fp32)

        Source: deepspeed 0.19.8, stage_1_and_2.py (step: self.flatten(averaged_gradients).to(fp32)).
        """
        if self.zero.offloads_optimizer:
            self.meter.add(Kind.GRADIENTS, -self.meter.by_kind[Kind.GRADIENTS])
            if self.items.muon:
                cut, on_cpu = self.cut, self.of_muon.iterated == FP32
                _, updating = muon_offload_bytes(self.items, self.num_ranks, cut.rank, dealt=cut.dealt, on_cpu=on_cpu)
                self.meter.touch(Kind.TEMPORARIES, updating)
            return
        self.meter.touch(Kind.TEMPORARIES, 2 * FP32 * self.cut.largest_fragment)
        for index, size in enumerate(self.cut.sizes):
            cast = FP32 * size if self.itemsize != FP32 else 0
            self.meter.touch(Kind.TEMPORARIES, self.itemsize * size + cast)
            if index == 0:
                self.meter.add(Kind.GRADIENTS, -self._updates_bytes)
            if index == len(self.cut.sizes) - 1:
                self.meter.add(Kind.GRADIENTS, -self.meter.by_kind[Kind.GRADIENTS])
            self.meter.touch(Kind.TEMPORARIES, FP32 * size)
