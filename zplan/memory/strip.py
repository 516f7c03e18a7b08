"""Strip: one way through a block, laid out once and repeated for each of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zplan.memory.events import Event, Step
from zplan.values import dataclass

WEIGHT, MODULE = 0, 1
Stretch = tuple[int, int]
"""Bytes that are left at its end, and the most there were, both above its start."""


@dataclass(frozen=True, slots=True)
class Strip:
    """The calls of a layer and the bytes around them, all relative: numbers to the layer's first weight and module,
    bytes to what is live at its first call."""

    before: Stretch
    """Up to the first call."""
    calls: tuple[tuple[int, int, int], ...]
    """(operation, WEIGHT or MODULE, number)."""
    moments: tuple[int, ...]
    """Of every call but the first: the most since the call before it, and what is live while it runs."""
    net: int
    """Live at the last call."""
    after: Stretch
    """From the last call on."""


def strip(steps: Iterable[Step], operation: Callable[[int, int], int | None]) -> Strip:
    """Lay out a tape's steps.

    Args:
        operation: what an event calls, from the event and the number of its weight or module; None calls nothing.
    """
    calls: list[tuple[int, int, int]] = []
    stretches: list[list[int]] = [[0, 0]]
    for event, a, b in steps:
        if event == Event.BYTES:
            net, peak = stretches[-1]
            stretches[-1] = [net + a, max(peak, net + a, net + b)]
        elif (called := operation(event, a)) is not None:
            calls.append((called, WEIGHT if event in (Event.GRADIENT, Event.MADE) else MODULE, a))
            stretches.append([0, 0])
    moments: list[int] = []
    level = 0
    for net, peak in stretches[1:-1]:
        moments += (level + peak, level + net)
        level += net
    (net, peak), (last_net, last_peak) = stretches[0], stretches[-1] if calls else (0, 0)
    return Strip((net, peak), tuple(calls), tuple(moments), level, (last_net, last_peak))
