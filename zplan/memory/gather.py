"""Bytes of gathered parameters at every call of a ZeRO-3 step: the coordinator's schedule and what it weighs.

Only the hooks of modules move them, and only those: gradients, buckets and reductions are `zplan.memory.replay`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from zplan.memory.coordinator import Action, Coordinator, Limits, Schedule
from zplan.memory.course import Op, Script
from zplan.memory.instances import Instances
from zplan.memory.memo import Memo
from zplan.memory.meter import Meter
from zplan.memory.stage3 import Shards, Stage3Engine, shard
from zplan.zero_config import Choice

MOST_KEPT = 1024
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
    _schedules: dict[frozenset[int], list[tuple[Coordinator, Schedule]]] = field(default_factory=dict)
    _gathered: dict[tuple[object, ...], tuple[Schedule, Gathered]] = field(default_factory=dict)

    def bytes_of(self, choice: Choice) -> Gathered:
        """What a choice holds. Choices whose schedules turn out alike share it."""
        zero, ranks = choice.zero, choice.batch.world_size
        shards = shard(self.items, zero, ranks)
        schedule = self.schedule(Limits.of(zero), shards.persistent)
        key = (
            id(schedule), zero.stage3_allgather_sequential, zero.offloads_param,
            ranks == 1, ranks == 1 and zero.offloads_optimizer,
            # a parameter that every rank can cut evenly weighs the same for any number of ranks
            *((ranks,) if zero.offloads_param else (part * ranks for part in shards.partition)),
        )  # fmt: skip
        known = self._gathered.get(key)
        if known is None or known[0] is not schedule:
            if len(self._gathered) >= MOST_KEPT:
                self._gathered.clear()
            known = self._gathered[key] = (schedule, follow_hooks(self, choice, shards, schedule))
        return known[1]

    def schedule(self, limits: Limits, persistent: frozenset[int]) -> Schedule:
        """What the coordinator does at every hook; one that would decide alike under these limits is taken again."""
        known = self._schedules.setdefault(persistent, [])
        for coordinator, schedule in known:
            if coordinator.decides_alike(limits):
                return schedule
        coordinator = Coordinator(
            self.script.fetches, limits, persistent=persistent, external=self.script.external,
            trainable=self.items.trainable,
        )  # fmt: skip
        act: dict[int, Callable[[int], tuple[Action, ...]]] = {
            Op.PRE_MODULE: coordinator.pre_module,
            Op.POST_MODULE: coordinator.post_module,
            Op.KEPT_MODULE: coordinator.kept_module,
            Op.RECOMPUTED_MODULE: coordinator.recomputed_module,
            Op.END_RECOMPUTED: lambda _: coordinator.end_recomputed(),
        }
        made = tuple(act[op](module) for op, module in self.script.calls if op in act)
        known.append((coordinator, made))
        del known[:-MOST_SCHEDULES]
        return made


def follow_hooks(of: Gathering, choice: Choice, shards: Shards, schedule: Schedule) -> Gathered:
    """Run the engine through the hooks of a step."""
    meter = Meter()
    engine = Stage3Engine(
        meter, of.items, shards, choice.zero, num_ranks=choice.batch.world_size, itemsize=of.itemsize, schedule=schedule
    )
    act: dict[int, Callable[[int], None]] = {
        Op.PRE_MODULE: engine.pre_module,
        Op.POST_MODULE: engine.post_module,
        Op.KEPT_MODULE: engine.post_module,
        Op.RECOMPUTED_MODULE: engine.recomputed_module,
        Op.END_RECOMPUTED: lambda _: engine.end_recomputed(),
        Op.READ_HEAD: lambda _: engine.read_head(of.script.head),
        Op.END_BACKWARD: lambda _: engine.end_backward(),
        Op.END_STEP: lambda _: engine.end_step(),
    }
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
