"""ZeRO-3's parameter coordinator with parameters on an NVMe: which buffers of the swapper it takes, and when.

A partition holds a buffer from the moment it is read until its parameter is released, a persistent one's until it has
been gathered, but from the first update on for good.

Source: deepspeed 0.19.8, runtime/swap_tensor/partitioned_param_swapper.py (swap_in, swappable_tensor),
runtime/zero/partitioned_param_coordinator.py (__all_gather_params_, __prefetch_nvme_param_partitions).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import field
from functools import lru_cache
from typing import Any

from zplan.memory.coordinator import NOT_AVAILABLE, Coordinator
from zplan.memory.fetch_limits import NO_TRACE, Limits
from zplan.memory.instances import Instances
from zplan.memory.laps import Laps
from zplan.memory.schedule import Before, Happening, Scheduler, Stretch
from zplan.memory.script import Script
from zplan.values import dataclass

_NOT_SWAPPED, _AWAY, _FLYING, _HERE = -1, 0, 1, 2


class TwiceError(Exception):
    """A parameter is read ahead twice at once, which no number of buffers allows."""


class _Buffers:
    """Where the parts of the swapped parameters are. What finds no buffer gets one more, and that is noted.

    Args:
        size: number of all parameters.
    """

    def __init__(self, swapped: Iterable[int], size: int, count: int) -> None:
        self.where, self.flying = [_NOT_SWAPPED] * size, list[int]()
        for number in swapped:
            self.where[number] = _AWAY
        self.count = self.free_buffers = count
        self.short: tuple[int, int] | None = None
        """(parameters that are read at once, buffers that are free then) where they do not suffice the first time."""

    def read(self, numbers: Sequence[int]) -> None:
        """swap_in."""
        missing = len(numbers) - self.free_buffers
        is_twice = len(set(numbers)) < len(numbers)
        if (missing > 0 or is_twice) and self.short is None:
            self.short = len(numbers), self.free_buffers
        if is_twice:
            raise TwiceError
        if missing > 0:
            self.count, self.free_buffers = self.count + missing, len(numbers)
        self.free_buffers -= len(numbers)
        for number in numbers:
            self.where[number] = _FLYING
        self.flying += numbers

    def need(self, numbers: Iterable[int]) -> None:
        """_ensure_availability_of_partitioned_params: to wait for one read is to wait for all."""
        states = {number: self.where[number] for number in numbers}
        self.read([number for number, state in states.items() if state == _AWAY])
        if any(state in (_AWAY, _FLYING) for state in states.values()):
            for number in self.flying:
                if self.where[number] == _FLYING:
                    self.where[number] = _HERE
            self.flying = []

    def give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self.where[number] in (_FLYING, _HERE):
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
        self.seen = 0
        """How far into the queue it has looked."""

    def _gather(self, numbers: Sequence[int]) -> None:
        wanted = [number for number in numbers if self.status[number] == NOT_AVAILABLE]
        if wanted:
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
        queue, where, numel, chosen = self.fetches.queue, self.buffers.where, 0, set[int]()
        most = min(self.limits.prefetch, self.limits.live - self.available_numel)
        while self.head < len(queue) and self._has_room(numel, most) and where[queue[self.head][0]] != _AWAY:
            number, step = queue[self.head]
            self.head += 1
            self.last_use[number] = max(self.last_use[number], step)
            if self.status[number] == NOT_AVAILABLE and number not in chosen:
                chosen.add(number)
                numel += self.fetches.numel[number]
        if chosen:
            self._gather(sorted(chosen))
        self._read_ahead()

    def _has_room(self, numel: int, most: int) -> bool:
        """Whether so many elements are below both limits, which notes by how much."""
        if numel < most:
            self.live.above(numel + self.available_numel)
            return True
        self._stops_at(numel)
        return False

    def _read_ahead(self) -> None:
        queue, numels, where = self.fetches.queue, self.fetches.numel, self.buffers.where
        most, passed, wanted = 2 * sum(numels[number] for number in self.inflight), 0, list[int]()
        place = self.head
        while place < len(queue) and passed <= most and len(wanted) < self.buffers.free_buffers:
            number = queue[place][0]
            place += 1
            if where[number] == _AWAY:
                wanted.append(number)
            passed += numels[number]
        self.seen = max(self.seen, place + 1)
        self.buffers.read(wanted)

    def give_all_back(self) -> None:
        """After backward everything that was gathered goes, before an update what persists as well."""
        gathered = [number for number, status in enumerate(self.status) if status != NOT_AVAILABLE]
        self.buffers.give_back(set(gathered) - self.persistent)


@dataclass(eq=False)
class _Scheduler(Scheduler):
    """Laps go alike if the buffers stand alike as well, and what was read ahead comes in every one of them."""

    _stood: tuple[list[int], int, int] = field(default=([], 0, 0))
    """Where the parts were before a lap, the free buffers, and all."""

    def _follow(self, coordinator: Coordinator, stretch: Stretch, without: int | None) -> tuple[Happening, ...]:
        assert isinstance(coordinator, _Swapping)
        buffers, coordinator.seen = coordinator.buffers, 0
        self._stood = buffers.where.copy(), buffers.free_buffers, buffers.count
        return super()._follow(coordinator, stretch, without)

    def _skipped(self, now: Coordinator, before: Before, stretch: Stretch) -> int:
        assert isinstance(now, _Swapping)
        assert stretch.laps is not None
        laps, lap, buffers = stretch.laps, stretch.lap + 1, now.buffers
        (where, *counts), ahead = self._stood, laps.from_lap_on(lap)
        if lap == laps.count or counts != [buffers.free_buffers, buffers.count]:
            return 0
        behind = buffers.where[laps.of(lap - 1)]
        if any(state > _AWAY for state in behind) or not laps.stands_alike(where, buffers.where, lap):
            return 0
        if any(laps.has(number) and not ahead.start <= number < ahead.stop for number in buffers.flying):
            return 0
        return min(super()._skipped(now, before, stretch), self._seen_alike(now, before, laps))

    def _seen_alike(self, now: _Swapping, before: Before, laps: Laps) -> int:
        """For how many laps the queue brings the same again as far as it was looked into."""
        further = now.seen - now.head
        if further <= 0:
            return laps.count
        width = now.head - before.head
        if not width or now.seen > len(self.script.fetches.queue):
            return 0
        seen = (number for number, _ in self.script.fetches.queue[now.head : now.seen])
        most = (self._regularity(now, before, laps)[before.head] - further) // width
        return max(0, min(most, *map(laps.laps_ahead, seen)))

    def _skip(self, now: Coordinator, before: Before, laps: Laps, lap: int, skipped: int) -> None:
        super()._skip(now, before, laps, lap, skipped)
        assert isinstance(now, _Swapping)
        laps.move(now.buffers.where, lap, skipped)
        now.buffers.flying = [number for number, state in enumerate(now.buffers.where) if state == _FLYING]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """All that decides whether buffers suffice."""

    limits: Limits
    persistent: frozenset[int]
    swapped: frozenset[int]
    accumulates: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What a step did with its buffers."""

    short: tuple[int, int] | None
    """(parameters that are read at once, buffers that are free then), where the buffers do not suffice."""
    count: int
    """Buffers that it had in the end, one more for each that was missing."""


@lru_cache(1024)
def buffers_used(items: Instances, script: Script, asked: Asked, buffer_count: int) -> Used:
    """Two steps and their updates."""
    if not asked.swapped:
        return Used(short=None, count=buffer_count)
    buffers = _Buffers(asked.swapped, len(items.numel), buffer_count)
    with suppress(TwiceError):  # more buffers read further ahead, not less
        _two_steps(items, script, asked, buffers)
    return Used(short=buffers.short, count=buffers.count)


@lru_cache(64)
def _scheduler(script: Script) -> _Scheduler:
    return _Scheduler(script)


def _two_steps(items: Instances, script: Script, asked: Asked, buffers: _Buffers) -> None:
    def coordinator(limits: Limits, **others: Any) -> _Swapping:
        return _Swapping(
            script.fetches, limits, external=script.external, trainable=items.trainable, viewed=script.viewed,
            staying=script.viewed & items.packed, unread=script.unread, buffers=buffers, persists=asked.persistent,
            **others,
        )  # fmt: skip

    scheduler = _scheduler(script)
    untraced = coordinator(NO_TRACE, persistent=frozenset(), num_unread=script.forward_modules)
    scheduler.schedule(untraced, without=script.root_call)
    untraced.give_all_back()
    for missing in (asked.persistent,) * asked.accumulates + (frozenset[int](),):
        if not missing:
            buffers.give_back(asked.persistent)
            buffers.need(asked.persistent)
        traced = coordinator(asked.limits, persistent=asked.persistent, missing=missing)
        scheduler.schedule(traced)
        traced.give_all_back()
    buffers.give_back(asked.persistent)
    buffers.need(asked.persistent)
