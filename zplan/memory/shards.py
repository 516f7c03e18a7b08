"""How ZeRO-3 cuts parameters over the ranks.

Legend: N ranks, n_i elements of parameter i, partition_i = ceil(n_i / N).
"""

from __future__ import annotations

from functools import lru_cache

from zplan.memory.instances import Instances
from zplan.memory.runtime import ALLOCATOR_ROUNDING
from zplan.memory.sub_groups import FP32, left_on_gpu, swapped_parameters, unswapped_bytes
from zplan.values import dataclass
from zplan.zero_config import ZeroConfig


@dataclass(frozen=True, slots=True)
class Shards:
    """How parameters are cut over the ranks."""

    partition: tuple[int, ...]
    """Elements of each parameter on one rank."""
    persistent: frozenset[int]
    trainable_numel: int
    """Elements of all trainable partitions of one rank."""
    stored_bytes: int
    """Bytes of all partitions of one rank."""
    persistent_bytes: int
    """Bytes of the gathered persistent parameters."""
    largest_partition: int


def shard(items: Instances, zero: ZeroConfig, num_ranks: int) -> Shards:
    """Partition every parameter, frozen ones too.

        partition_i = ceil(n_i / N)
        persistent: n_i <= stage3_param_persistence_threshold, while their sum stays within
        stage3_model_persistence_threshold

    Source: deepspeed 0.19.8, partition_parameters.py (_partition_param), parameter_offload.py
    (mark_persistent_parameters).
    """
    return _shard(
        items, zero.stage3_param_persistence_threshold, zero.stage3_model_persistence_threshold, num_ranks,
        num_ranks > 1 or zero.offloads_param,
    )  # fmt: skip


@lru_cache(1024)
def _shard(items: Instances, small: int, sum_of_small: int, num_ranks: int, gathers: bool) -> Shards:
    parts = tuple(-(-numel // num_ranks) for numel in items.numel)
    persistent, total = set(), 0
    for number, numel in enumerate(items.numel):
        if numel <= small and numel + total <= sum_of_small:
            persistent.add(number)
            total += numel
    return Shards(
        partition=parts,
        persistent=frozenset(persistent),
        trainable_numel=sum(parts[number] for group in items.groups for number in group),
        stored_bytes=sum(size * part for size, part in zip(items.itemsize, parts, strict=True)),
        persistent_bytes=sum(items.itemsize[p] * parts[p] * num_ranks for p in persistent) if gathers else 0,
        largest_partition=max(parts[number] for group in items.groups for number in group),
    )


@lru_cache(1024)
def whole_bytes(items: Instances) -> tuple[int, ...]:
    """Of every parameter."""
    return tuple(b * numel for b, numel in zip(items.itemsize, items.numel, strict=True))


@lru_cache(1024)
def padded_bytes(items: Instances, num_ranks: int) -> tuple[int, ...]:
    """Of every parameter as all ranks hold it."""
    return tuple(b * -(-numel // num_ranks) * num_ranks for b, numel in zip(items.itemsize, items.numel, strict=True))


def secondary_group(zero: ZeroConfig, num_ranks: int) -> int:
    """Ranks that share hpZ's second copy; 1 without it."""
    return max(1, min(zero.zero_hpz_partition_size, num_ranks))


@lru_cache(1024)
def second_copies_bytes(items: Instances, num_ranks: int, group: int) -> tuple[int, int]:
    """One rank's part of hpZ's second copies, of trained and of frozen parameters, cut over fewer ranks.

        b * ceil(n / N) * N / group     per parameter

    Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py:1901 (_partition_param_sec).
    """
    if group == 1:
        return 0, 0
    parts = [num_bytes // group for num_bytes in padded_bytes(items, num_ranks)]
    trained = sum(part for part, trains in zip(parts, items.trainable, strict=True) if trains)
    return trained, sum(parts) - trained


def update_bytes(items: Instances, shards: Shards, zero: ZeroConfig, *, num_ranks: int) -> int:
    """Persistent parameters, partitioned before the update, are gathered again after it, out of copies on the GPU if
    they are offloaded and cut; the norms of offloaded gradients and the temporaries of what a ratio leaves on the GPU
    (resident.py) are gone by then. Before it they lie beside the gradients that are not swapped.

    Source: deepspeed 0.19.8, stage3.py (step: _partition_all_parameters, _post_step; step: norm_for_param_grads),
    partition_parameters.py (_allgather_params_coalesced: _no_gather_coalesced).
    """
    staged, norms = 0, 0
    if zero.offloads_param and num_ranks > 1:
        staged = _cut_bytes(items, shards.persistent, num_ranks)
    if zero.offloads_optimizer:
        norms = ALLOCATOR_ROUNDING * sum(map(len, items.groups))
    before = _unswapped_bytes(items, swapped_parameters(items, zero, num_ranks), num_ranks)
    updating = 2 * FP32 * max(left_on_gpu(items, zero, num_ranks), default=0)
    return max(0, shards.persistent_bytes + max(staged - norms, before) - updating)


_unswapped_bytes = lru_cache(1024)(unswapped_bytes)


@lru_cache(1024)
def _cut_bytes(items: Instances, numbers: frozenset[int], num_ranks: int) -> int:
    """Bytes of one rank's partitions of these parameters."""
    return sum(items.itemsize[p] * -(-items.numel[p] // num_ranks) for p in numbers)
