"""FormulaBackend: the closed forms of memory/ and speed/ as a TrialResult."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from zplan import __version__
from zplan.memory.many import Estimates, Estimator
from zplan.memory.terms import VERDICTS
from zplan.model_shape import ModelShape
from zplan.speed.estimate import estimate_speed
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.units import format_bytes
from zplan.zero_config import Choice

_MOST_ASKED = 4096
"""Choices that one estimator is asked before a fresh one takes over: what it keeps grows with each of them."""
_DOES_NOT_FIT = VERDICTS.index("does_not_fit")


class FormulaBackend:
    """Answers from the model's shape. It remembers the parts of its answers: ask one backend rather than a new one."""

    evidence: Literal["formula"] = "formula"

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._estimator: Estimator | None = None
        self._num_asked = 0

    def run(self, spec: TrialSpec) -> TrialResult:
        """Bytes and seconds by formula; `gpu_oom` or `host_oom` where the upper bound does not fit."""
        return self.run_all(spec, [spec.choice])[0]

    def run_all(self, spec: TrialSpec, choices: Sequence[Choice]) -> list[TrialResult]:
        """The same of many choices; what they share of buckets, limits and micro-batches is worked out once."""
        if not choices:
            return []
        memory = self._estimator_of(spec, len(choices)).estimate(choices)
        return [self._answer(spec, choice, memory, index) for index, choice in enumerate(choices)]

    def _estimator_of(self, spec: TrialSpec, num_choices: int) -> Estimator:
        known, is_full = self._estimator, self._num_asked > _MOST_ASKED
        if known is None or is_full or (known.recipe, known.cluster) != (spec.recipe, spec.cluster):
            known = self._estimator = Estimator(self.shape, spec.recipe, spec.cluster)
            self._num_asked = 0
        self._num_asked += num_choices
        return known

    def _answer(self, spec: TrialSpec, choice: Choice, memory: Estimates, index: int) -> TrialResult:
        speed = estimate_speed(self.shape, spec.recipe, choice, spec.cluster)
        outcome, message = _verdict(memory, index)
        return TrialResult(
            outcome=outcome,
            evidence="formula",
            message=message,
            gpu_allocated_bytes=_row(memory.gpu.allocated.expected, index),
            gpu_reserved_bytes=_row(memory.gpu.reserved.expected, index),
            gpu_used_bytes=_row(memory.gpu.used.expected, index),
            host_resident_bytes=_row(memory.host_resident_bytes, index),
            host_pinned_bytes=_row(memory.host_pinned_bytes, index),
            phases={str(phase): _row(peaks, index) for phase, peaks in memory.phases.items()},
            step_seconds=speed.step_seconds,
            tokens_per_second=speed.tokens_per_second,
            versions={"zplan": __version__},
        )


def _row(column: Any, index: int) -> int:
    """One number of a column; ranges of many choices are typed as those of one."""
    return int(np.asarray(column)[index])


def _verdict(memory: Estimates, index: int) -> tuple[Outcome, str]:
    if memory.gpu_level[index] == _DOES_NOT_FIT:
        return Outcome.GPU_OOM, f"GPU memory is short by {format_bytes(_row(memory.gpu_short_bytes, index))}"
    if memory.host_level[index] == _DOES_NOT_FIT:
        return Outcome.HOST_OOM, f"host memory is short by {format_bytes(_row(memory.host_short_bytes, index))}"
    if memory.nvme_level[index] == _DOES_NOT_FIT:
        return Outcome.BAD_CONFIG, f"NVMe is too small for {format_bytes(_row(memory.nvme_bytes, index))}"
    return Outcome.OK, ""
