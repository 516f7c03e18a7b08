"""Estimator: the memory of many choices of one model, recipe and cluster, as columns.

Each part of an estimate depends on a few fields of the choice: activations on the micro-batch, gathered parameters on
the coordinator's limits, gradients on the bucket. The functions of `estimate_memory` are asked once for each
combination of what they read (`zplan.memory.memo`), and numpy adds the parts. Not one formula is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from zplan.autotp import cut_shape
from zplan.hardware import Cluster
from zplan.memory.estimate import (
    Ranges,
    course_of,
    gpu_level,
    gpu_ranges,
    largest_of_engine,
    largest_of_model,
    phase_bytes,
    standing,
)
from zplan.memory.exchange import Exchange
from zplan.memory.gather import Parts
from zplan.memory.host import estimate_host
from zplan.memory.instances import instances
from zplan.memory.limits import not_modelled
from zplan.memory.memo import Memo
from zplan.memory.meter import Gauge
from zplan.memory.outside import outside_allocator
from zplan.memory.replay import Gradients, Replay, replay_of
from zplan.memory.script import STEP_PHASES, UPDATED, UPDATED_IN_REDUCTION, Course, Reduction, StepPhase
from zplan.memory.shards import shard, update_bytes
from zplan.memory.terms import PHASES, VERDICTS, ByteRange, Phase
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice

Ints: TypeAlias = npt.NDArray[np.int64]
Asked = TypeVar("Asked")
Row = TypeVar("Row")
MOST_KEPT = 1 << 20
MOST_ARRAYS = 2048
"""Tables of a step by call, some 40 kB each."""
CHUNK = 128
"""Sums of tables made at a time: they stay in the processor's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """One entry for every choice, in their order. Levels are indices into VERDICTS: 0 fits, 1 tight, 2 does not fit."""

    phases: dict[Phase, Ints]
    """Peak allocated bytes of each phase (expected)."""
    gpu: Ranges
    """Columns, as in GpuEstimate."""
    gpu_level: Ints
    gpu_short_bytes: Ints
    host_resident_bytes: Ints
    host_pinned_bytes: Ints
    host_level: Ints
    host_short_bytes: Ints
    nvme_bytes: Ints
    nvme_level: Ints

    @property
    def tier(self) -> Ints:
        """The worst of GPU, host and NVMe."""
        return np.maximum(np.maximum(self.gpu_level, self.host_level), self.nvme_level)


class _Table(Generic[Asked, Row]):
    """One part of the estimate: a row for every combination of what it reads."""

    def __init__(self, formula: Callable[[Asked], Row]) -> None:
        self.rows: list[Row] = []
        self._formula = formula
        self._number = Memo(self._add, most_kept=MOST_KEPT)

    def _add(self, asked: Asked) -> int:
        self.rows.append(self._formula(asked))
        return len(self.rows) - 1

    def numbers(self, questions: Sequence[Asked]) -> npt.NDArray[np.intp]:
        """The row of each question."""
        return np.fromiter(map(self._number, questions), dtype=np.intp, count=len(questions))

    def columns(self, questions: Sequence[Asked]) -> Ints:
        """Rows of numbers, turned: one array for each of the numbers."""
        numbers = self.numbers(questions)
        return np.array(self.rows, dtype=np.int64)[numbers].T


@dataclass(frozen=True, slots=True)
class _OnHost:
    """What the bytes of a host depend on."""

    choice: Choice
    rank_bytes: int
    partition_numel: int
    touched_numel: int


@dataclass(frozen=True, eq=False, slots=True)
class _Base:
    """Activations, loss and gathered parameters at the moments of a replay."""

    replay: Replay
    moments: Ints
    at_update: int
    """Beside what the end of a ZeRO-3 update gathers, which is not in the moments."""


class Estimator:
    """One model, recipe and cluster. It remembers the parts: ask one estimator again rather than a new one.

    Args:
        rank: whose GPU; None is the rank that holds most.
    """

    def __init__(self, shape: ModelShape, recipe: Recipe, cluster: Cluster, *, rank: int | None = None) -> None:
        self.shape, self.recipe, self.cluster, self.rank = shape, recipe, cluster, rank
        self.laid, self.on_cpu = layout(shape, recipe), cluster.gpu.kind == "cpu"
        self.exchange = Exchange.of(recipe, cluster)
        self._arrays: dict[int, tuple[Course | Parts, Ints]] = {}
        self._sums: dict[tuple[int, int], tuple[Course, Parts, Ints]] = {}
        self._still = _Table(self._of_rank)
        self._bases = _Table(self._base)
        self._updates = _Table(self._of_update)
        self._held: dict[Reduction, _Table[Choice, Ints]] = {}
        self._engine = _Table(self._of_engine)
        self._model = _Table(self._of_model)
        self._hosts = _Table(self._of_host)

    def estimate(self, choices: Sequence[Choice]) -> Estimates:
        """The bytes and verdicts of `estimate_memory` under the engine's bucket rule, of at least one choice."""
        *still, partition_numel, touched_numel = self._still.columns(choices)
        phases = dict(zip(PHASES, still, strict=True))
        for phase, peaks in self._peaks(choices).items():
            phases[phase] = phases[phase] + peaks
        peak = np.maximum.reduce(list(phases.values()))
        block, low, expected, high, is_whole = self._engine.columns(choices)
        largest = block + self._model.columns(choices)[0]
        outside = ByteRange(low=low, expected=expected, high=high)
        ranges = gpu_ranges(peak, largest, outside, on_cpu=self.on_cpu)
        level: Any
        short: Any
        level, short = gpu_level(ranges.used, self.cluster.gpu.free_bytes, is_whole=is_whole)
        rank_bytes = peak.tolist() if self.on_cpu else repeat(0)
        on_host = map(_OnHost, choices, rank_bytes, partition_numel.tolist(), touched_numel.tolist())
        resident, pinned, host_level, host_short, nvme, nvme_level = self._hosts.columns(list(on_host))
        return Estimates(
            phases=phases, gpu=ranges, gpu_level=level, gpu_short_bytes=short, host_resident_bytes=resident,
            host_pinned_bytes=pinned, host_level=host_level, host_short_bytes=host_short, nvme_bytes=nvme,
            nvme_level=nvme_level,
        )  # fmt: skip

    def _part(self, choice: Choice) -> tuple[ModelShape, Layout]:
        """What AutoTP leaves to one rank of the model."""
        if choice.batch.autotp_size == 1:
            return self.shape, self.laid
        shape = cut_shape(self.shape, choice.batch.autotp_size)
        return shape, layout(shape, self.recipe)

    def _of_rank(self, choice: Choice) -> tuple[int, ...]:
        still = standing(self._part(choice)[1], self.recipe, choice, self.cluster, self.rank)
        return *phase_bytes(still.terms).values(), still.partition_numel, still.node_touched_numel

    def _of_model(self, choice: Choice) -> tuple[int, ...]:
        shape, laid = self._part(choice)
        return (largest_of_model(shape, laid, self.recipe, choice),)

    def _of_engine(self, choice: Choice) -> tuple[int, ...]:
        outside = outside_allocator(choice, self.cluster)
        is_whole = not not_modelled(self.shape, self.recipe, choice, on_cpu=self.on_cpu)
        largest = largest_of_engine(self._part(choice)[1], self.recipe, choice)
        return largest, outside.low, outside.expected, outside.high, int(is_whole)

    def _of_host(self, asked: _OnHost) -> tuple[int, ...]:
        host, nvme = estimate_host(
            self._part(asked.choice)[1], self.recipe, asked.choice, self.cluster, partition_numel=asked.partition_numel,
            rank_bytes=asked.rank_bytes, touched_numel=asked.touched_numel,
        )  # fmt: skip
        level, nvme_level = VERDICTS.index(host.verdict), VERDICTS.index(nvme.verdict)
        return host.resident_bytes, host.pinned_bytes, level, host.short_bytes, nvme.bytes, nvme_level

    # -- the step ------------------------------------------------------------------------------------------------
    def _base(self, choice: Choice) -> _Base:
        shape, laid = self._part(choice)
        course = course_of(shape, self.recipe, laid, choice, on_cpu=self.on_cpu)
        replay = replay_of(
            course.script, instances(laid), self.recipe.weight_bytes, self.rank, self.exchange
        )  # fmt: skip
        if choice.zero.stage != 3:
            return _Base(replay, self._array(course), 0)
        steps = replay.gathering.parts_of(choice)
        found = [self._with_parameters(replay, course, parts) - absent for parts, absent in steps]
        return _Base(replay, np.maximum.reduce(found), course.moments[UPDATED])

    def _of_update(self, choice: Choice) -> tuple[int, ...]:
        items, ranks = instances(self._part(choice)[1]), choice.batch.zero_ranks
        if choice.zero.stage != 3:
            return (0,)
        return (update_bytes(items, shard(items, choice.zero, ranks), choice.zero, num_ranks=ranks),)

    def _with_parameters(self, replay: Replay, course: Course, parts: Parts) -> Ints:
        """The moments of the reduction, the update aside; a course meets the same parameters in many choices."""
        key = (id(course), id(parts))
        known = self._sums.get(key)
        if known is None:
            if len(self._sums) >= MOST_ARRAYS:
                self._sums.clear()
            totals = self._array(course) + self._array(parts)
            known = self._sums[key] = (course, parts, np.maximum.reduceat(totals, replay.cuts[:-1]))
        return known[2]

    def _held_by(self, replay: Replay) -> _Table[Choice, Ints]:
        reduction = replay.script.reduction
        if reduction not in self._held:
            gradients = Gradients(reduction, replay.items, replay.itemsize, self.rank, self.exchange, Gauge)
            self._held[reduction] = _Table(lambda choice: np.array(gradients.held(choice).moments, dtype=np.int64))
        return self._held[reduction]

    def _array(self, source: Course | Parts) -> Ints:
        known = self._arrays.get(id(source))
        if known is None:
            if len(self._arrays) >= MOST_ARRAYS:
                self._arrays.clear()
            made = np.array(source.moments, dtype=np.int64) if isinstance(source, Course) else _one_by_one(source)
            known = self._arrays[id(source)] = (source, made)
        return known[1]

    def _peaks(self, choices: Sequence[Choice]) -> dict[StepPhase, Ints]:
        """The largest moment of each phase of the step."""
        found = {phase: np.zeros(len(choices), dtype=np.int64) for phase in STEP_PHASES}
        numbers = self._bases.numbers(choices)
        reductions = np.array([id(base.replay.script.reduction) for base in self._bases.rows])[numbers]
        for reduction in np.unique(reductions):
            where = np.flatnonzero(reductions == reduction)
            for phase, peaks in self._peaks_of(numbers[where], [choices[index] for index in where.tolist()]).items():
                found[phase][where] = peaks
        return found

    def _peaks_of(self, bases: npt.NDArray[np.intp], choices: Sequence[Choice]) -> dict[StepPhase, Ints]:
        """Peaks of choices with the same gradients in the same order; every pair of tables is added once."""
        replay = self._bases.rows[bases[0]].replay
        held = self._held_by(replay)
        pairs, pair_of = np.unique(np.stack([bases, held.numbers(choices)]), axis=1, return_inverse=True)
        peaks: dict[StepPhase, list[Ints]] = {phase: [] for phase in STEP_PHASES}
        at_update: list[Ints] = []
        for first in range(0, pairs.shape[1], CHUNK):
            base, engine = pairs[:, first : first + CHUNK]
            totals = np.stack([self._bases.rows[number].moments for number in base])
            totals += np.stack([held.rows[number] for number in engine])
            for phase, moments in replay.phases.items():
                peaks[phase].append(totals[:, moments].max(axis=1))
            beside = [self._bases.rows[number].at_update for number in base]
            at_update.append(beside + np.array([held.rows[number][UPDATED_IN_REDUCTION] for number in engine]))
        found = {phase: np.concatenate(parts)[pair_of] for phase, parts in peaks.items()}
        updated = np.concatenate(at_update)[pair_of] + self._updates.columns(choices)[0]
        found["step"] = np.maximum(found["step"], updated)
        return found


def _one_by_one(parts: Parts) -> Ints:
    """Their moments, as an array, without the update."""
    found = []
    for part in parts:
        once, growth = np.array(part.moments, dtype=np.int64), np.arange(part.times, dtype=np.int64) * part.growth
        found.append((once + growth[:, np.newaxis]).ravel())
    moments = np.concatenate(found)
    moments[UPDATED] = 0
    return moments
