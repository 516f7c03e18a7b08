"""What a knob may be: one of a few values, a number of elements, a share."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from zplan.values import dataclass

Value: TypeAlias = bool | int | float | str


class Suggester(Protocol):
    """The part of `optuna.Trial` that the space needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float: ...


@dataclass(frozen=True, slots=True)
class Options:
    """One of a few values."""

    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Elements:
    """A count between two bounds, searched on a logarithmic scale."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Share:
    """A fraction, in steps of a tenth from its lower bound."""

    low: float
    high: float


Range: TypeAlias = Options | Elements | Share


def ask(trial: Suggester, name: str, allowed: Range) -> Value:
    """A value of the sampler's."""
    match allowed:
        case Options(values):
            value: Value = trial.suggest_categorical(name, values)
            return value
        case Elements(low, high):
            return trial.suggest_int(name, low, high, log=True)
        case Share(low, high):
            tenths = int((high - low) * 10 + 1e-6)  # Optuna warns where the step does not end at the bound
            return round(trial.suggest_float(name, low, round(low + tenths / 10, 6), step=0.1), 6)


def is_inside(allowed: Range, value: Value) -> bool:
    """Whether the value is one that the range allows."""
    if isinstance(allowed, Options):
        return value in allowed.values
    return not isinstance(value, str) and allowed.low <= value <= allowed.high


def clamped(allowed: Range, value: Value | None) -> Value:
    """The value, or the nearest one that is allowed; of names the first."""
    match allowed:
        case Options(values):
            if value is not None and value in values:
                return value
            numbers = [item for item in values if isinstance(item, int | float)]
            if isinstance(value, int | float) and numbers:
                return min(numbers, key=lambda number: abs(number - value))
            return values[0]
        case Elements(low, high):
            return low if value is None else min(max(int(value), low), high)
        case Share(low, high):
            return high if value is None else min(max(float(value), low), high)
