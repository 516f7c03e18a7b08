"""Schedule: what ZeRO-3's coordinator does over a whole step. Laps that go alike are followed once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import field
from functools import cached_property
from itertools import takewhile

from zplan.memory.coordinator import Act, Action, Coordinator, Flight
from zplan.memory.fetch_limits import Bounds
from zplan.memory.laps import Laps
from zplan.memory.script import Op, Script
from zplan.values import dataclass

Happening = tuple[int, tuple[Action, ...]]
"""(call, actions)."""
FEW_IN_FLIGHT = 200
"""Parameters: with more of them laps are compared only where as many were in flight a lap before."""
_STEPS = (Op.PRE_MODULE, Op.RECOMPUTED_MODULE)
"""Calls that the coordinator counts."""
_OTHERS = (Op.END_RECOMPUTED, Op.READ_HEAD, Op.END_BACKWARD, Op.END_STEP)
_LEAVING = (Op.POST_MODULE, Op.KEPT_MODULE, Op.VIEWED_MODULE)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Run:
    """Some calls in a row, or a lap and those after it that go as it does."""

    first: int
    num_calls: int
    happenings: tuple[Happening, ...]
    laps: Laps | None = None
    lap: int = 0
    times: int = 1


Schedule = tuple[Run, ...]
"""Of all calls of a script, in their order."""


_Cut = tuple[int, int, Laps | None, int]
"""(first call, the one behind the last, laps, number of the lap) of a stretch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The calls of one lap, or those between laps."""

    first: int
    num_calls: int
    hooks: tuple[tuple[int, int, int], ...]
    """(call, operation, module) of the calls in which something can happen."""
    releases: tuple[tuple[int, int], ...]
    """Every release: module, and the steps from the start of the stretch to it."""
    laps: Laps | None = None
    lap: int = 0


@dataclass(frozen=True, slots=True)
class Before:
    """Where the coordinator stood before a lap."""

    status: list[int]
    last_use: list[int]
    inflight: tuple[int, ...]
    flights: list[tuple[tuple[int, ...], int, bool]]
    users: dict[int, set[int]]
    kept: dict[int, tuple[int, ...]]
    step: int
    head: int
    available_numel: int

    @classmethod
    def of(cls, now: Coordinator) -> Before:
        users = {number: set(modules) for number, modules in now.users.items()}
        return cls(
            now.status.copy(), now.last_use.copy(), tuple(now.inflight), _flights(now), users, now.kept.copy(),
            now.step, now.head, now.available_numel,
        )  # fmt: skip


@dataclass(eq=False)
class Scheduler:
    """Leads coordinators through one script."""

    script: Script
    _distances: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict)
    _regular: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    _stretches: dict[tuple[int, int], Stretch] = field(default_factory=dict)

    def schedule(self, coordinator: Coordinator, *, without: int | None = None) -> Schedule:
        """Args:
        without: a call that is left out.
        """
        laps_alike = {
            laps: laps.are_alike(coordinator.persistent) and laps.are_alike(coordinator.viewed)
            for laps in self.script.laps
        }
        live, behind = Bounds(), 0
        runs: list[Run] = []
        flying = 0
        for number, cut in enumerate(self._cuts):
            if number < behind:
                continue  # a lap that goes as the one ahead of it
            stretch = self._stretch(*cut)
            flew, flying = flying, len(coordinator.inflight)
            looks = stretch.laps and laps_alike[stretch.laps] and (flying <= FEW_IN_FLIGHT or flying == flew)
            before = Before.of(coordinator) if looks else None
            coordinator.live = Bounds()
            happenings = self._follow(coordinator, stretch, without)
            skipped = self._skipped(coordinator, before, stretch) if before else 0
            if before and skipped:
                assert stretch.laps is not None
                self._skip(coordinator, before, stretch.laps, stretch.lap + 1, skipped)
            behind = number + 1 + skipped
            live.include(coordinator.live)
            runs.append(
                Run(
                    first=stretch.first, num_calls=stretch.num_calls, happenings=happenings, laps=stretch.laps,
                    lap=stretch.lap, times=1 + skipped,
                )
            )  # fmt: skip
        coordinator.live = live
        return tuple(runs)

    @cached_property
    def _cuts(self) -> tuple[_Cut, ...]:
        """All calls, cut before and behind every lap."""
        found: list[_Cut] = []
        end = 0
        for laps in self.script.laps:
            found.append((end, laps.first, None, 0))
            for lap in range(laps.count):
                first = laps.first + lap * laps.num_calls
                found.append((first, first + laps.num_calls, laps, lap))
            end = laps.first + laps.count * laps.num_calls
        found.append((end, len(self.script.calls), None, 0))
        return tuple(found)

    @cached_property
    def _keeps(self) -> bool:
        """Whether the graph keeps views of weights."""
        return any(op in (Op.KEPT_MODULE, Op.VIEWED_MODULE) for op, _ in self.script.calls)

    def _stretch(self, first: int, end: int, laps: Laps | None, lap: int) -> Stretch:
        """Kept; most laps are never asked for."""
        known = self._stretches.get((first, end))
        if known is None:
            known = self._stretches[first, end] = self._hooked(first, end, laps, lap)
        return known

    def _hooked(self, first: int, end: int, laps: Laps | None, lap: int) -> Stretch:
        hooks, releases, steps = [], [], 0
        for call in range(first, end):
            op, module = self.script.calls[call]
            if op not in _LEAVING and op not in _STEPS and op not in _OTHERS:
                if op in (Op.GRADIENT, Op.MADE) and self._keeps:
                    hooks.append((call, op, module))
                continue
            steps += op in _STEPS
            if op in _LEAVING:
                if not self.script.fetches.modules.get(module):
                    continue
                releases.append((module, steps))
            hooks.append((call, op, module))
        return Stretch(
            first=first, num_calls=end - first, hooks=tuple(hooks), releases=tuple(releases), laps=laps, lap=lap
        )

    def _follow(self, coordinator: Coordinator, stretch: Stretch, without: int | None) -> tuple[Happening, ...]:
        act: dict[int, Callable[[int], tuple[Action, ...]]] = {
            Op.PRE_MODULE: coordinator.pre_module,
            Op.POST_MODULE: coordinator.post_module,
            Op.KEPT_MODULE: coordinator.kept_module,
            Op.VIEWED_MODULE: coordinator.viewed_module,
            Op.RECOMPUTED_MODULE: coordinator.recomputed_module,
            Op.END_RECOMPUTED: lambda _: coordinator.end_recomputed(),
            Op.READ_HEAD: lambda _: coordinator.read_head(self.script.head),
            Op.GRADIENT: lambda number: ((Act.DROP, (number,)),),
            Op.MADE: lambda number: ((Act.DROP, (number,)),),
            Op.END_BACKWARD: lambda _: ((Act.GIVE_BACK, self.script.head),),
            Op.END_STEP: lambda _: ((Act.UPDATE, self.script.head),),
        }
        happenings: list[Happening] = []
        modules, queued, fetches = self.script.fetches.modules, len(self.script.fetches.queue), Op.PRE_MODULE
        for call, op, module in stretch.hooks:
            if call == without:
                continue
            if op == fetches and module not in modules and coordinator.head == queued:
                coordinator.step += 1  # it needs nothing, and nothing comes after it
            elif actions := act[op](module):
                happenings.append((call, actions))
        return tuple(happenings)

    # -- laps that go alike --------------------------------------------------------------------------------------
    def _skipped(self, now: Coordinator, before: Before, stretch: Stretch) -> int:
        """How many laps after this one go as it did."""
        laps, lap = stretch.laps, stretch.lap + 1
        assert laps is not None
        if lap == laps.count or not _stands_alike(now, before, laps, lap):
            return 0
        most = min(
            laps.count - lap,
            self._fetched_alike(now, before, laps),
            _prefetched_alike(now, now.available_numel - before.available_numel),
            _forgotten_alike(now, before, laps),
        )
        if _is_used_later(now, before, laps, lap):
            return most
        return self._released_alike(now, before, stretch, most)

    def _fetched_alike(self, now: Coordinator, before: Before, laps: Laps) -> int:
        """For how many laps the queue brings the same again, of these laps' parameters and no others."""
        width = now.head - before.head
        if not width:
            return laps.count
        taken = (number for number, _ in self.script.fetches.queue[before.head : now.head])
        return min(self._regularity(now, before, laps)[before.head] // width, min(map(laps.laps_ahead, taken)))

    def _regularity(self, now: Coordinator, before: Before, laps: Laps) -> list[int]:
        """At how many places in a row, from each on, the queue brings what it brings a lap later."""
        width, steps = now.head - before.head, now.step - before.step
        key = (width, laps.parameters, steps)
        known = self._regular.get(key)
        queue = self.script.fetches.queue
        if known is None:
            known = self._regular[key] = [0] * (len(queue) + 1)
            for place in reversed(range(len(queue) - width)):
                number, step = queue[place]
                is_alike = queue[place + width] == (number + laps.parameters, step + steps)
                known[place] = 1 + known[place + 1] if is_alike else 0
        return known

    def _released_alike(self, now: Coordinator, before: Before, stretch: Stretch, most: int) -> int:
        """For how many laps, `most` at most, the same parameters are far from their next use; notes how far."""
        assert stretch.laps is not None
        steps, reuse = now.step - before.step, now.limits.reuse
        if reuse <= 0:
            now.is_far(0)  # as is everything
            return most
        first = self._lap_distances(stretch, 0, before.step)
        did = [distance >= reuse for distance in first]
        for number in range(1, most + 1):
            distances = self._lap_distances(stretch, number, before.step + number * steps)
            if distances == first:
                continue  # noted when that lap was followed
            if [distance >= reuse for distance in distances] != did:
                return number - 1
            for distance in distances:
                now.is_far(distance)
        return most

    def _lap_distances(self, stretch: Stretch, later: int, step: int) -> tuple[int, ...]:
        """How far it is to the next use, at every release of a lap that is that much later."""
        key = (stretch.first, later, step)
        known = self._distances.get(key)
        if known is None:
            assert stretch.laps is not None
            fetches, way = self.script.fetches, later * stretch.laps.modules
            known = self._distances[key] = tuple(
                distance
                for module, steps in stretch.releases
                for _, distance in fetches.distances(module + way, step + steps)
            )
        return known

    def _skip(self, now: Coordinator, before: Before, laps: Laps, lap: int, skipped: int) -> None:
        """Put the coordinator behind laps that go as the one before them."""
        steps, grown, way = (
            now.step - before.step,
            now.available_numel - before.available_numel,
            skipped * laps.parameters,
        )
        laps.move(now.status, lap, skipped)
        if not _is_used_later(now, before, laps, lap):
            laps.move(now.last_use, lap, skipped)
            ahead = laps.from_lap_on(lap + skipped)
            now.last_use[ahead] = [step + skipped * steps for step in now.last_use[ahead]]
        moved: dict[int, Flight] = {}
        flights: dict[int, Flight] = {}
        for number, flight in now.inflight.items():
            if id(flight) not in moved:
                numbers = tuple(laps.moved(other, way) for other in flight.numbers)
                moved[id(flight)] = Flight(numbers, flight.waiting, flight.has_arrived)
            flights[laps.moved(number, way)] = moved[id(flight)]
        now.inflight = flights
        gained, lost = now.kept.keys() - before.kept.keys(), before.kept.keys() - now.kept.keys()
        for number in range(1, skipped + 1):
            for module in gained:
                kept = tuple(other + number * laps.parameters for other in now.kept[module])
                now.kept[module + number * laps.modules] = kept
            for module in lost:
                del now.kept[module + number * laps.modules]
        if now.live.low >= 0:
            now.live.above(now.live.low + skipped * grown)
        if now.live.high < sys.maxsize:
            now.live.not_above(now.live.high + skipped * grown)
        now.step += skipped * steps
        now.head += skipped * (now.head - before.head)
        now.available_numel += skipped * grown


def _stands_alike(now: Coordinator, before: Before, laps: Laps, lap: int) -> bool:
    """Whether the coordinator stands before a lap as it stood before the one ahead of it."""
    return (
        not now.recomputed
        and now.users == before.users
        and not any(laps.has(number) for number in now.users)
        and len(now.inflight) == len(before.inflight)
        and laps.stands_alike(before.status, now.status, lap)
        and _flights_alike(now, before, laps, lap)
        and (_is_used_later(now, before, laps, lap) or _uses_alike(now, before, laps, lap))
    )


def _is_used_later(now: Coordinator, before: Before, laps: Laps, lap: int) -> bool:
    """The queue stands still, and every use that was taken from it for this lap or one ahead comes after all of them:
    that alone keeps their parameters, however far it is."""
    end = now.step + (laps.count - lap) * (now.step - before.step)
    return now.head == before.head and min(now.last_use[laps.from_lap_on(lap - 1)]) > end


def _flights_alike(now: Coordinator, before: Before, laps: Laps, lap: int) -> bool:
    ahead = laps.from_lap_on(lap)
    if any(laps.has(number) and not ahead.start <= number < ahead.stop for number in now.inflight):
        return False
    way = laps.parameters
    return tuple(laps.moved(number, way) for number in before.inflight) == tuple(now.inflight) and _flights(now) == [
        (tuple(laps.moved(number, way) for number in numbers), waiting, arrived)
        for numbers, waiting, arrived in before.flights
    ]


def _flights(now: Coordinator) -> list[tuple[tuple[int, ...], int, bool]]:
    """Parameters of each collective that is under way, how many of them are waited for, and whether one was."""
    each = {id(flight): flight for flight in now.inflight.values()}
    return [(flight.numbers, flight.waiting, flight.has_arrived) for flight in each.values()]


def _uses_alike(now: Coordinator, before: Before, laps: Laps, lap: int) -> bool:
    """Uses ahead that were taken from the queue; how long ago an earlier one was does not matter."""
    if max(now.last_use[laps.of(lap - 1)]) >= now.step:
        return False
    ahead, steps, past = laps.from_lap_on(lap), now.step - before.step, now.step - 1
    earlier = before.last_use[ahead.start - laps.parameters : ahead.stop - laps.parameters]
    return all(
        use == was + steps or (use <= past and was + steps <= past)
        for use, was in zip(now.last_use[ahead], earlier, strict=True)
    )


def _prefetched_alike(now: Coordinator, grown: int) -> int:
    """For how many laps stage3_max_live_parameters is above, and is not above, what it was compared with."""
    limit, live = now.limits.live, now.live
    if grown > 0 and live.low >= 0:
        return (limit - 1 - live.low) // grown
    if grown < 0:
        return (live.high - limit) // -grown
    return sys.maxsize


def _forgotten_alike(now: Coordinator, before: Before, laps: Laps) -> int:
    """For how many laps what the graph has kept of them is there to be forgotten."""
    lost = [(module, before.kept[module]) for module in before.kept.keys() - now.kept.keys()]

    def is_kept(number: int) -> bool:
        return all(
            now.kept.get(module + number * laps.modules) == tuple(other + number * laps.parameters for other in numbers)
            for module, numbers in lost
        )

    return sum(1 for _ in takewhile(is_kept, range(1, laps.count)))
