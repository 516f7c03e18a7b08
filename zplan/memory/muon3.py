"""DeepSpeed's Muon at ZeRO-3: whole gradients and momentum, gathered chunk by chunk before the step.

Legend: N ranks, b bytes of a gradient, L elements of a chunk's partitions on one rank, M elements of the largest matrix
of a round.
Source: deepspeed 0.19.8, runtime/zero/stage3.py:1821 (_apply_muon_to_accumulated_grads), :1697
(_muon_update_sub_group), :2060 (_partitioned_buffers_all_gather).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from zplan.memory.muon import Precision, update_bytes

MOST_KEPT_BYTES = 256 * 1024 * 1024
"""Of gather buffers, kept from step to step (stage3.py:243, _muon_allgather_max_cached_bytes)."""
Matrix = tuple[int, tuple[int, ...]]
"""(elements of a partition, shape)."""


def muon_chunks(group: Sequence[Matrix], reduce_bucket_size: int) -> list[Sequence[Matrix]]:
    """A sub-group's matrices until the next would exceed reduce_bucket_size elements; at least one."""
    chunks: list[Sequence[Matrix]] = []
    start = numel = 0
    for index, (_, shape) in enumerate(group):
        if index > start and numel + prod(shape) > reduce_bucket_size:
            chunks.append(group[start:index])
            start, numel = index, 0
        numel += prod(shape)
    return [*chunks, group[start:]]


class GatherBuffers:
    """The buffers that gathers share: kept by size while they are at most 256 MiB together, the least recent goes."""

    def __init__(self, num_ranks: int, itemsize: int) -> None:
        self.num_ranks, self.itemsize = num_ranks, itemsize
        self.kept: dict[tuple[int, int], int] = {}

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())

    def take(self, numel: int, kind: int = 0) -> int:
        """A gather of L elements a rank; bytes that are made and not kept.

            (N + 1) b L

        Args:
            kind: gathers of different kinds share nothing, whatever their size.
        """
        num_bytes = (self.num_ranks + 1) * self.itemsize * numel
        if self.num_ranks == 1:
            return 0
        if num_bytes > MOST_KEPT_BYTES:
            return num_bytes
        known = self.kept.pop((numel, kind), None)
        while known is None and self.kept and self.kept_bytes + num_bytes > MOST_KEPT_BYTES:
            del self.kept[next(iter(self.kept))]
        self.kept[numel, kind] = num_bytes
        return 0


def muon_step_bytes(chunks: Sequence[Sequence[Matrix]], *, num_ranks: int, of: Precision) -> tuple[int, int]:
    """(bytes of gather buffers between steps, most that a later step has live above them).

    Per chunk, beside the whole gradients of the chunk before it, which a name still holds:

        gradients    N b L                    and the gather's own buffers
        momentum     N b L, its clone b L     and the gather's own buffers
        rounds       zplan.memory.muon3.rounds_bytes
    """
    itemsize = of.gradient
    buffers = GatherBuffers(num_ranks, itemsize)
    for chunk in chunks:
        buffers.take(sum(numel for numel, _ in chunk))
    kept = buffers.kept_bytes
    most = before = 0
    for chunk in chunks:
        numel = sum(part for part, _ in chunk)
        whole = num_ranks * itemsize * numel if num_ranks > 1 else 0
        own = buffers.take(numel)
        above = buffers.kept_bytes - kept + before + whole + itemsize * numel + whole
        rounds = rounds_bytes([shape for _, shape in chunk], num_ranks=num_ranks, of=of)
        most = max(most, above + own, above + rounds)
        before = whole
    return kept, most


def rounds_bytes(shapes: Sequence[tuple[int, ...]], *, num_ranks: int, of: Precision) -> int:
    """Most that the rounds of a chunk have live on rank 0, which has a matrix in every one.

    Each rank updates one of N matrices, then all are gathered; matrices of several shapes, or fewer than N, in padded
    buffers, of which those of the round before live until they are replaced.

        update     b N_before + update_bytes + 2 (N + 1) b M_before
        gather     b N_k + 2 (N + 1) b M + N b M_before
    """
    itemsize, most, update, padded = of.gradient, 0, 0, 0
    for first in range(0, len(shapes), num_ranks):
        members = shapes[first : first + num_ranks]
        held = 2 * (num_ranks + 1) * padded
        most = max(most, held + update + update_bytes(members[0], of))
        update = itemsize * prod(members[0])
        if len(members) < num_ranks or len(set(members)) > 1:
            largest = itemsize * max(map(prod, members))
            most = max(most, update + 2 * (num_ranks + 1) * largest + num_ranks * padded)
            padded = largest
    return most
