"""The limits of ZeRO-3's parameter coordinator, and between which values another limit would decide alike."""

from __future__ import annotations

import sys

from zplan.values import dataclass
from zplan.zero_config import ZeroConfig


@dataclass(slots=True)
class Bounds:
    """Values of a limit with which every comparison would have come out as it did: low < limit <= high."""

    low: int = -1
    high: int = sys.maxsize

    def above(self, number: int) -> None:
        """The limit was above the number."""
        if number > self.low:
            self.low = number

    def not_above(self, number: int) -> None:
        """It was not."""
        if number < self.high:
            self.high = number

    def include(self, other: Bounds) -> None:
        """Its comparisons as well."""
        self.above(other.low)
        self.not_above(other.high)

    def __contains__(self, limit: int) -> bool:
        return self.low < limit <= self.high


@dataclass(frozen=True, slots=True)
class Limits:
    """The three numbers that decide what a coordinator does, in elements."""

    prefetch: int
    live: int
    reuse: int

    @classmethod
    def of(cls, zero: ZeroConfig) -> Limits:
        """One parameter at a time is prefetched under stage3_allgather_sequential."""
        return cls(
            prefetch=1 if zero.stage3_allgather_sequential else zero.stage3_prefetch_bucket_size,
            live=zero.stage3_max_live_parameters,
            reuse=zero.stage3_max_reuse_distance,
        )


NO_TRACE = Limits(prefetch=0, live=0, reuse=0)
"""Of the first micro-step: what comes next is not known."""
