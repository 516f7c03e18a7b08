"""Meter: live bytes by kind while a step is replayed, and what was live at each phase's peak."""

from __future__ import annotations

from enum import IntEnum

from zplan.memory.terms import Phase


class Kind(IntEnum):
    """What a byte that comes and goes within a step is used for."""

    ACTIVATIONS = 0
    LOSS = 1
    GRADIENTS = 2
    BUCKETS = 3
    GATHERED_PARAMETERS = 4
    TEMPORARIES = 5


KIND_NAMES = {
    Kind.ACTIVATIONS: "activations",
    Kind.LOSS: "loss",
    Kind.GRADIENTS: "gradients",
    Kind.BUCKETS: "reduce buckets",
    Kind.GATHERED_PARAMETERS: "gathered parameters",
    Kind.TEMPORARIES: "temporaries of the engine",
}


class Meter:
    """Counts what the replay adds and frees; remembers the composition of the largest moment of the current phase."""

    __slots__ = ("_phase", "by_kind", "peak_by_kind", "peak_bytes", "peaks", "total_bytes")

    def __init__(self) -> None:
        self.by_kind = [0] * len(Kind)
        self.total_bytes = 0
        self.peak_bytes = 0
        self.peak_by_kind = tuple(self.by_kind)
        self.peaks: dict[Phase, tuple[int, ...]] = {}
        self._phase: Phase = "forward"

    def start(self, phase: Phase) -> None:
        """Close the running phase and begin another, from what is live now."""
        self.close()
        self._phase = phase
        self.peak_bytes = self.total_bytes
        self.peak_by_kind = tuple(self.by_kind)

    def close(self) -> None:
        """Keep the running phase's peak (the larger one if the phase ran before)."""
        known = self.peaks.get(self._phase)
        if known is None or sum(known) < self.peak_bytes:
            self.peaks[self._phase] = self.peak_by_kind

    def add(self, kind: int, num_bytes: int) -> None:
        """Allocate (positive) or free (negative)."""
        self.by_kind[kind] += num_bytes
        self.total_bytes += num_bytes
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes = self.total_bytes
            self.peak_by_kind = tuple(self.by_kind)

    def touch(self, kind: int, num_bytes: int) -> None:
        """Allocate and free at once: only the peak can move."""
        if self.total_bytes + num_bytes > self.peak_bytes:
            self.add(kind, num_bytes)
            self.by_kind[kind] -= num_bytes
            self.total_bytes -= num_bytes
