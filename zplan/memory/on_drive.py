"""offload_param on NVMe: which partitions are on the drive, which stay in host memory, and what a rank keeps for them.

    written   partitions of a megabyte and more, when the model is built
    moved     trained ones of the first sub-groups, up to max_in_cpu elements: back to host memory, for good

Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py:1820 (_partition_param: swappable_tensor),
runtime/zero/stage3.py:888 (_create_param_groups_fp16_flat_cpu_memory), :978.
"""

from __future__ import annotations

from functools import lru_cache

from zplan.memory.instances import Instances
from zplan.memory.sub_groups import MIN_SWAPPED_BYTES, sub_groups
from zplan.values import dataclass
from zplan.zero_config import Choice

_PAGE_BYTES = 1024
"""What is written is a multiple of it, with aio.intra_op_parallelism at its default of 1 (AIO_ALIGNED_BYTES)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnHost:
    """Elements that one rank has in host memory beside the swap buffers."""

    moved_numel: int
    """Of the flat buffers of trained parameters, which are always pinned; a sub-group that does not fit leaves its end
    unused."""
    small_bytes: int
    """Of partitions that are neither written nor moved."""
    update_numel: int
    """Of the buffer from which updated parameters are written: whole parameters, not partitions, of the largest
    sub-group; none where all that trains has been moved."""
    written_bytes: int
    """On the drive."""


def parts_on_drive(items: Instances, choice: Choice) -> dict[int, int]:
    """Elements of each partition that is written."""
    return _parts_on_drive(items, choice.batch.zero_ranks)


def moved_to_host(items: Instances, choice: Choice) -> frozenset[int]:
    """Trained parameters that were written and are in host memory from then on."""
    zero = choice.zero
    return _moved(items, choice.batch.zero_ranks, zero.sub_group_size, zero.offload_param.max_in_cpu)[0]


def on_host(items: Instances, choice: Choice) -> OnHost:
    """What a rank keeps in host memory for a choice that has its parameters on the NVMe."""
    zero = choice.zero
    return _on_host(items, choice.batch.zero_ranks, zero.sub_group_size, zero.offload_param.max_in_cpu)


def aligned(numel: int, itemsize: int) -> int:
    """Elements of whole pages."""
    page = _PAGE_BYTES // itemsize
    return -(-numel // page) * page


@lru_cache(64)
def _parts_on_drive(items: Instances, num_ranks: int) -> dict[int, int]:
    parts = (-(-numel // num_ranks) for numel in items.numel)
    return {n: part for n, part in enumerate(parts) if part * items.itemsize[n] >= MIN_SWAPPED_BYTES}


@lru_cache(1024)
def _moved(items: Instances, num_ranks: int, sub_group_size: int, room: int) -> tuple[frozenset[int], int, bool]:
    """The moved parameters, elements of the flat buffers, and whether all that trains has been moved."""
    parts, moved, flats = [-(-numel // num_ranks) for numel in items.numel], list[int](), 0
    counts = iter(sub_groups(items, num_ranks, sub_group_size).counts)
    for group in map(sorted, items.groups):
        flat, done = min(room, sum(parts[number] for number in group)), 0
        room, left, flats = room - flat, group, flats + flat
        while left:
            count = next(counts)
            sub_group, left = left[:count], left[count:]
            done += sum(parts[number] for number in sub_group)
            moved += sub_group if done <= flat else []
    return frozenset(moved), flats, len(moved) == sum(map(len, items.groups))


@lru_cache(1024)
def _on_host(items: Instances, num_ranks: int, sub_group_size: int, room: int) -> OnHost:
    """Source: deepspeed 0.19.8, runtime/zero/stage3.py:1006 (largest_partition_numel: ds_numel),
    runtime/swap_tensor/partitioned_param_swapper.py:393 (reserve_partitioned_swap_space)."""
    parts, (moved, flats, all_moved) = _parts_on_drive(items, num_ranks), _moved(items, num_ranks, sub_group_size, room)
    stays = (number for number in range(len(items.numel)) if number not in parts and number not in moved)
    return OnHost(
        moved_numel=flats,
        small_bytes=sum(-(-items.numel[number] // num_ranks) * items.itemsize[number] for number in stays),
        update_numel=0 if all_moved else _largest_sub_group(items, num_ranks, sub_group_size),
        written_bytes=sum(items.itemsize[number] * part for number, part in parts.items()),
    )


def _largest_sub_group(items: Instances, num_ranks: int, sub_group_size: int) -> int:
    """Elements of its whole parameters, each in whole pages."""
    cut = sub_groups(items, num_ranks, sub_group_size)
    numbers = [number for group in items.groups for number in sorted(group)]
    largest = cut.numel.index(max(cut.numel))
    first = sum(cut.counts[:largest])
    return sum(
        aligned(items.numel[number], items.itemsize[number]) for number in numbers[first : first + cut.counts[largest]]
    )
