"""ZeRO-3 during a step: partitions, gathered parameters as the coordinator fetches them, reduction, sub-groups.

Legend: b bytes of a parameter's dtype, N ranks, n_i elements of parameter i, partition_i = ceil(n_i / N).
Source: deepspeed 0.19.8, runtime/zero/stage3.py, partition_parameters.py, partitioned_param_coordinator.py.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from zplan.memory.instances import Instances
from zplan.memory.meter import Kind, Meter
from zplan.zero_config import ZeroConfig

FP32 = 4
NOT_AVAILABLE, INFLIGHT, AVAILABLE = 0, 1, 2
RECOMPUTED = -1
"""Stands for the recomputed layer among a parameter's users."""
COPY_CHUNK_NUMEL = 250_000_000
"""Elements of one offloaded gradient copied at a time (stage3.py, partition_grads)."""


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
    sub_groups: tuple[int, ...]
    """Elements of each sub-group of the step."""
    sub_group_sizes: tuple[int, ...]
    """Number of parameters of each sub-group."""
    largest_partition: int


def shard(items: Instances, zero: ZeroConfig, num_ranks: int) -> Shards:
    """Partition every parameter, frozen ones too.

        partition_i = ceil(n_i / N)
        persistent: n_i <= stage3_param_persistence_threshold, while their sum stays within
        stage3_model_persistence_threshold

    Source: deepspeed 0.19.8, partition_parameters.py (_partition_param), parameter_offload.py
    (mark_persistent_parameters).
    """
    parts = tuple(-(-numel // num_ranks) for numel in items.numel)
    persistent, total = set(), 0
    for number, numel in enumerate(items.numel):
        if numel + total <= zero.stage3_model_persistence_threshold and (
            numel <= zero.stage3_param_persistence_threshold
        ):
            persistent.add(number)
            total += numel
    gathered = num_ranks > 1 or zero.offloads_param
    groups, counts = _sub_groups(items, parts, zero.sub_group_size)
    return Shards(
        partition=parts,
        persistent=frozenset(persistent),
        trainable_numel=sum(parts[number] for group in items.groups for number in group),
        stored_bytes=sum(size * part for size, part in zip(items.itemsize, parts, strict=True)),
        persistent_bytes=sum(items.itemsize[p] * parts[p] * num_ranks for p in persistent) if gathered else 0,
        sub_groups=groups,
        sub_group_sizes=counts,
        largest_partition=max(parts[number] for group in items.groups for number in group),
    )


def _sub_groups(items: Instances, parts: Sequence[int], sub_group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A group's parameters until sub_group_size partition elements are reached (stage3.py, _create_fp16_sub_groups)."""
    totals: list[int] = []
    counts: list[int] = []
    for group in items.groups:
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
    return tuple(totals), tuple(counts)


@dataclass(frozen=True, slots=True)
class Fetches:
    """The recorded trace: which module is fetched at which step, and how far it is to the next use of a parameter."""

    queue: tuple[tuple[int, int], ...]
    """(parameter, step) in the order of the trace."""
    uses: Mapping[int, tuple[int, ...]]
    """Steps that use a parameter, ascending."""
    passed: tuple[int, ...]
    """Elements of all modules fetched before a step."""

    @classmethod
    def of(cls, order: Sequence[int], modules: Mapping[int, Sequence[int]], numel: Sequence[int]) -> Fetches:
        """From the modules in the order in which a step fetches them."""
        queue = tuple((number, step) for step, module in enumerate(order) for number in modules.get(module, ()))
        uses: dict[int, list[int]] = {}
        for number, step in queue:
            uses.setdefault(number, []).append(step)
        sizes = (sum(numel[number] for number in modules.get(module, ())) for module in order)
        return cls(
            queue=queue,
            uses={number: tuple(steps) for number, steps in uses.items()},
            passed=tuple(accumulate(sizes, initial=0)),
        )

    def distance(self, number: int, step: int) -> int:
        """Elements fetched from `step` until the parameter is used again; more than any limit if it is not.

        Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (__params_to_release).
        """
        uses = self.uses.get(number, ())
        index = bisect_left(uses, step)
        return self.passed[uses[index]] - self.passed[step] if index < len(uses) else sys.maxsize


@dataclass(slots=True)
class _Gather:
    """One collective: the flat buffer of a coalesced gather lives until the last of its parameters is waited for."""

    numbers: Sequence[int]
    flat_bytes: int
    waiting: int
    done: bool = False


class Stage3Engine:
    """Replays PartitionedParameterCoordinator and the gradient path of one micro-step.

    Args:
        modules: module number -> its own parameters.
        fetches: modules in the order in which the recorded trace fetches them, forward and backward.
        external: parameters registered as external; they are not released (coordinator, release_sub_module).
    """

    def __init__(
        self,
        meter: Meter,
        items: Instances,
        shards: Shards,
        zero: ZeroConfig,
        *,
        num_ranks: int,
        itemsize: int,
        modules: Mapping[int, Sequence[int]],
        fetches: Fetches,
        external: Sequence[int] = (),
    ) -> None:
        self.meter, self.items, self.shards, self.zero = meter, items, shards, zero
        self.num_ranks, self.itemsize, self.modules, self.fetches = num_ranks, itemsize, modules, fetches
        self.external = frozenset(external)
        size = len(items.numel)
        self.padded_bytes = [b * part * num_ranks for b, part in zip(items.itemsize, shards.partition, strict=True)]
        self.status = [NOT_AVAILABLE] * size
        self.held = [0] * size
        for number in shards.persistent:
            self.status[number] = AVAILABLE
        self.queue = deque(fetches.queue)
        self.last_use = [-(10**10)] * size
        self.users: list[set[int]] = [set() for _ in range(size)]
        self.inflight: dict[int, _Gather] = {}
        self.recomputed: list[int] = []
        self.reads_head = False
        self.step_id = 0
        self.available_numel = 0
        self.prefetch_numel = 1 if zero.stage3_allgather_sequential else zero.stage3_prefetch_bucket_size
        self.bucket: list[int] = []
        self.bucket_numel = 0
        self.own: dict[int, int] = {}

    # -- parameters ----------------------------------------------------------------------------------------------
    def pre_module(self, module: int) -> None:
        """fetch_sub_module: gather what the module needs, wait for it, prefetch what comes next."""
        needed = self.modules.get(module)
        if needed:
            self._gather(needed)
            for number in needed:
                self.users[number].add(module)
                if number in self.inflight:
                    self._wait(number)
            self._pop_queue(needed)
        if self.prefetch_numel > 0 and self.queue:
            self._prefetch()
        self.step_id += 1

    def _pop_queue(self, needed: Sequence[int]) -> None:
        missing = {number for number in needed if self.last_use[number] < self.step_id}
        found: set[int] = set()
        while self.queue and len(found) < len(missing):
            number, step = self.queue.popleft()
            self.last_use[number] = step
            found.add(number)

    def _prefetch(self) -> None:
        limit = min(self.zero.stage3_max_live_parameters - self.available_numel, self.prefetch_numel)
        chosen: set[int] = set()
        numel = 0
        while self.queue and numel < limit:
            number, step = self.queue.popleft()
            self.last_use[number] = max(self.last_use[number], step)
            if self.status[number] == NOT_AVAILABLE and number not in chosen:
                chosen.add(number)
                numel += self.items.numel[number]
        if chosen:
            self._gather(sorted(chosen))

    def _gather(self, numbers: Sequence[int]) -> None:
        wanted = [number for number in numbers if self.status[number] == NOT_AVAILABLE]
        if not wanted:
            return
        self.available_numel += sum(self.items.numel[number] for number in wanted)
        alone = self.zero.stage3_allgather_sequential or len(wanted) == 1
        flat = 0
        for number in wanted:
            self.status[number] = INFLIGHT
            if self.num_ranks == 1:
                held = self.items.itemsize[number] * self.items.numel[number]
                self._hold(number, held if self.zero.offloads_param else 0)
            elif alone:
                self._hold(number, self.padded_bytes[number])
            else:
                flat += self.padded_bytes[number]
        if self.zero.offloads_param:  # partitions are copied from the host first
            self.meter.touch(Kind.GATHERED_PARAMETERS, flat + self._staged_bytes(wanted))
        self.meter.add(Kind.GATHERED_PARAMETERS, flat)
        gather = _Gather(wanted, flat, len(wanted))
        for number in wanted:
            self.inflight[number] = gather

    def _staged_bytes(self, numbers: Sequence[int]) -> int:
        part, itemsize = self.shards.partition, self.items.itemsize
        return sum(itemsize[p] * part[p] for p in numbers if p not in self.shards.persistent)

    def _hold(self, number: int, num_bytes: int) -> None:
        self.held[number] = num_bytes
        self.meter.add(Kind.GATHERED_PARAMETERS, num_bytes)

    def _wait(self, number: int) -> None:
        gather = self.inflight.pop(number)
        gather.waiting -= 1
        if not gather.done:
            gather.done = True
            for other in gather.numbers:
                if gather.flat_bytes:
                    self._hold(other, self.items.itemsize[other] * self.items.numel[other])
                self.status[other] = AVAILABLE
        if gather.waiting == 0 and gather.flat_bytes:
            self.meter.add(Kind.GATHERED_PARAMETERS, -gather.flat_bytes)

    def post_module(self, module: int) -> None:
        """release_sub_module: free what is not used again within stage3_max_reuse_distance elements."""
        owned = self.modules.get(module, ())
        if not owned:
            return
        release = self._releasable(owned)
        for number in owned:
            self.users[number].discard(module)
            if number in self.external:
                continue
            if number in release and self.status[number] == AVAILABLE and not self.users[number]:
                self._release(number)

    def _release(self, number: int) -> None:
        self.meter.add(Kind.GATHERED_PARAMETERS, -self.held[number])
        self.held[number] = 0
        self.status[number] = NOT_AVAILABLE
        self.available_numel -= self.items.numel[number]

    def _releasable(self, owned: Sequence[int]) -> set[int]:
        step_id, reach = self.step_id, self.zero.stage3_max_reuse_distance
        return {
            number
            for number in owned
            if number not in self.shards.persistent
            and self.last_use[number] <= step_id
            and self.fetches.distance(number, step_id) >= reach
        }

    def recomputed_module(self, module: int) -> None:
        """A frozen parameter that a recomputation fetches belongs to the recomputed layer until its backward is done.

        Source: deepspeed 0.19.8, partitioned_param_coordinator.py:391 (update_recompute_parameters).
        """
        self.pre_module(module)
        for number in self.modules.get(module, ()):
            if not self.items.trainable[number] and number not in self.shards.persistent:
                self.users[number].add(RECOMPUTED)
                self.recomputed.append(number)

    def end_recomputed(self) -> None:
        """release_sub_module of the layer: its recomputed parameters go, however soon they are used again."""
        for number in self.recomputed:
            self.users[number].discard(RECOMPUTED)
            if self.status[number] == AVAILABLE and not self.users[number] and number not in self.external:
                self._release(number)
        self.recomputed = []

    def read_head(self, numbers: tuple[int, ...]) -> None:
        """A single rank copies the head in the first step, before it is known as external; called again when it goes.

        Later steps have optimizer states in its place, unless they are few (a frozen head) or elsewhere.

        Source: deepspeed 0.19.8, parameter_offload.py (ZeROOrderedDict.__getitem__), partition_parameters.py:2142
        (_allgather_params_sequential).
        """
        few_states = self.zero.offloads_optimizer or not self.items.trainable[numbers[0]]
        if self.num_ranks > 1 or self.zero.offloads_param or not few_states:
            return
        size = sum(self.items.itemsize[p] * self.items.numel[p] for p in numbers if p not in self.shards.persistent)
        self.meter.add(Kind.GATHERED_PARAMETERS, -size if self.reads_head else size)
        self.reads_head = not self.reads_head

    # -- gradients -----------------------------------------------------------------------------------------------
    def begin_micro_step(self) -> None:
        """Earlier gradients are in the permanent partitions."""

    def gradient(self, number: int) -> None:
        """AccumulateGrad ran: into the bucket, or alone if the parameter is larger than the bucket."""
        num_bytes = self.items.itemsize[number] * self.items.numel[number]
        self.own[number] = num_bytes
        self.meter.add(Kind.GRADIENTS, num_bytes)
        numel = self.items.numel[number]
        if self.bucket and self.bucket_numel + numel > self.zero.reduce_bucket_size:
            self._reduce()
        if self.zero.contiguous_gradients and self.bucket_numel + numel <= self.zero.reduce_bucket_size:
            self.meter.add(Kind.GRADIENTS, -self.own.pop(number))
        self.bucket.append(number)
        self.bucket_numel += numel

    def end_backward(self) -> None:
        """The epilogue reduces what is left, and what is still gathered is given back."""
        self._reduce()
        self.meter.add(Kind.GATHERED_PARAMETERS, -self.meter.by_kind[Kind.GATHERED_PARAMETERS])

    def _reduce(self) -> None:
        if not self.bucket:
            return
        self.meter.touch(Kind.TEMPORARIES, self._reduction_bytes() + self._offload_bytes())
        for number in self.bucket:
            self.meter.add(Kind.GRADIENTS, -self.own.pop(number, 0))
        self.bucket, self.bucket_numel = [], 0

    def _reduction_bytes(self) -> int:
        """The padded copy of the bucket that reduce_scatter_coalesced builds.

        Source: deepspeed 0.19.8, runtime/comm/coalesced_collectives.py (reduce_scatter_coalesced).
        """
        scatters = self.zero.reduce_scatter or not self.zero.contiguous_gradients
        if not scatters and self.bucket_numel <= self.zero.reduce_bucket_size:
            return 0
        if len(self.bucket) == 1 and self.items.numel[self.bucket[0]] % self.num_ranks == 0:
            return 0
        return sum(self.itemsize * self.shards.partition[p] * self.num_ranks for p in self.bucket)

    def _offload_bytes(self) -> int:
        if not self.zero.offloads_optimizer:
            return 0
        largest = max(self.shards.partition[p] for p in self.bucket)
        norm = 2 * FP32 * min(largest, COPY_CHUNK_NUMEL)  # in fp64
        return self.itemsize * largest + max(FP32 * largest, norm)

    def step(self) -> None:
        """Per sub-group: fp32 gradients of its partitions (and a flat copy first if it has several parameters).

        Source: deepspeed 0.19.8, stage3.py (_prepare_sub_group, _prepare_fp32_grad_for_sub_group).
        """
        if self.zero.offloads_optimizer:
            return
        self.meter.touch(Kind.TEMPORARIES, 2 * FP32 * self.shards.largest_partition)
        for numel, count in zip(self.shards.sub_groups, self.shards.sub_group_sizes, strict=True):
            flat = self.itemsize * numel if count > 1 else 0
            cast = FP32 * numel if self.itemsize != FP32 else 0
            self.meter.touch(Kind.TEMPORARIES, max(flat + cast, FP32 * numel))
