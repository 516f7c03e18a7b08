"""The values that the memory model returns: terms, phases, ranges and verdicts. All bytes are ints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from zplan.values import dataclass

Phase = Literal["load", "init", "forward", "backward", "step", "save"]
PHASES: tuple[Phase, ...] = ("load", "init", "forward", "backward", "step", "save")
LimitName = Literal["available memory", "cgroup", "memlock", "/dev/shm"]
Verdict = Literal["fits", "tight", "does_not_fit"]
VERDICTS: tuple[Verdict, ...] = ("fits", "tight", "does_not_fit")
"""From good to bad."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One addend: live in `phases`; terms of one phase add up to that phase's peak."""

    name: str
    bytes: int
    phases: tuple[Phase, ...]
    formula: str
    """In plain text with the values put in."""
    source: str
    """Library, version, file:line that it mirrors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """low <= expected <= high. low: nothing wasted; high: what "fits" is judged by."""

    low: int
    expected: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuEstimate:
    """One rank's GPU, the worst rank."""

    allocated: ByteRange
    """Peak of torch.cuda.max_memory_allocated."""
    reserved: ByteRange
    """Peak of torch.cuda.max_memory_reserved."""
    used: ByteRange
    """What nvidia-smi shows: reserved + CUDA context + NCCL."""
    capacity_bytes: int
    free_bytes: int
    verdict: Verdict
    short_bytes: int
    """How much is missing by `high`; 0 when it fits."""
    phases: Mapping[Phase, int]
    """Peak allocated bytes of each phase (expected)."""
    terms: tuple[Term, ...]
    documented_bound_bytes: int | None
    """The 4.5x rule of the DeepSpeed docs; None where the docs state none."""

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: self.phases[phase])


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimit:
    """One limit of a node, and what the run needs of it."""

    name: LimitName
    needed_bytes: int
    limit_bytes: int
    fix: str
    """What to type, or to ask for."""
    is_certain: bool = True
    """False where it depends on something that nobody has looked at; then it makes the verdict tight at most."""

    @property
    def short_bytes(self) -> int:
        return max(0, self.needed_bytes - self.limit_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEstimate:
    """One node's host memory, all ranks of the node."""

    resident_bytes: int
    pinned_bytes: int
    """Part of resident."""
    phases: Mapping[Phase, int]
    terms: tuple[Term, ...]
    verdict: Verdict
    short_bytes: int
    """Of the limit that is furthest exceeded; 0 when it fits."""
    limits: tuple[HostLimit, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeEstimate:
    """Bytes on one node's NVMe."""

    bytes: int
    verdict: Verdict
    free_bytes: int | None = None
    """None: no drive is known."""

    @property
    def short_bytes(self) -> int:
        return max(0, self.bytes - (self.free_bytes or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Everything the memory model says about one configuration."""

    gpu: GpuEstimate
    host: HostEstimate
    nvme: NvmeEstimate
    notes: tuple[str, ...] = field(default=())
    """Facts that change the reading, one line each: `offload_param has no effect at stage 2`."""

    @property
    def fits(self) -> bool:
        return "does_not_fit" not in (self.gpu.verdict, self.host.verdict, self.nvme.verdict)
