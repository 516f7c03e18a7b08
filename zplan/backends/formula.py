"""FormulaBackend: the closed forms of memory/ and speed/ as a TrialResult."""

from __future__ import annotations

from typing import Literal

from zplan import __version__
from zplan.memory.estimate import estimate_memory
from zplan.memory.terms import MemoryEstimate
from zplan.model_shape import ModelShape
from zplan.speed.estimate import estimate_speed
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.units import format_bytes


class FormulaBackend:
    """Answers from the model's shape, in under a millisecond per configuration."""

    evidence: Literal["formula"] = "formula"

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape

    def run(self, spec: TrialSpec) -> TrialResult:
        """Bytes and seconds by formula; `gpu_oom` or `host_oom` where the upper bound does not fit."""
        memory = estimate_memory(self.shape, spec.recipe, spec.choice, spec.cluster)
        speed = estimate_speed(self.shape, spec.recipe, spec.choice, spec.cluster)
        outcome, message = _verdict(memory)
        return TrialResult(
            outcome=outcome,
            evidence="formula",
            message=message,
            gpu_allocated_bytes=memory.gpu.allocated.expected,
            gpu_reserved_bytes=memory.gpu.reserved.expected,
            gpu_used_bytes=memory.gpu.used.expected,
            host_resident_bytes=memory.host.resident_bytes,
            host_pinned_bytes=memory.host.pinned_bytes,
            phases={str(phase): size for phase, size in memory.gpu.phases.items()},
            step_seconds=speed.step_seconds,
            tokens_per_second=speed.tokens_per_second,
            versions={"zplan": __version__},
        )


def _verdict(memory: MemoryEstimate) -> tuple[Outcome, str]:
    if memory.gpu.verdict == "does_not_fit":
        return Outcome.GPU_OOM, f"GPU memory is short by {format_bytes(memory.gpu.short_bytes)}"
    if memory.host.verdict == "does_not_fit":
        return Outcome.HOST_OOM, f"host memory is short by {format_bytes(memory.host.short_bytes)}"
    if memory.nvme.verdict == "does_not_fit":
        return Outcome.BAD_CONFIG, f"NVMe is too small for {format_bytes(memory.nvme.bytes)}"
    return Outcome.OK, ""
