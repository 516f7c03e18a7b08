"""How ZeRO-3's update of one rank is cut into sub-groups, and which of them partial offload leaves on the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from zplan.memory.instances import Instances
from zplan.memory.muon import Precision
from zplan.memory.muon3 import muon_chunks, muon_step_bytes
from zplan.memory.muon_offload import stage3_update_bytes
from zplan.values import dataclass
from zplan.zero_config import ZeroConfig

FP32 = 4
MIN_SWAPPED_BYTES = 1 << 20
"""deepspeed 0.19.8, runtime/swap_tensor/utils.py (MIN_AIO_BYTES): smaller tensors are not written."""

COPY_CHUNK_NUMEL = 250_000_000
"""Elements of one offloaded gradient copied at a time (stage3.py, partition_grads)."""


@dataclass(frozen=True, slots=True)
class SubGroups:
    """How the step of one rank is cut."""

    numel: tuple[int, ...]
    """Elements of each sub-group."""
    counts: tuple[int, ...]
    """Number of parameters of each sub-group."""


@lru_cache(1024)
def sub_groups(items: Instances, num_ranks: int, sub_group_size: int) -> SubGroups:
    """A group's parameters until sub_group_size partition elements are reached (stage3.py, _create_fp16_sub_groups)."""
    parts = [-(-numel // num_ranks) for numel in items.numel]
    totals: list[int] = []
    counts: list[int] = []
    for group in map(sorted, items.groups):
        if sub_group_size >= sum(parts[number] for number in group):
            totals.append(sum(parts[number] for number in group))
            counts.append(len(group))
            continue
        size = count = 0
        for number in group:
            size, count = size + parts[number], count + 1
            if size >= sub_group_size or number == group[-1]:
                totals.append(size)
                counts.append(count)
                size = count = 0
    return SubGroups(tuple(totals), tuple(counts))


def muon_bytes(items: Instances, zero: ZeroConfig, num_ranks: int, of: Precision) -> tuple[int, int]:
    """Gather buffers that Muon keeps between steps, and the most that its update has live above them (muon3.py,
    muon_offload.py)."""
    bucket = 0 if zero.offloads_optimizer else zero.reduce_bucket_size
    return _muon_bytes(items, num_ranks, zero.sub_group_size, bucket, of)


@lru_cache(1024)
def _muon_bytes(
    items: Instances, num_ranks: int, sub_group_size: int, reduce_bucket_size: int, of: Precision
) -> tuple[int, int]:
    """With a bucket of 0 elements: offloaded, whole sub-groups at a time."""
    matrices = [(-(-items.numel[number] // num_ranks), items.muon[number]) for number in sorted(items.muon)]
    groups = []
    for count in sub_groups(items, num_ranks, sub_group_size).counts:
        groups += [matrices[:count]] if matrices else []
        matrices = matrices[count:]
    if not reduce_bucket_size:
        return stage3_update_bytes(groups, num_ranks=num_ranks, is_scaled=items.in_fp16, of=of)
    chunks = [chunk for group in groups for chunk in muon_chunks(group, reduce_bucket_size)]
    return muon_step_bytes(chunks, num_ranks=num_ranks, of=of)


ALIGNED_NUMEL = 1024 // FP32
"""fp32 elements of a page that is written, with aio.intra_op_parallelism at its default of 1 (AIO_ALIGNED_BYTES)."""


def is_swapped(numel: int) -> bool:
    """Whether so many fp32 elements go to the NVMe; fewer stay in memory.

    Source: deepspeed 0.19.8, runtime/swap_tensor/optimizer_utils.py:225 (is_swappable_tensor), utils.py:14.
    """
    return FP32 * numel >= MIN_SWAPPED_BYTES


def swapped_parameters(items: Instances, zero: ZeroConfig, num_ranks: int) -> frozenset[int]:
    """Trained parameters of the sub-groups that an optimizer on the NVMe swaps.

    Source: deepspeed 0.19.8, stage3.py:1260 (_swappable_optimizer_subgroup).
    """
    if zero.stage != 3 or zero.offload_optimizer.device != "nvme":
        return frozenset()
    return _swapped(items, num_ranks, zero.sub_group_size)


def unswapped_bytes(items: Instances, numbers: Iterable[int], num_ranks: int) -> int:
    """fp32 gradients of swapped sub-groups that are not written to the NVMe, or not to their end, and stay on the GPU
    until the update reads them: those below 1 MiB, and those that are no multiple of a page. Of these the end alone is
    kept, but it is a view of the gradient.

    Source: deepspeed 0.19.8, runtime/swap_tensor/optimizer_utils.py:272 (swap_out_gradients: unswapped_gradients),
    :452 (_adjust_for_misaligned_lengths: narrow).
    """
    parts = (-(-items.numel[number] // num_ranks) for number in numbers)
    return FP32 * sum(part for part in parts if not is_swapped(part) or part % ALIGNED_NUMEL)


@lru_cache(1024)
def _swapped(items: Instances, num_ranks: int, sub_group_size: int) -> frozenset[int]:
    numbers = [number for group in items.groups for number in sorted(group)]
    groups = sub_groups(items, num_ranks, sub_group_size)
    found: set[int] = set()
    for numel, count in zip(groups.numel, groups.counts, strict=True):
        found.update(numbers[:count] if is_swapped(numel) else ())
        numbers = numbers[count:]
    return frozenset(found)


def staging_bytes(bucket: Sequence[int], parts: Sequence[int], swapped: frozenset[int], *, itemsize: int) -> int:
    """One gradient's partition on its way to the host, with its fp32 copy or its norm in fp64; copies for the NVMe wait
    for the others of the bucket, which come in the model's order.

    Args:
        parts: elements of each parameter on one rank.

    Source: deepspeed 0.19.8, stage3.py:2006 (partition_grads: offload_fp32_gradients), :1677 (params_in_bucket.sort).
    """
    most = waiting = 0
    for number in sorted(bucket) if swapped else (max(bucket, key=parts.__getitem__),):
        norm = 2 * FP32 * min(parts[number], COPY_CHUNK_NUMEL)  # in fp64
        most = max(most, waiting + itemsize * parts[number] + max(FP32 * parts[number], norm))
        waiting += FP32 * parts[number] * (number in swapped)
    return most


def left_on_gpu(items: Instances, zero: ZeroConfig, num_ranks: int) -> tuple[int, ...]:
    """Elements of the sub-groups that partial offload leaves on the GPU: the first int((1 - ratio) * count).

    Source: deepspeed 0.19.8, stage3.py:1105 (_create_fp32_partitions: subgroup_to_device).
    """
    if zero.stage != 3 or zero.offload_optimizer.device != "cpu" or zero.offload_optimizer.ratio == 1:
        return ()
    groups = sub_groups(items, num_ranks, zero.sub_group_size).numel
    return groups[: int((1 - zero.offload_optimizer.ratio) * len(groups))]
