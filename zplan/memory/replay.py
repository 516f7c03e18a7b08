"""One optimizer step of one rank: what the engine of the stage holds at each call of a course, added to the course.

The engine's bytes are traced once for each script and ZeRO configuration; a longer sequence or another micro-batch
changes only the course's bytes. What is live at the same call is added, nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import add
from typing import Protocol

from zplan.memory.coordinator import Action, Coordinator, Schedule
from zplan.memory.course import STEP_PHASES, Call, Course, Kinds, Op, Script, StepPhase
from zplan.memory.instances import Instances
from zplan.memory.meter import Meter
from zplan.memory.stage0 import Stage0Engine
from zplan.memory.stage3 import Shards, Stage3Engine
from zplan.memory.stage12 import Partitions, Stage12Engine
from zplan.zero_config import Choice, ZeroConfig


class Engine(Protocol):
    """What a step asks of a stage."""

    def begin_micro_step(self) -> None: ...
    def pre_module(self, module: int) -> None: ...
    def post_module(self, module: int) -> None: ...
    def recomputed_module(self, module: int) -> None: ...
    def end_recomputed(self) -> None: ...
    def read_head(self, numbers: tuple[int, ...]) -> None: ...
    def gradient(self, number: int) -> None: ...
    def end_backward(self) -> None: ...
    def step(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One phase: bytes that the engine holds before each call, and at most while it runs."""

    before: tuple[int, ...]
    before_kinds: tuple[Kinds, ...]
    during: tuple[int, ...]
    during_kinds: tuple[Kinds, ...]


Trace = Mapping[StepPhase, Held]
_TRACES: dict[tuple[object, ...], tuple[Script, Instances, Trace]] = {}
_SCHEDULES: dict[tuple[object, ...], tuple[Script, Schedule]] = {}
MOST_KEPT = 4096


def step_peaks(
    course: Course, items: Instances, choice: Choice, cut: Partitions | None, shards: Shards | None, *, itemsize: int
) -> dict[StepPhase, Kinds]:
    """Bytes by kind at the largest moment of each phase of a step.

    Args:
        cut: partitions of stages 1 and 2, None elsewhere.
        shards: partitions of stage 3, None elsewhere.
        itemsize: bytes of one element of the training dtype.
    """
    trace = _trace(course.script, items, choice, cut, shards, itemsize)
    return {phase: _peak(course, trace, phase) for phase in STEP_PHASES}


def _peak(course: Course, trace: Trace, phase: StepPhase) -> Kinds:
    outside, held = course.stretches[phase], trace[phase]
    between = list(map(add, outside.peaks, held.before))
    within = list(map(add, outside.levels, held.during))
    most_between, most_within = max(between), max(within)
    if most_between >= most_within:
        index = between.index(most_between)
        return tuple(map(add, outside.peak_kinds[index], held.before_kinds[index]))
    index = within.index(most_within)
    return tuple(map(add, outside.level_kinds[index], held.during_kinds[index]))


def _trace(
    script: Script,
    items: Instances,
    choice: Choice,
    cut: Partitions | None,
    shards: Shards | None,
    itemsize: int,
) -> Trace:
    partial = choice.batch.gradient_accumulation_steps > 1
    rank = cut.rank if cut is not None else 0
    key = (id(script), id(items), choice.zero, choice.batch.world_size, partial, rank, itemsize)
    known = _TRACES.get(key)
    if known is not None and known[0] is script and known[1] is items:
        return known[2]
    meter = Meter()
    engine = _engine(script, items, choice.zero, cut, shards, meter, choice.batch.world_size, partial, itemsize)
    made = {phase: _follow(engine, meter, script, script.calls[phase]) for phase in STEP_PHASES}
    if len(_TRACES) >= MOST_KEPT:
        _TRACES.clear()
    _TRACES[key] = (script, items, made)
    return made


def _follow(engine: Engine, meter: Meter, script: Script, calls: tuple[Call, ...]) -> Held:
    """Run the engine through the calls of one phase."""
    act: dict[int, Callable[[int], None]] = {
        Op.PRE_MODULE: engine.pre_module,
        Op.POST_MODULE: engine.post_module,
        Op.GRADIENT: engine.gradient,
        Op.BEGIN: lambda _: engine.begin_micro_step(),
        Op.END_BACKWARD: lambda _: engine.end_backward(),
        Op.STEP: lambda _: engine.step(),
        Op.NOTHING: lambda _: None,
        Op.READ_HEAD: lambda _: engine.read_head(script.head),
        Op.RECOMPUTED_MODULE: engine.recomputed_module,
        Op.END_RECOMPUTED: lambda _: engine.end_recomputed(),
    }
    before: list[int] = []
    before_kinds: list[Kinds] = []
    during: list[int] = []
    during_kinds: list[Kinds] = []
    for op, number in calls:
        meter.mark()
        before.append(meter.peak_bytes)
        before_kinds.append(meter.peak_by_kind)
        act[op](number)
        during.append(meter.peak_bytes)
        during_kinds.append(meter.peak_by_kind)
    return Held(
        before=tuple(before),
        before_kinds=tuple(before_kinds),
        during=tuple(during),
        during_kinds=tuple(during_kinds),
    )


def _engine(
    script: Script,
    items: Instances,
    zero: ZeroConfig,
    cut: Partitions | None,
    shards: Shards | None,
    meter: Meter,
    num_ranks: int,
    partial: bool,
    itemsize: int,
) -> Engine:
    """The engine of the configured stage."""
    if shards is not None:
        return Stage3Engine(
            meter,
            items,
            shards,
            zero,
            num_ranks=num_ranks,
            itemsize=itemsize,
            schedule=_schedule(script, items, zero, shards.persistent),
        )
    if cut is not None:
        return Stage12Engine(meter, items, cut, zero, itemsize=itemsize, partial=partial)
    return Stage0Engine(meter, items, itemsize=itemsize, num_ranks=num_ranks, partial=partial)


def _schedule(script: Script, items: Instances, zero: ZeroConfig, persistent: frozenset[int]) -> Schedule:
    """What the coordinator does at every hook of the script."""
    key = (
        id(script), persistent, zero.stage3_prefetch_bucket_size, zero.stage3_max_live_parameters,
        zero.stage3_max_reuse_distance, zero.stage3_allgather_sequential,
    )  # fmt: skip
    known = _SCHEDULES.get(key)
    if known is not None and known[0] is script:
        return known[1]
    coordinator = Coordinator(
        script.fetches, zero, persistent=persistent, external=script.external, trainable=items.trainable
    )
    act: dict[int, Callable[[int], tuple[Action, ...]]] = {
        Op.PRE_MODULE: coordinator.pre_module,
        Op.POST_MODULE: coordinator.post_module,
        Op.RECOMPUTED_MODULE: coordinator.recomputed_module,
        Op.END_RECOMPUTED: lambda _: coordinator.end_recomputed(),
    }
    calls = (call for phase in STEP_PHASES for call in script.calls[phase])
    made = tuple(act[op](module) for op, module in calls if op in act)
    if len(_SCHEDULES) >= MOST_KEPT:
        _SCHEDULES.clear()
    _SCHEDULES[key] = (script, made)
    return made
