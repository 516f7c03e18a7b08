"""offload_param on NVMe: whether its buffers suffice for the parameters that are in host memory at once.

A partition holds a buffer from the moment it is read until its parameter is released, a persistent one's until it has
been gathered, but from the first update on for good.

Source: deepspeed 0.19.8, runtime/swap_tensor/partitioned_param_swapper.py (swap_in, swappable_tensor),
runtime/zero/partitioned_param_coordinator.py (__all_gather_params_, __prefetch_nvme_param_partitions).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from zplan.errors import ConfigError
from zplan.memory.coordinator import NOT_AVAILABLE, Coordinator
from zplan.memory.estimate import course_of
from zplan.memory.fetch_limits import NO_TRACE, Limits
from zplan.memory.instances import Instances, instances
from zplan.memory.schedule import Scheduler
from zplan.memory.script import Script
from zplan.memory.shards import shard
from zplan.memory.sub_groups import MIN_SWAPPED_BYTES, sub_groups
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice

_AWAY, _FLYING, _HERE = 0, 1, 2


class TooFewBuffersError(Exception):
    """So many parameters are read at once, and so many buffers are free."""


class _Buffers:
    """Where the parts of the swapped parameters are."""

    def __init__(self, swapped: Iterable[int], count: int) -> None:
        self.where, self.free_buffers = dict.fromkeys(swapped, _AWAY), count

    def is_away(self, number: int) -> bool:
        return self.where.get(number) == _AWAY

    def read(self, numbers: Sequence[int]) -> None:
        """swap_in; what comes twice is refused as well."""
        if len(numbers) > self.free_buffers or len(set(numbers)) < len(numbers):
            raise TooFewBuffersError(len(numbers), self.free_buffers)
        self.free_buffers -= len(numbers)
        self.where.update(dict.fromkeys(numbers, _FLYING))

    def need(self, numbers: Iterable[int]) -> None:
        """_ensure_availability_of_partitioned_params: to wait for one read is to wait for all."""
        states = {number: self.where[number] for number in numbers if number in self.where}
        self.read([number for number, state in states.items() if state == _AWAY])
        if any(state != _HERE for state in states.values()):
            flying = [number for number, state in self.where.items() if state == _FLYING]
            self.where.update(dict.fromkeys(flying, _HERE))

    def give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self.where.get(number):
                self.where[number] = _AWAY
                self.free_buffers += 1


class _Swapping(Coordinator):
    """The coordinator, whose prefetching ends at what is on the drive and reads that ahead instead.

    Args:
        persists: parameters that persist, in the first step, too.
    """

    def __init__(self, *of: Any, buffers: _Buffers, persists: frozenset[int], **others: Any) -> None:
        super().__init__(*of, **others)
        self.buffers, self.persists = buffers, persists

    def _gather(self, numbers: Sequence[int]) -> None:
        wanted = [number for number in numbers if self.status[number] == NOT_AVAILABLE]
        self.buffers.need(wanted)
        super()._gather(numbers)
        self.buffers.give_back(self.persists.intersection(wanted))

    def _fetch(self, wanted: tuple[int, ...]) -> None:
        for number in wanted:
            self.buffers.need((number,))
        super()._fetch(wanted)

    def _release(self, number: int) -> bool:
        released = super()._release(number)
        if released:
            self.buffers.give_back((number,))
        return released

    def _prefetch(self) -> None:
        if not self.limits.prefetch:
            return
        queue, numel, chosen = self.fetches.queue, 0, set[int]()
        most = min(self.limits.prefetch, self.limits.live - self.available_numel)
        while self.head < len(queue) and numel < most and not self.buffers.is_away(queue[self.head][0]):
            number, step = queue[self.head]
            self.head += 1
            self.last_use[number] = max(self.last_use[number], step)
            if self.status[number] == NOT_AVAILABLE and number not in chosen:
                chosen.add(number)
                numel += self.fetches.numel[number]
        if chosen:
            self._gather(sorted(chosen))
        self._read_ahead()

    def _read_ahead(self) -> None:
        flying, passed, wanted = sum(self.fetches.numel[number] for number in self.inflight), 0, list[int]()
        for number, _ in self.fetches.queue[self.head :]:
            if passed > 2 * flying or len(wanted) >= self.buffers.free_buffers:
                break
            if self.buffers.is_away(number):
                wanted.append(number)
            passed += self.fetches.numel[number]
        self.buffers.read(wanted)

    def give_all_back(self) -> None:
        """After backward everything that was gathered goes, before an update what persists as well."""
        gathered = [number for number, status in enumerate(self.status) if status != NOT_AVAILABLE]
        self.buffers.give_back(set(gathered) - self.persistent)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """All that decides whether buffers suffice."""

    limits: Limits
    persistent: frozenset[int]
    swapped: frozenset[int]
    accumulates: bool


def refuse_swapping(shape: ModelShape, recipe: Recipe, choice: Choice, *, on_cpu: bool) -> None:
    """Refuse buffers of offload_param of which DeepSpeed asserts that there are more, or larger ones.

    It takes the whole schedule of a step, a tenth of a second for a large model: for one choice, not for a search.

    Raises:
        ConfigError: naming what is enough.
    """
    param = choice.zero.offload_param
    if choice.zero.stage != 3 or param.device != "nvme":
        return
    laid = layout(shape, recipe)
    items = instances(laid)
    on_drive = parts_on_drive(items, choice)
    largest = max(on_drive.values(), default=0)
    if largest > param.buffer_size:
        raise ConfigError(
            f"offload_param.buffer_size is {param.buffer_size}, and a rank's part of the largest parameter has"
            f" {largest} elements",
            because="DeepSpeed asserts that a buffer holds it (partitioned_param_swapper.py, get_buffer)",
            fix=f"--set offload_param.buffer_size={largest}",
        )
    script = course_of(shape, recipe, laid, choice, on_cpu=on_cpu).script
    short = too_few_buffers(laid, items, script, choice, param.buffer_count)
    if short is None:
        return
    raise ConfigError(
        f"offload_param.buffer_count is {param.buffer_count}: {short[0]} parameters are read at once where {short[1]}"
        " buffers are free",
        because="DeepSpeed asserts a buffer for each, and none twice (partitioned_param_swapper.py, swap_in)",
        fix=next(_mends(laid, items, script, choice, len(on_drive))),
    )


def _mends(laid: Layout, items: Instances, script: Script, choice: Choice, most: int) -> Iterator[str]:
    """What helps alone, each tried."""
    count = choice.zero.offload_param.buffer_count
    counts = [number for number in (2 * count, 4 * count, 8 * count) if number < most] + [most]
    for number in counts:
        if too_few_buffers(laid, items, script, choice, number) is None:
            yield f"--set offload_param.buffer_count={number}"
    reuse, prefetch = "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"
    for keys in ((reuse,), (prefetch,), (reuse, prefetch)):
        zero = replace(choice.zero, **dict.fromkeys(keys, 0))  # type: ignore[arg-type]
        if too_few_buffers(laid, items, script, replace(choice, zero=zero), count) is None:
            yield " ".join(f"--set {key}=0" for key in keys)
    yield "--offload-param cpu"


def parts_on_drive(items: Instances, choice: Choice) -> dict[int, int]:
    """Elements of each partition that is written: a megabyte or more."""
    parts = shard(items, choice.zero, choice.batch.zero_ranks).partition
    return {n: part for n, part in enumerate(parts) if part * items.itemsize[n] >= MIN_SWAPPED_BYTES}


def read_while_loading(laid: Layout, items: Instances, on_drive: Iterable[int]) -> int:
    """Most that are gathered at once when weights are initialised: those of a module and of the modules in it.

    Source: transformers 5.23.0, integrations/deepspeed.py (initialize_weights_zero3).
    """
    counts, written = Counter[tuple[int, str]](), set(on_drive)
    for index, block in enumerate(laid.blocks):
        for local, weight in enumerate(block.weights):
            if items.base[index] + local in written and ".lora_" not in weight.name:
                module = weight.module.removesuffix(".base_layer")
                counts[index, module] += 1
                counts[index, module.rpartition(".")[0]] += bool(module)
    return max(counts.values(), default=0)


def too_few_buffers(
    laid: Layout, items: Instances, script: Script, choice: Choice, buffer_count: int
) -> tuple[int, int] | None:
    """(parameters that are read at once, buffers that are free then), where the buffers do not suffice."""
    zero, on_drive = choice.zero, parts_on_drive(items, choice)
    loading = read_while_loading(laid, items, on_drive)
    if loading > buffer_count:
        return loading, buffer_count
    asked = _Asked(
        limits=Limits.of(zero), persistent=shard(items, zero, choice.batch.zero_ranks).persistent,
        swapped=frozenset(on_drive) - _moved_to_host(items, choice),
        accumulates=choice.batch.gradient_accumulation_steps > 1,
    )  # fmt: skip
    return _short_of(items, script, asked, buffer_count)


def _moved_to_host(items: Instances, choice: Choice) -> frozenset[int]:
    """Trained parameters of the first sub-groups, up to max_in_cpu elements: they stay in host memory.

    Source: deepspeed 0.19.8, runtime/zero/stage3.py:888 (_create_param_groups_fp16_flat_cpu_memory), :978.
    """
    ranks, room, moved = choice.batch.zero_ranks, choice.zero.offload_param.max_in_cpu, list[int]()
    counts = list(sub_groups(items, ranks, choice.zero.sub_group_size).counts)
    for group in map(sorted, items.groups):
        flat, done = min(room, sum(-(-items.numel[number] // ranks) for number in group)), 0
        room, left = room - flat, list(group)
        while left:
            sub_group, left = left[: counts[0]], left[counts.pop(0) :]
            done += sum(-(-items.numel[number] // ranks) for number in sub_group)
            moved += sub_group if done <= flat else []
    return frozenset(moved)


@lru_cache(1024)
def _short_of(items: Instances, script: Script, asked: _Asked, buffer_count: int) -> tuple[int, int] | None:
    """Two steps and their updates, every module in turn."""
    buffers = _Buffers(asked.swapped, buffer_count)
    straight = Scheduler(replace(script, laps=()))

    def coordinator(limits: Limits, **others: Any) -> _Swapping:
        return _Swapping(
            script.fetches, limits, external=script.external, trainable=items.trainable, viewed=script.viewed,
            staying=script.viewed & items.packed, unread=script.unread, buffers=buffers, persists=asked.persistent,
            **others,
        )  # fmt: skip

    try:
        untraced = coordinator(NO_TRACE, persistent=frozenset(), num_unread=script.forward_modules)
        straight.schedule(untraced, without=script.root_call)
        untraced.give_all_back()
        for missing in (asked.persistent,) * asked.accumulates + (frozenset[int](),):
            if not missing:
                buffers.give_back(asked.persistent)
                buffers.need(asked.persistent)
            traced = coordinator(asked.limits, persistent=asked.persistent, missing=missing)
            straight.schedule(traced)
            traced.give_all_back()
        buffers.give_back(asked.persistent)
        buffers.need(asked.persistent)
    except TooFewBuffersError as error:
        return error.args
    return None
