"""Laps: layers that a step calls alike, so that what happens in one of them need not be followed in the next.

A replay that stands before a layer exactly as it stood before the layer ahead of it, everything counted from the layer
on, will do in it what it did there. Whether it stands so is looked at, never assumed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

from zplan.values import dataclass

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Laps:
    """One way through all layers of a block, forward or backward."""

    first: int
    """Number of the first call."""
    num_calls: int
    """Of one lap."""
    count: int
    parameters: int
    """How much further on the parameters of the next lap are; negative on the way back."""
    modules: int
    """As much for modules."""
    low: int
    """The block's first parameter, in the order of all."""
    high: int
    """Behind the block's last parameter."""

    def has(self, number: int) -> bool:
        """Whether it is a parameter of a lap."""
        return self.low <= number < self.high

    def laps_ahead(self, number: int) -> int:
        """How many laps further on the parameter is still one of these laps; none for one that is in no lap."""
        if not self.has(number):
            return 0
        room = self.high - 1 - number if self.parameters > 0 else number - self.low
        return room // abs(self.parameters)

    def moved(self, number: int, way: int) -> int:
        """The parameter as far on as that; one that is in no lap stays itself."""
        return number + way if self.low <= number < self.high else number

    def of(self, lap: int) -> slice:
        """Parameters of a lap."""
        size = abs(self.parameters)
        start = self.low + lap * size if self.parameters > 0 else self.high - (lap + 1) * size
        return slice(start, start + size)

    def from_lap_on(self, lap: int) -> slice:
        """Parameters of a lap and of those after it."""
        if self.parameters > 0:
            return slice(self.low + lap * self.parameters, self.high)
        return slice(self.low, self.high + lap * self.parameters)

    def are_alike(self, numbers: Collection[int]) -> bool:
        """Whether the same parameters of every layer are among the numbers."""
        marks = [number in numbers for number in range(self.low, self.high)]
        return marks == marks[: abs(self.parameters)] * self.count

    def stands_alike(self, before: Sequence[Value], now: Sequence[Value], lap: int) -> bool:
        """Whether values of all parameters are now, from `lap` on, what they were a lap before, from that lap on."""
        low, high, there = self.low, self.high, self.from_lap_on(lap)
        moved = slice(there.start - self.parameters, there.stop - self.parameters)
        return before[moved] == now[there] and before[:low] == now[:low] and before[high:] == now[high:]

    def move(self, values: list[Value], lap: int, skipped: int) -> None:
        """Change values of all parameters into those after `skipped` laps from `lap` on that go as the one before."""
        ahead, left = self.from_lap_on(lap + skipped), values[self.of(lap - 1)]
        way = skipped * self.parameters
        values[ahead] = values[ahead.start - way : ahead.stop - way]
        first, last = self.of(lap), self.of(lap + skipped - 1)
        values[min(first.start, last.start) : max(first.stop, last.stop)] = left * skipped


def laps_of(
    calls: Sequence[tuple[int, int]],
    starts: Sequence[int],
    of_parameter: Collection[int],
    of_nothing: int,
    *,
    parameters: int,
    modules: int,
    low: int,
) -> Laps | None:
    """The laps that begin at these calls; None where they are not called alike.

    Args:
        of_parameter: operations that name a parameter.
        of_nothing: the one that names nothing; all others name modules.
    """
    if len(starts) < 2 or not parameters:
        return None
    first, size = starts[0], starts[1] - starts[0]
    ways = dict.fromkeys(of_parameter, parameters) | {of_nothing: 0}
    one = [(op, number, ways.get(op, modules)) for op, number in calls[first : first + size]]
    for lap, start in enumerate(starts):
        moved = [(op, number + lap * way) for op, number, way in one]
        if start != first + lap * size or list(calls[start : start + size]) != moved:
            return None
    return Laps(
        first=first, num_calls=size, count=len(starts), parameters=parameters, modules=modules, low=low,
        high=low + len(starts) * abs(parameters),
    )  # fmt: skip
