"""Meter: live bytes by kind, and what was live at the largest moment since the last mark."""

from __future__ import annotations

from typing import Final


class Kind:
    """What a byte that comes and goes within a step is used for: an index, read too often for an IntEnum."""

    ACTIVATIONS: Final = 0
    LOSS: Final = 1
    GRADIENTS: Final = 2
    BUCKETS: Final = 3
    GATHERED_PARAMETERS: Final = 4
    TEMPORARIES: Final = 5


KIND_NAMES = {
    Kind.ACTIVATIONS: "activations",
    Kind.LOSS: "loss",
    Kind.GRADIENTS: "gradients",
    Kind.BUCKETS: "reduce buckets",
    Kind.GATHERED_PARAMETERS: "gathered parameters",
    Kind.TEMPORARIES: "temporaries of the engine",
}


class Meter:
    """Counts what is added and freed; remembers the composition of the largest moment since the last mark."""

    __slots__ = ("by_kind", "peak_by_kind", "peak_bytes", "total_bytes")

    def __init__(self) -> None:
        self.by_kind = [0] * len(KIND_NAMES)
        self.total_bytes = 0
        self.peak_bytes = 0
        self.peak_by_kind = tuple(self.by_kind)

    def mark(self) -> None:
        """From here on the peak is a new one, at least what is live now."""
        self.peak_bytes = self.total_bytes
        self.peak_by_kind = tuple(self.by_kind)

    def add(self, kind: int, num_bytes: int) -> None:
        """Allocate (positive) or free (negative)."""
        self.by_kind[kind] += num_bytes
        self.total_bytes += num_bytes
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes = self.total_bytes
            self.peak_by_kind = tuple(self.by_kind)

    def stretch(self, kind: int, num_bytes: int, peak_bytes: int) -> None:
        """A stretch that leaves `num_bytes` and had `peak_bytes` at most, both above its start."""
        self.touch(kind, peak_bytes)
        self.add(kind, num_bytes)

    def touch(self, kind: int, num_bytes: int) -> None:
        """Allocate and free at once: only the peak can move."""
        if self.total_bytes + num_bytes > self.peak_bytes:
            self.add(kind, num_bytes)
            self.by_kind[kind] -= num_bytes
            self.total_bytes -= num_bytes


class Gauge(Meter):
    """A meter that remembers how large the largest moment was, not what it was made of."""

    __slots__ = ()

    def mark(self) -> None:
        self.peak_bytes = self.total_bytes

    def add(self, kind: int, num_bytes: int) -> None:
        self.by_kind[kind] += num_bytes
        self.total_bytes += num_bytes
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes = self.total_bytes

    def touch(self, kind: int, num_bytes: int) -> None:
        if self.total_bytes + num_bytes > self.peak_bytes:
            self.peak_bytes = self.total_bytes + num_bytes
