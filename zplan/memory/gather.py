"""Bytes of gathered parameters at every call of a ZeRO-3 step: the coordinator's schedule and what it weighs.

Only the hooks of modules move them, and only those: gradients, buckets and reductions are `zplan.memory.replay`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from functools import cached_property, lru_cache

from zplan.memory.coordinator import Coordinator
from zplan.memory.exchange import PLAIN, Exchange
from zplan.memory.fetch_limits import NO_TRACE, Limits
from zplan.memory.instances import Instances
from zplan.memory.laps import Laps
from zplan.memory.memo import Kept
from zplan.memory.meter import Gauge, Kind
from zplan.memory.schedule import Happening, Run, Schedule, Scheduler
from zplan.memory.script import UPDATED, Op, Script
from zplan.memory.shards import Shards, secondary_group, shard, update_bytes
from zplan.memory.stage3 import Stage3Engine
from zplan.values import dataclass
from zplan.zero_config import Choice

LEFT, UPDATING = -6, slice(-5, -3)
"""Among the moments of a script of ZeRO-3: what is still gathered when the update begins, and what is while it runs."""
MOST_SCHEDULES = 256
"""Of one set of persistent parameters."""
_PADDINGS: dict[tuple[int, ...], int] = {}


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """Some moments, repeated, each time with so many bytes more."""

    moments: tuple[int, ...]
    times: int = 1
    growth: int = 0


Parts = tuple[Part, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Gathered:
    """Before every call and at most while it runs, in the order of a course's moments."""

    parts: Parts
    """One object for all that differ in the update alone, which is not in here."""
    update_bytes: int
    """At the end of the update (UPDATED), when nothing else is gathered."""


Steps = tuple[tuple[Gathered, int], ...]
"""Steps that a run has: what each of them gathers, and bytes that it does not hold yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _FirstStep:
    """Parameters in the micro-steps of the first step."""

    untraced: Shards
    """In the first micro-step, in which nothing persists."""
    missing: frozenset[int]
    """Those that persist but were released by the first one."""
    missing_bytes: int
    """Of these, gathered."""
    states_bytes: int
    """Adam's, which are made at the end of the step."""


@dataclass(eq=False)
class Gathering:
    """One script on one set of parameters: schedules and their bytes, each made once."""

    script: Script
    items: Instances
    itemsize: int
    exchange: Exchange = PLAIN
    _schedules: dict[tuple[frozenset[int], ...], list[tuple[Coordinator, Schedule]]] = field(default_factory=dict)
    _by_limits: Kept[tuple[object, ...], Schedule] = field(default_factory=Kept)
    _parts: Kept[tuple[object, ...], tuple[Schedule, Parts]] = field(default_factory=Kept)
    _gathered: Kept[tuple[int, int], Gathered] = field(default_factory=Kept)
    _firsts: Kept[frozenset[int], Schedule] = field(default_factory=Kept)
    _first_steps: Kept[int, tuple[Shards, _FirstStep]] = field(default_factory=Kept)

    def steps_of(self, choice: Choice) -> Steps:
        """`parts_of` with the update, which gathers most in a later step: then all that persists is there."""
        updated = self.updated_bytes(choice)
        return tuple((self._with_update(parts, updated), absent) for parts, absent in self.parts_of(choice))

    def updated_bytes(self, choice: Choice) -> int:
        """Gathered at the end of the update."""
        ranks = choice.batch.zero_ranks
        return update_bytes(self.items, shard(self.items, choice.zero, ranks), choice.zero, num_ranks=ranks)

    def parts_of(self, choice: Choice) -> tuple[tuple[Parts, int], ...]:
        """What a choice holds in a later step, and in the micro-steps of the first one where those can hold more, with
        the bytes that it does not hold yet.

        The first micro-step has no trace: nothing is prefetched and everything is released after its module, persistent
        parameters too, which therefore are gathered together with the others of their module, in one buffer and in
        copies out of it. What the first step does not hold yet (the optimizer's states, the persistent parameters) is
        taken off its bytes.

        Source: deepspeed 0.19.8, partitioned_param_coordinator.py (release_sub_module: is_complete_trace), stage3.py
        (_post_step).
        """
        zero, ranks = choice.zero, choice.batch.zero_ranks
        shards = shard(self.items, zero, ranks)
        start = self._first_step(shards, ranks)
        later = self._later(choice)
        states = 0 if zero.offloads_optimizer else start.states_bytes
        shares = zero.stage3_use_all_reduce_for_fetch_params
        resting = shards.persistent & self.never_released if shares else frozenset()
        first = self._bytes(choice, start.untraced, self.first_schedule(resting), has_copies=True)
        second, missing_bytes = self._second_micro_step(choice, shards, start) or (later, 0)
        left = first[-1].moments[LEFT] if resting and choice.batch.gradient_accumulation_steps > 1 else 0
        early = ((first, states + shards.persistent_bytes), (second, states + missing_bytes - left))
        return (later, 0), *(s for s in early if (s[0] is not later or s[1] < 0) and _largest(s[0]) > s[1])

    def _second_micro_step(self, choice: Choice, shards: Shards, start: _FirstStep) -> tuple[Parts, int] | None:
        """The first step's second micro-step has the trace of the first one, which has released the persistent
        parameters: they are prefetched among the others, and a flat buffer stays until the last of its parameters is
        needed. Its bytes and those of these parameters; None where this does not happen.

        Source: deepspeed 0.19.8, partitioned_param_coordinator.py (reset_step, fetch_sub_module),
        partition_parameters.py (AllGatherCoalescedHandle: partitions).
        """
        if choice.batch.gradient_accumulation_steps == 1 or not shards.persistent_bytes or not start.missing:
            return None
        schedule = self.schedule(Limits.of(choice.zero), shards.persistent, start.missing)
        return self._bytes(choice, shards, schedule, has_copies=True), start.missing_bytes

    def _first_step(self, shards: Shards, ranks: int) -> _FirstStep:
        known = self._first_steps.get(id(shards))
        if known is None or known[0] is not shards:
            missing = shards.persistent - self.never_released
            missing_bytes = sum(self.items.itemsize[p] * shards.partition[p] * ranks for p in missing)
            of_muon = sum(shards.partition[number] for number in self.items.muon)
            made = _FirstStep(
                untraced=replace(shards, persistent=frozenset(), persistent_bytes=0),
                missing=missing, missing_bytes=missing_bytes,
                states_bytes=int(self.exchange.state_bytes * (shards.trainable_numel - of_muon)),
            )  # fmt: skip
            known = self._first_steps.keep(id(shards), (shards, made))
        return known[1]

    @cached_property
    def never_released(self) -> frozenset[int]:
        """Frozen parameters of a reentrant recomputation: those that persist stay with the recomputed layer.

        Source: deepspeed 0.19.8, partitioned_param_coordinator.py (release_sub_module: recompute_params).
        """
        script, trains = self.script, self.items.trainable
        modules = {module for op, module in script.calls if op == Op.RECOMPUTED_MODULE}
        return frozenset(
            number for module in modules for number in script.fetches.modules.get(module, ()) if not trains[number]
        )

    def _with_update(self, parts: Parts, updated: int) -> Gathered:
        known = self._gathered.get((id(parts), updated))
        if known is None or known.parts is not parts:
            known = self._gathered.keep((id(parts), updated), Gathered(parts, updated))
        return known

    def _later(self, choice: Choice) -> Parts:
        """hpZ's second copies are there from loading on, and after the first micro-step."""
        again = choice.batch.gradient_accumulation_steps > 1
        shards = shard(self.items, choice.zero, choice.batch.zero_ranks)
        return self._bytes(choice, shards, self.schedule(Limits.of(choice.zero), shards.persistent), has_copies=again)

    def _bytes(self, choice: Choice, shards: Shards, schedule: Schedule, *, has_copies: bool) -> Parts:
        """What a schedule holds. Choices whose schedules turn out alike share it, all but the end of the update."""
        zero, ranks = choice.zero, choice.batch.zero_ranks
        copies = secondary_group(zero, ranks)
        shares = zero.stage3_use_all_reduce_for_fetch_params
        persistent = shard(self.items, zero, ranks).persistent if shares else None
        key = (
            id(schedule), zero.stage3_allgather_sequential, zero.offloads_param,
            ranks == 1, copies, copies > 1 and has_copies, zero.zero_quantized_weights,
            ranks if zero.offloads_param or zero.zero_quantized_weights else padding(self.items, ranks),
            persistent,
        )  # fmt: skip
        followed = self._parts.get(key)
        if followed is None or followed[0] is not schedule:
            followed = self._parts.keep(key, (schedule, follow_hooks(self, choice, shards, schedule, has_copies)))
        return followed[1]

    def schedule(self, limits: Limits, persistent: frozenset[int], missing: frozenset[int] = frozenset()) -> Schedule:
        """What the coordinator does at every hook; one that would decide alike under these limits is taken again."""
        key = (limits.prefetch, limits.live, limits.reuse, persistent, missing)
        known = self._by_limits.get(key)
        if known is None:
            known = self._by_limits.keep(key, self._alike(limits, persistent, missing))
        return known

    def _alike(self, limits: Limits, persistent: frozenset[int], missing: frozenset[int]) -> Schedule:
        known = self._schedules.setdefault((persistent, missing), [])
        for coordinator, schedule in known:
            if coordinator.decides_alike(limits):
                return schedule
        coordinator = self._coordinator(limits, persistent, missing)
        made = self.scheduler.schedule(coordinator)
        known.append((coordinator, made))
        del known[:-MOST_SCHEDULES]
        return made

    @cached_property
    def scheduler(self) -> Scheduler:
        return Scheduler(self.script)

    def first_schedule(self, resting: frozenset[int]) -> Schedule:
        """Of the first step, whose forward begins with a model that does not own its output projection yet.

        Args:
            resting: what persists of a recomputation and stays; empty where nothing else lies in its buffers.
        """
        known = self._firsts.get(resting)
        if known is not None:
            return known
        forward = self.script.forward_modules
        coordinator = self._coordinator(NO_TRACE, frozenset(), num_unread=forward, resting=resting)
        return self._firsts.keep(resting, self.scheduler.schedule(coordinator, without=self.script.root_call))

    def _coordinator(
        self, limits: Limits, persistent: frozenset[int], missing: frozenset[int] = frozenset(), num_unread: int = 0,
        resting: frozenset[int] = frozenset(),
    ) -> Coordinator:  # fmt: skip
        return Coordinator(
            self.script.fetches, limits, persistent=persistent, external=self.script.external,
            trainable=self.items.trainable, viewed=self.script.viewed,
            staying=self.script.viewed & self.items.packed, missing=missing, unread=self.script.unread,
            num_unread=num_unread, resting=resting,
        )  # fmt: skip


@lru_cache(1024)
def _largest(parts: Parts) -> int:
    """The most at any moment; of the update that they were followed with, too."""
    return max(max(part.moments, default=0) + max(0, part.growth * (part.times - 1)) for part in parts)


@lru_cache(1024)
def padding(items: Instances, num_ranks: int) -> int:
    """A number for the elements of every parameter as all ranks hold them, one wherever they are the same: a parameter
    that every rank can cut evenly weighs the same for any number of ranks."""
    return _PADDINGS.setdefault(tuple(-(-numel // num_ranks) * num_ranks for numel in items.numel), len(_PADDINGS))


def one_by_one(parts: Parts) -> list[int]:
    """Their moments, without the update."""
    found: list[int] = []
    for part in parts:
        if part.growth:
            for time in range(part.times):
                found += [num_bytes + time * part.growth for num_bytes in part.moments]
        else:
            found += part.moments * part.times
    found[UPDATED] = 0
    return found


def follow_hooks(of: Gathering, choice: Choice, shards: Shards, schedule: Schedule, has_copies: bool) -> Parts:
    """Run the engine through the hooks of a step."""
    meter = Gauge()
    engine = Stage3Engine(
        meter, of.items, shards, choice.zero, num_ranks=choice.batch.zero_ranks, itemsize=of.itemsize,
        exchange=of.exchange, on_cpu=of.script.reduction.on_cpu,
        persistent=shard(of.items, choice.zero, choice.batch.zero_ranks).persistent,
    )  # fmt: skip
    if has_copies:
        engine.cut_all_again()
    parts = tuple(part for run in schedule for part in _follow_run(engine, run))
    return without_update(parts, engine.held_over) if engine.held_over else parts


def without_update(parts: Parts, held_over: int) -> Parts:
    """What persists, with what lies in its buffers, is given back first of all in an update.

    Source: deepspeed 0.19.8, runtime/zero/stage3.py (step: _partition_all_parameters ahead of the norm).
    """
    *others, last = parts
    moments = list(last.moments)
    moments[UPDATING] = [num_bytes - held_over for num_bytes in moments[UPDATING]]
    return (*others, replace(last, moments=tuple(moments)))


def _follow_run(engine: Stage3Engine, run: Run) -> list[Part]:
    """Laps that the coordinator leads alike are alike in bytes, unless the engine stands otherwise in the second."""
    if run.laps is None or run.times == 1:
        return [Part(_moments(engine, run.first, run.num_calls, run.happenings))]
    meter, laps = engine.meter, run.laps
    total, before = meter.total_bytes, [values.copy() for values in engine.by_parameter]
    first = _moments(engine, run.first, run.num_calls, run.happenings)
    if not all(laps.stands_alike(was, now, run.lap + 1) for was, now in zip(before, engine.by_parameter, strict=True)):
        later = (_later(run, laps, number) for number in range(1, run.times))
        return [Part(first), *(Part(_moments(engine, start, run.num_calls, made)) for start, made in later)]
    growth = meter.total_bytes - total
    meter.add(Kind.GATHERED_PARAMETERS, growth * (run.times - 1))
    for values in engine.by_parameter:
        laps.move(values, run.lap + 1, run.times - 1)
    return [Part(first, run.times, growth)]


def _later(run: Run, laps: Laps, number: int) -> tuple[int, tuple[Happening, ...]]:
    """First call and happenings of a lap that is so many laps later."""
    calls, way = number * run.num_calls, number * laps.parameters
    happenings = tuple(
        (call + calls, tuple((act, tuple(laps.moved(p, way) for p in numbers)) for act, numbers in actions))
        for call, actions in run.happenings
    )
    return run.first + calls, happenings


def _moments(engine: Stage3Engine, first: int, num_calls: int, happenings: Sequence[Happening]) -> tuple[int, ...]:
    """Of some calls in a row."""
    meter, behind = engine.meter, first
    found: list[int] = []
    for call, actions in happenings:
        found += [meter.total_bytes] * (2 * (call - behind) + 1)
        meter.mark()
        engine.follow(actions)
        found.append(meter.peak_bytes)
        behind = call + 1
    found += [meter.total_bytes] * (2 * (first + num_calls - behind))
    return tuple(found)
