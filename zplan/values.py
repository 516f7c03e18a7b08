"""`dataclass`, cheap to define: a command defines a hundred of them before it answers, and the standard decorator
compiles up to seven methods for each, half a millisecond a class.

Here a method is compiled when it is first called. What comes out is a standard dataclass to `dataclasses.fields`,
`replace`, `asdict`, to pydantic and to type checkers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

_FROM_FACTORY = object()
"""Default of a parameter whose value is made anew for every instance."""
_Fields = tuple[dataclasses.Field[Any], ...]
_Source = Callable[[type, _Fields, dict[str, Any]], str]
"""The text of a method of a class with these fields; names that it uses are put into the dict."""


def _dataclass(
    cls: type | None = None, /, *, frozen: bool = False, slots: bool = False, kw_only: bool = False, eq: bool = True
) -> Any:
    """`dataclasses.dataclass` with the flags that zplan uses; they mean the same."""

    def define(cls: type) -> type:
        made: type = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots, kw_only=kw_only)(cls)
        _compile_late(made, "__init__", _init_frozen if frozen else _init)
        if eq:
            _compile_late(made, "__eq__", _eq)
            _compile_late(made, "__hash__", _hash) if frozen else _add(made, "__hash__", None)
        for name, method in (_FROZEN if frozen else _ALWAYS).items():
            _add(made, name, method)
        return made

    return define if cls is None else define(cls)


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    dataclass = _dataclass


def _add(cls: type, name: str, method: Any) -> None:
    """What the class itself defines stays. (Python sets `__hash__` to None where it defines `__eq__`.)"""
    if cls.__dict__.get(name) is None:
        setattr(cls, name, method)


def _compile_late(cls: type, name: str, source: _Source) -> None:
    """Puts a method in place that compiles the real one, which then takes its place."""

    def first_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names: dict[str, Any] = {}
        exec(source(cls, dataclasses.fields(cls), names), names)
        method = names[name]
        method.__qualname__ = f"{cls.__qualname__}.{name}"
        setattr(cls, name, method)
        return method(self, *args, **kwargs)

    _add(cls, name, first_call)


def _init(cls: type, fields: _Fields, names: dict[str, Any], store: str = "self.{0} = {1}") -> str:
    """`def __init__(self, first, *, second=default): ...`"""
    positional, by_name, body = ["self"], ["*"], []
    for item in fields:
        value = parameter = item.name
        default = f"_default_{item.name}"
        if item.default_factory is not dataclasses.MISSING:
            names |= {default: item.default_factory, "_FROM_FACTORY": _FROM_FACTORY}
            value = f"{default}() if {item.name} is _FROM_FACTORY else {item.name}" if item.init else f"{default}()"
            parameter += "=_FROM_FACTORY"
        elif item.default is not dataclasses.MISSING:
            names[default] = item.default
            value = item.name if item.init else default
            parameter += f"={default}"
        elif not item.init:
            continue  # `__post_init__` fills it
        if item.init:
            (by_name if item.kw_only else positional).append(parameter)
        body.append(store.format(item.name, value))
    if hasattr(cls, "__post_init__"):
        body.append("self.__post_init__()")
    parameters = positional + (by_name if len(by_name) > 1 else [])
    return f"def __init__({', '.join(parameters)}):\n " + "\n ".join(body or ["pass"])


def _init_frozen(cls: type, fields: _Fields, names: dict[str, Any]) -> str:
    """As `_init`, around `__setattr__`: through the slot where there is one."""
    slots = {f"_set_{item.name}": getattr(getattr(cls, item.name, None), "__set__", None) for item in fields}
    if None not in slots.values():
        names |= slots
        return _init(cls, fields, names, "_set_{0}(self, {1})")
    names["_set"] = object.__setattr__
    return _init(cls, fields, names, "_set(self, '{0}', {1})")


def _key(fields: _Fields, owner: str) -> str:
    return "(" + "".join(f"{owner}.{item.name}, " for item in fields if item.compare) + ")"


def _eq(_cls: type, fields: _Fields, _names: dict[str, Any]) -> str:
    lines = [
        "def __eq__(self, other):",
        " if other.__class__ is not self.__class__:",
        "  return NotImplemented",
        f" return {_key(fields, 'self')} == {_key(fields, 'other')}",
    ]
    return "\n".join(lines)


def _hash(_cls: type, fields: _Fields, _names: dict[str, Any]) -> str:
    return f"def __hash__(self):\n return hash({_key(fields, 'self')})"


def _repr(self: Any) -> str:
    values = (f"{item.name}={getattr(self, item.name)!r}" for item in dataclasses.fields(self) if item.repr)
    return f"{type(self).__qualname__}({', '.join(values)})"


def _refuse_set(_self: Any, name: str, _value: Any) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(_self: Any, name: str) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _set_state(self: Any, state: Any) -> None:
    """For pickle, which else would assign: the state is the instance's dict, its slots, or both."""
    for part in state if isinstance(state, tuple) else (state,):
        for name, value in (part or {}).items():
            object.__setattr__(self, name, value)


_ALWAYS: dict[str, Any] = {"__repr__": _repr}
_FROZEN = {**_ALWAYS, "__setattr__": _refuse_set, "__delattr__": _refuse_delete, "__setstate__": _set_state}
