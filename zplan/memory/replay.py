"""One optimizer step of one rank: three tables of bytes over the same calls, added; the largest moment of each phase.

    outside   activations and loss        model, micro-batch, recomputation        zplan.memory.course
    gathered  parameters of ZeRO-3        coordinator's limits, world size         zplan.memory.gather
    held      gradients and buckets       bucket sizes, stage, world size          here

What is live at the same call is added, nothing else is. Gradients move at a few of the calls only, so the other two
are added first, and between those calls only their largest moment is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from functools import cached_property, reduce
from itertools import chain, pairwise
from operator import add, itemgetter
from typing import Protocol

from zplan.memory.bf16_optimizer import Bf16Engine, is_dealt, takes_bf16_optimizer
from zplan.memory.earlier import Earlier, can_hold_more
from zplan.memory.exchange import PLAIN, Exchange
from zplan.memory.gather import Gathering, Parts, Steps, one_by_one
from zplan.memory.instances import Instances
from zplan.memory.memo import Kept, Memo
from zplan.memory.meter import Kind, Meter
from zplan.memory.muon import Precision, precision
from zplan.memory.script import (
    STEP_PHASES,
    UPDATED,
    UPDATED_IN_REDUCTION,
    Call,
    Course,
    Kinds,
    Op,
    Reduction,
    Script,
    StepPhase,
)
from zplan.memory.shards import shard
from zplan.memory.stage0 import Stage0Engine
from zplan.memory.stage3 import Stage3Engine
from zplan.memory.stage12 import Stage12Engine, partition, worst_ranks
from zplan.memory.stage12_fp32 import Stage1InFp32, Stage2InFp32
from zplan.memory.sub_groups import swapped_parameters
from zplan.values import dataclass
from zplan.zero_config import Choice, ZeroConfig

MOST_KEPT = 512


class Engine(Protocol):
    """What the gradients of a step ask of a stage."""

    def begin_micro_step(self) -> None: ...
    def gradient(self, number: int) -> None: ...
    def end_backward(self) -> None: ...
    def step(self) -> None: ...


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """What the engine holds for gradients, in the order of a course's moments but for the calls of a reduction only."""

    moments: tuple[int, ...]
    kinds: tuple[Kinds, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Sum:
    """A course of ZeRO-3 with the parameters that one step of a run gathers, but for the end of the update."""

    moments: Sequence[int]
    """Of the reduction: all but what the gradients hold."""
    totals: Sequence[int]
    """The same of the script."""


@dataclass(frozen=True, eq=False, slots=True)
class _Base:
    """The most of the steps that a run has."""

    moments: Sequence[int]
    """Of the reduction."""
    sums: tuple[tuple[_Sum, int], ...]
    """Of each step, and bytes that it does not hold yet."""
    at_update: int
    """At the end of the update."""


@dataclass(eq=False)
class Replay:
    """One script on one set of parameters in one dtype, and what was asked about it.

    Args:
        rank: whose bytes to count; None is the rank that holds most.
    """

    script: Script
    items: Instances
    itemsize: int
    rank: int | None
    exchange: Exchange = PLAIN
    held: Memo[Choice, Held] = field(init=False)
    gathering: Gathering = field(init=False)
    gathered: Memo[Choice, Steps] = field(init=False)
    _bases: Kept[tuple[int, int], tuple[Course, Steps, _Base]] = field(default_factory=lambda: Kept(MOST_KEPT))
    _sums: Kept[tuple[int, int], tuple[Course, Parts, _Sum]] = field(default_factory=lambda: Kept(MOST_KEPT))

    def __post_init__(self) -> None:
        self.held = held_by(self.script.reduction, self.items, self.itemsize, self.rank, self.exchange)
        self.gathering = Gathering(self.script, self.items, self.itemsize, self.exchange)
        self.gathered = Memo(self.gathering.steps_of, most_kept=MOST_KEPT)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Which moments of the script each moment of its reduction stands for: cuts[i] up to cuts[i + 1].

        Even ones reach from the call before to this call, hooks in between included; odd ones are the call itself.
        """
        return (0, *chain.from_iterable((2 * number + 1, 2 * number + 2) for number in self.script.kept))

    @property
    def phases(self) -> dict[StepPhase, slice]:
        """Moments of the reduction by phase."""
        firsts = (*(2 * first for first in self.script.reduction.phases), 2 * len(self.script.reduction.calls))
        return {phase: slice(*ends) for phase, ends in zip(STEP_PHASES, pairwise(firsts), strict=True)}

    def peaks(self, course: Course, choice: Choice) -> dict[StepPhase, Kinds]:
        """Bytes by kind at the largest moment of each phase."""
        base = self._most(course, self.gathered(choice)) if choice.zero.stage == 3 else None
        held = self.held(choice)
        outside = course.moments if base is None else base.moments
        totals = list(map(add, outside, held.moments))
        found: dict[StepPhase, Kinds] = {}
        for phase, moments in self.phases.items():
            index = totals.index(max(totals[moments]), moments.start)
            found[phase] = tuple(map(add, self._kinds(course, base, index), held.kinds[index]))
        return found

    def _most(self, course: Course, steps: Steps) -> _Base:
        """Activations, loss and gathered parameters of a course of ZeRO-3."""
        key = (id(course), id(steps))
        known = self._bases.get(key)
        if known is None:
            sums = tuple((self._sum(course, gathered.parts), absent) for gathered, absent in steps)
            there = [[most - absent for most in one.moments] if absent else one.moments for one, absent in sums]
            moments = list(map(max, *there)) if len(there) > 1 else list(there[0])
            at_update = course.moments[UPDATED] + max(gathered.update_bytes - absent for gathered, absent in steps)
            moments[UPDATED_IN_REDUCTION] = max(moments[UPDATED_IN_REDUCTION], at_update)
            known = self._bases.keep(key, (course, steps, _Base(moments, sums, at_update)))
        return known[2]

    def _sum(self, course: Course, parts: Parts) -> _Sum:
        """Parameters that choices have in common are added once."""
        key = (id(course), id(parts))
        known = self._sums.get(key)
        if known is None:
            totals = list(map(add, course.moments, one_by_one(parts)))
            moments = [max(totals[first:end]) for first, end in pairwise(self.cuts)]
            known = self._sums.keep(key, (course, parts, _Sum(moments, totals)))
        return known[2]

    def _kinds(self, course: Course, base: _Base | None, index: int) -> Kinds:
        """What the bytes of a moment of the reduction are, outside the reduction."""
        if base is None:
            return course.kinds(index)
        most, first = base.moments[index], self.cuts[index]
        found = [one.totals.index(most + less, first) for one, less in base.sums if one.moments[index] == most + less]
        if index == len(base.moments) + UPDATED_IN_REDUCTION and base.at_update == most:
            found.append(len(course.moments) + UPDATED)
        moment = min(found)
        kinds = list(course.kinds(moment))
        kinds[Kind.GATHERED_PARAMETERS] += most - course.moments[moment]
        return tuple(kinds)


_REPLAYS: Kept[tuple[object, ...], tuple[Script, Replay]] = Kept(MOST_KEPT)
_HELD: Kept[tuple[object, ...], tuple[Reduction, Memo[Choice, Held]]] = Kept(MOST_KEPT)


def replay_of(script: Script, items: Instances, itemsize: int, rank: int | None, exchange: Exchange = PLAIN) -> Replay:
    """The replay of a script; kept, because a search asks about one model again and again."""
    key = (id(script), itemsize, rank, exchange)
    known = _REPLAYS.get(key)
    if known is None or known[0] is not script:
        known = _REPLAYS.keep(key, (script, Replay(script, items, itemsize, rank, exchange)))
    return known[1]


def held_by(
    reduction: Reduction, items: Instances, itemsize: int, rank: int | None, exchange: Exchange
) -> Memo[Choice, Held]:
    """What the engine holds for gradients, by what it reads of a choice."""
    key = (id(reduction), itemsize, rank, exchange)
    known = _HELD.get(key)
    if known is None or known[0] is not reduction:
        gradients = Gradients(reduction, items, itemsize, rank, exchange)
        known = _HELD.keep(key, (reduction, Memo(gradients.held, most_kept=MOST_KEPT)))
    return known[1]


@dataclass(frozen=True, slots=True)
class _Swapping:
    """A choice of ZeRO-3 as its backward sees it: sub-groups matter by what they swap, the update reads the rest."""

    choice: Choice
    swapped: frozenset[int]


@dataclass(eq=False)
class Gradients:
    """The engine, run through the gradients of a step.

    Args:
        rank: whose bytes to count; None is the rank that holds most.
        meter: what counts them.
    """

    reduction: Reduction
    items: Instances
    itemsize: int
    rank: int | None
    exchange: Exchange
    meter: Callable[[], Meter] = Meter
    _backward: Memo[_Swapping, tuple[Held, Kinds]] = field(init=False)

    def __post_init__(self) -> None:
        self._backward = Memo(self._until_update, most_kept=MOST_KEPT)

    def held(self, choice: Choice) -> Held:
        """What a choice holds. All that ZeRO-3's update needs of its backward is what that leaves behind."""
        if choice.zero.stage != 3:
            return self._below_3(choice)
        swapped = swapped_parameters(self.items, choice.zero, choice.batch.zero_ranks)
        before, left = self._backward(_Swapping(choice, swapped))
        meter = self.meter()
        for kind, num_bytes in enumerate(left):
            meter.add(kind, num_bytes)
        update = _follow(meter, self._stage3(meter, choice, swapped), self.reduction.calls[self._update :])
        return Held(before.moments + update.moments, before.kinds + update.kinds)

    def _below_3(self, choice: Choice) -> Held:
        """Of the rank, or of those one of which holds most; the most at each moment."""
        held = [self._below_3_of(rank, choice) for rank in self._ranks(choice)]
        return reduce(_larger, held)

    def _ranks(self, choice: Choice) -> tuple[int | None, ...]:
        if self.rank is not None or choice.zero.stage == 0:
            return (self.rank,)
        exchange, _ = self._exchanged(choice)
        dealt = is_dealt(choice.zero, exchange, self._of_muon.gradient)
        return worst_ranks(self.items, choice.batch.zero_ranks, dealt=dealt)

    def _below_3_of(self, rank: int | None, choice: Choice) -> Held:
        """Of the last micro-step, or of one before it where that holds more."""
        meter, calls = self.meter(), self.reduction.calls
        held = _follow(meter, self._engine(meter, choice, rank), calls)
        if choice.batch.gradient_accumulation_steps == 1 or not can_hold_more(choice.zero):
            return held
        meter = self.meter()
        engine = self._engine(meter, choice, rank, is_last=False)
        return _larger(held, _follow(meter, Earlier(engine), calls)) if isinstance(engine, Stage12Engine) else held

    @property
    def _update(self) -> int:
        """Number of the first call of the update."""
        return self.reduction.phases[STEP_PHASES.index("step")]

    def _until_update(self, asked: _Swapping) -> tuple[Held, Kinds]:
        """What is held, and what is left of it at the end."""
        meter = self.meter()
        engine = self._stage3(meter, asked.choice, asked.swapped)
        return _follow(meter, engine, self.reduction.calls[: self._update]), tuple(meter.by_kind)

    @cached_property
    def _of_muon(self) -> Precision:
        """The gradients of every engine have the dtype of Muon's."""
        return precision(self.itemsize, in_fp16=self.items.in_fp16, on_cpu=self.reduction.on_cpu)

    def _exchanged(self, choice: Choice) -> tuple[Exchange, int]:
        """How this batch exchanges gradients, and bytes of an element that is communicated."""
        exchange = self.exchange.for_batch(choice.batch, self._of_muon.gradient)
        return exchange, exchange.communicated_bytes(self._of_muon.gradient)

    def _stage3(self, meter: Meter, choice: Choice, swapped: frozenset[int]) -> Stage3Engine:
        ranks, (exchange, reduced) = choice.batch.zero_ranks, self._exchanged(choice)
        # gradients are cut alike whether their parameter persists or not
        shards = shard(self.items, ZeroConfig(), ranks)
        return Stage3Engine(
            meter, self.items, shards, choice.zero, num_ranks=ranks, itemsize=self._of_muon.gradient, reduced=reduced,
            exchange=exchange, of_muon=self._of_muon, swapped=swapped,
        )  # fmt: skip

    def _engine(self, meter: Meter, choice: Choice, rank: int | None, *, is_last: bool = True) -> Engine:
        """The engine of the configured stage below 3.

        Args:
            is_last: in the last micro-step, not in the one before it.
        """
        items, zero, ranks, of_muon = self.items, choice.zero, choice.batch.zero_ranks, self._of_muon
        itemsize, (exchange, reduced) = of_muon.gradient, self._exchanged(choice)
        partial = choice.batch.gradient_accumulation_steps > 1 + (not is_last)
        if zero.stage:
            cut = partition(items, ranks, rank, dealt=is_dealt(zero, exchange, itemsize))
            if takes_bf16_optimizer(zero, exchange, itemsize):
                return Bf16Engine(meter, items, cut, itemsize=itemsize, reduced=reduced, partial=partial)
            in_fp32 = Stage1InFp32 if zero.stage == 1 else Stage2InFp32
            of_stage = in_fp32 if exchange.accumulated == "fp32" and not items.muon else Stage12Engine
            return of_stage(
                meter, items, cut, zero, itemsize=itemsize, reduced=reduced, partial=partial, num_ranks=ranks,
                of_muon=of_muon, exchange=exchange, is_last=is_last,
            )  # fmt: skip
        return Stage0Engine(
            meter, items, itemsize=itemsize, reduced=reduced, partial=partial, of_muon=of_muon, exchange=exchange
        )


def _larger(one: Held, other: Held) -> Held:
    """Moment by moment."""
    pairs = zip(zip(one.moments, one.kinds, strict=True), zip(other.moments, other.kinds, strict=True), strict=True)
    moments, kinds = zip(*(max(pair, key=itemgetter(0)) for pair in pairs), strict=True)
    return Held(moments, kinds)


def _follow(meter: Meter, engine: Engine, calls: Sequence[Call]) -> Held:
    """Run the engine through calls in a row."""
    act: dict[int, Callable[[int], None]] = {
        Op.NOTHING: lambda _: None,
        Op.BEGIN: lambda _: engine.begin_micro_step(),
        Op.GRADIENT: engine.gradient,
        Op.END_BACKWARD: lambda _: engine.end_backward(),
        Op.STEP: lambda _: engine.step(),
    }
    moments: list[int] = []
    kinds: list[Kinds] = []
    for op, number in calls:
        meter.mark()
        moments.append(meter.peak_bytes)
        kinds.append(meter.peak_by_kind)
        act[op](number)
        moments.append(meter.peak_bytes)
        kinds.append(meter.peak_by_kind)
    return Held(tuple(moments), tuple(kinds))
