"""`dataclass`, cheap to define: a command defines a hundred of them before it answers, and the standard decorator
compiles up to seven methods for each, half a millisecond a class.

Here only `__init__` is compiled, and only when it was called a few times: most classes of a command are not. What comes
out is a standard dataclass to `dataclasses.fields`, `replace`, `asdict`, to pydantic and to type checkers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

_FROM_FACTORY = object()
"""Default of a parameter whose value is made anew for every instance."""
_NO_FIELDS = ("ClassVar", "InitVar", "KW_ONLY")
_FEW_CALLS = 16
"""To compile takes 0.2 ms, about as much as so many calls take more."""
_Fields = tuple[dataclasses.Field[Any], ...]


def _dataclass(
    cls: type | None = None, /, *, frozen: bool = False, slots: bool = False, kw_only: bool = False, eq: bool = True
) -> Any:
    """`dataclasses.dataclass` with the flags that zplan uses; they mean the same."""

    def define(cls: type) -> type:
        made = _with_fields(cls, slots=slots, kw_only=kw_only)
        _add(made, "__init__", _first_init(made, frozen=frozen))
        if eq:
            key = _key(made)
            _add(made, "__eq__", _eq(key))
            _add(made, "__hash__", _hash(key) if frozen else None)
        for name, method in (_FROZEN if frozen else _ALWAYS).items():
            _add(made, name, method)
        return made

    return define if cls is None else define(cls)


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    dataclass = _dataclass


def _with_fields(cls: type, *, slots: bool, kw_only: bool) -> type:
    """A dataclass without methods. The text of an annotation is put in place afterwards: the standard decorator looks
    in every one of them for what is no field, more than half of its time, and values have fields only.
    """
    annotations = inspect.get_annotations(cls)
    text = " ".join(map(str, annotations.values()))
    assert not any(name in text for name in _NO_FIELDS), f"{cls.__qualname__}: no {', '.join(_NO_FIELDS)}"
    cls.__annotations__ = dict.fromkeys(annotations)
    made: type = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots, kw_only=kw_only)(cls)
    made.__annotations__ = annotations
    for item in dataclasses.fields(made):
        if item.name in annotations:
            item.type = annotations[item.name]
    return made


def _add(cls: type, name: str, method: Any) -> None:
    """What the class itself defines stays. (Python sets `__hash__` to None where it defines `__eq__`.)"""
    if cls.__dict__.get(name) is None:
        setattr(cls, name, method)


def _first_init(cls: type, *, frozen: bool) -> Callable[..., None]:
    """`__init__` for a few calls. Then, or if it is called wrongly, a compiled one takes its place."""
    fields, num_calls, has_more = dataclasses.fields(cls), 0, hasattr(cls, "__post_init__")
    positional = [item.name for item in fields if item.init and not item.kw_only]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        given = {**dict(zip(positional, args, strict=False)), **kwargs} if args else kwargs
        values = _values(fields, given) if num_calls <= _FEW_CALLS else None
        if values is None or len(given) != len(args) + len(kwargs):
            method = _compiled_init(cls, fields, frozen=frozen)
            type.__setattr__(cls, "__init__", method)
            method(self, *args, **kwargs)
            return
        store = object.__setattr__ if frozen else setattr
        for name, value in values.items():
            store(self, name, value)
        if has_more:
            self.__post_init__()

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


def _values(fields: _Fields, given: dict[str, Any]) -> dict[str, Any] | None:
    """Of every field, defaults filled in; None if one is missing or there are others."""
    found: dict[str, Any] = {}
    num_given = 0
    for item in fields:
        name = item.name
        if item.init and name in given:
            found[name] = given[name]
            num_given += 1
        elif item.default is not dataclasses.MISSING:
            found[name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            found[name] = item.default_factory()
        elif item.init:
            return None  # else `__post_init__` fills it
    return found if num_given == len(given) else None


def _compiled_init(cls: type, fields: _Fields, *, frozen: bool) -> Callable[..., None]:
    names: dict[str, Any] = {}
    exec((_init_frozen if frozen else _init)(cls, fields, names), names)
    method: Callable[..., None] = names["__init__"]
    method.__qualname__ = f"{cls.__qualname__}.__init__"
    return method


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


def _key(cls: type) -> Callable[[Any], tuple[Any, ...]]:
    """What a value is compared by."""
    names = [item.name for item in dataclasses.fields(cls) if item.compare]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


def _eq(key: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any, Any], bool]:
    def __eq__(self: Any, other: Any) -> bool:
        return key(self) == key(other) if other.__class__ is self.__class__ else NotImplemented

    return __eq__


def _hash(key: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], int]:
    def __hash__(self: Any) -> int:
        return hash(key(self))

    return __hash__


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
