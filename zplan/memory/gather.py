"""Bytes of gathered parameters at every call of a ZeRO-3 step: the coordinator's schedule and what it weighs.

Only the hooks of modules move them, and only those: gradients, buckets and reductions are `zplan.memory.replay`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import sub

from zplan.memory.coordinator import Action, Coordinator, Limits, Schedule
from zplan.memory.instances import Instances
from zplan.memory.memo import Memo
from zplan.memory.meter import Gauge
from zplan.memory.script import Call, Op, Script
from zplan.memory.stage3 import Shards, Stage3Engine, shard
from zplan.zero_config import Choice

MOST_KEPT = 1024
NO_TRACE = Limits(prefetch=0, live=0, reuse=0)
ADAM_STATES = 8
"""Bytes an element of what most optimizers make in their first step; less of others only hides a part of that step."""
MOST_SCHEDULES = 256
"""Of one set of persistent parameters."""


@dataclass(frozen=True, eq=False, slots=True)
class Gathered:
    """Before every call and at most while it runs, in the order of a course's moments."""

    moments: tuple[int, ...]


@dataclass(eq=False)
class Gathering:
    """One script on one set of parameters: schedules and their bytes, each made once."""

    script: Script
    items: Instances
    itemsize: int
    _schedules: dict[tuple[frozenset[int], ...], list[tuple[Coordinator, Schedule]]] = field(default_factory=dict)
    _gathered: dict[tuple[object, ...], tuple[Schedule, Gathered]] = field(default_factory=dict)
    _either: dict[tuple[int, ...], tuple[Gathered, ...]] = field(default_factory=dict)

    def bytes_of(self, choice: Choice) -> Gathered:
        """What a choice holds in any step: in the micro-steps of the first one, where those hold more.

        The first micro-step has no trace: nothing is prefetched and everything is released after its module, persistent
        parameters too, which therefore are gathered together with the others of their module, in one buffer and in
        copies out of it. What the first step does not hold yet (Adam's states, the persistent parameters) is taken off
        its bytes.

        Source: deepspeed 0.19.8, partitioned_param_coordinator.py (release_sub_module: is_complete_trace), stage3.py
        (_post_step).
        """
        zero = choice.zero
        shards = shard(self.items, zero, choice.batch.world_size)
        later = self.of_later_steps(choice)
        states = 0 if zero.offloads_optimizer else ADAM_STATES * shards.trainable_numel
        untraced = replace(shards, persistent=frozenset(), persistent_bytes=0)
        first = self._bytes(choice, untraced, self.first_schedule, has_copies=True)
        second, missing_bytes = self._second_micro_step(choice, shards) or (later, 0)
        key = (id(first), id(second), id(later), states, shards.persistent_bytes, missing_bytes)
        known = self._either.get(key)
        if known is None or known[:3] != (first, second, later):
            if len(self._either) >= MOST_KEPT:
                self._either.clear()
            either = larger(second, larger(first, later, states + shards.persistent_bytes), states + missing_bytes)
            known = self._either[key] = (first, second, later, either)
        return known[3]

    def _second_micro_step(self, choice: Choice, shards: Shards) -> tuple[Gathered, int] | None:
        """The first step's second micro-step has the trace of the first one, which has released the persistent
        parameters: they are prefetched among the others, and a flat buffer stays until the last of its parameters is
        needed. Its bytes and those of these parameters; None where this does not happen.

        Source: deepspeed 0.19.8, partitioned_param_coordinator.py (reset_step, fetch_sub_module),
        partition_parameters.py (AllGatherCoalescedHandle: partitions).
        """
        missing = shards.persistent - self.never_released
        if choice.batch.gradient_accumulation_steps == 1 or not shards.persistent_bytes or not missing:
            return None
        ranks = choice.batch.world_size
        missing_bytes = sum(self.items.itemsize[p] * shards.partition[p] * ranks for p in missing)
        schedule = self.schedule(Limits.of(choice.zero), shards.persistent, missing)
        held = replace(shards, persistent_bytes=shards.persistent_bytes - missing_bytes)
        return self._bytes(choice, held, schedule, has_copies=True), missing_bytes

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

    def of_later_steps(self, choice: Choice) -> Gathered:
        """When the trace is known. hpZ's second copies are there from loading on, and after the first micro-step."""
        again = choice.batch.gradient_accumulation_steps > 1
        shards = shard(self.items, choice.zero, choice.batch.world_size)
        return self._bytes(choice, shards, self.schedule(Limits.of(choice.zero), shards.persistent), has_copies=again)

    def _bytes(self, choice: Choice, shards: Shards, schedule: Schedule, *, has_copies: bool) -> Gathered:
        """What a schedule holds. Choices whose schedules turn out alike share it."""
        zero, ranks = choice.zero, choice.batch.world_size
        key = (
            id(schedule), zero.stage3_allgather_sequential, zero.offloads_param,
            ranks == 1, ranks == 1 and zero.offloads_optimizer, zero.zero_hpz_partition_size, has_copies,
            # a parameter that every rank can cut evenly weighs the same for any number of ranks
            *((ranks,) if zero.offloads_param else (part * ranks for part in shards.partition)),
        )  # fmt: skip
        known = self._gathered.get(key)
        if known is None or known[0] is not schedule:
            if len(self._gathered) >= MOST_KEPT:
                self._gathered.clear()
            known = self._gathered[key] = (schedule, follow_hooks(self, choice, shards, schedule, has_copies))
        return known[1]

    def schedule(self, limits: Limits, persistent: frozenset[int], missing: frozenset[int] = frozenset()) -> Schedule:
        """What the coordinator does at every hook; one that would decide alike under these limits is taken again."""
        known = self._schedules.setdefault((persistent, missing), [])
        for coordinator, schedule in known:
            if coordinator.decides_alike(limits):
                return schedule
        coordinator = self._coordinator(limits, persistent, missing)
        made = self._decide(coordinator, self.script.calls)
        known.append((coordinator, made))
        del known[:-MOST_SCHEDULES]
        return made

    @cached_property
    def first_schedule(self) -> Schedule:
        """Of the first step, whose forward begins with a model that does not own its output projection yet."""
        hooks = [number for number, (op, _) in enumerate(self.script.calls) if op == Op.PRE_MODULE]
        first = next((number for number in hooks if self.script.calls[number][1] == self.script.root), 0)
        calls = (*self.script.calls[:first], *self.script.calls[first + 1 :])
        decided = self._decide(self._coordinator(NO_TRACE, frozenset()), calls)
        before = sum(number < first for number in hooks)
        return (*decided[:before], (), *decided[before:])

    def _coordinator(
        self, limits: Limits, persistent: frozenset[int], missing: frozenset[int] = frozenset()
    ) -> Coordinator:
        return Coordinator(
            self.script.fetches, limits, persistent=persistent, external=self.script.external,
            trainable=self.items.trainable, viewed=self.script.viewed, missing=missing,
        )  # fmt: skip

    def _decide(self, coordinator: Coordinator, calls: Sequence[Call]) -> Schedule:
        act: dict[int, Callable[[int], tuple[Action, ...]]] = {
            Op.PRE_MODULE: coordinator.pre_module,
            Op.POST_MODULE: coordinator.post_module,
            Op.KEPT_MODULE: coordinator.kept_module,
            Op.VIEWED_MODULE: coordinator.viewed_module,
            Op.RECOMPUTED_MODULE: coordinator.recomputed_module,
            Op.END_RECOMPUTED: lambda _: coordinator.end_recomputed(),
        }
        return tuple(act[op](module) for op, module in calls if op in act)


def larger(first: Gathered, later: Gathered, absent: int) -> Gathered:
    """The larger of two steps at every moment; the first does not hold the absent bytes yet."""
    if max(map(sub, first.moments, later.moments)) <= absent:
        return later
    return Gathered(tuple(max(early - absent, late) for early, late in zip(first.moments, later.moments, strict=True)))


def follow_hooks(of: Gathering, choice: Choice, shards: Shards, schedule: Schedule, has_copies: bool) -> Gathered:
    """Run the engine through the hooks of a step."""
    meter = Gauge()
    engine = Stage3Engine(
        meter, of.items, shards, choice.zero, num_ranks=choice.batch.world_size, itemsize=of.itemsize, schedule=schedule
    )
    act: dict[int, Callable[[int], None]] = {
        Op.PRE_MODULE: engine.pre_module,
        Op.POST_MODULE: engine.post_module,
        Op.KEPT_MODULE: engine.post_module,
        Op.VIEWED_MODULE: engine.post_module,
        Op.RECOMPUTED_MODULE: engine.recomputed_module,
        Op.END_RECOMPUTED: lambda _: engine.end_recomputed(),
        Op.READ_HEAD: lambda _: engine.read_head(of.script.head),
        Op.END_BACKWARD: lambda _: engine.end_backward(),
        Op.END_STEP: lambda _: engine.end_step(),
    }
    if has_copies:
        engine.cut_all_again()
    moments: list[int] = []
    for op, number in of.script.calls:
        meter.mark()
        moments.append(meter.peak_bytes)
        if op in act:
            act[op](number)
        moments.append(meter.peak_bytes)
    return Gathered(tuple(moments))


def gathering(script: Script, items: Instances, itemsize: int) -> Memo[Choice, Gathered]:
    """What is gathered during a script, by what that depends on of a choice."""
    return Memo(Gathering(script, items, itemsize).bytes_of, most_kept=MOST_KEPT)
