"""Every test holds for the standard decorator too: it is the specification."""

import dataclasses
import pickle
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from zplan import values


@values.dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """A value."""

    name: str
    sizes: list[int] = dataclasses.field(default_factory=list)
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """A value."""

    name: str
    sizes: list[int] = dataclasses.field(default_factory=list)
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}")


@values.dataclass(frozen=True)
class Named:
    """With a `__dict__`, for what is computed once."""

    name: str

    @cached_property
    def length(self) -> int:
        return len(self.name)


either = pytest.mark.parametrize("kind", [Ours, Standard])
decorators = pytest.mark.parametrize("decorate", [values.dataclass, dataclasses.dataclass])
Decorator = Callable[..., Any]


@either
def test_a_value_has_its_defaults_and_a_list_of_its_own(kind: Any) -> None:
    one, other = kind(name="a"), kind(name="a")
    assert (one.name, one.sizes, one.rank) == ("a", [], 0)
    assert one.sizes is not other.sizes
    assert repr(one) == f"{kind.__name__}(name='a', sizes=[], rank=0)"


@either
def test_a_wrong_call_is_refused_with_the_name_of_the_class(kind: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{kind.__name__}.__init__\(\) missing 1 required .* 'name'"):
        kind()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'nmae'"):
        kind(nmae="a")
    with pytest.raises(TypeError, match="takes 1 positional argument but 2"):
        kind("a")
    with pytest.raises(ValueError, match="rank is -1"):
        kind(name="a", rank=-1)


@either
def test_a_frozen_value_cannot_be_changed(kind: Any) -> None:
    value = kind(name="a")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'name'"):
        value.name = "b"
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'name'"):
        del value.name
    with pytest.raises((AttributeError, TypeError)):
        value.unknown = 1


@either
def test_the_standard_functions_take_it(kind: Any) -> None:
    value = kind(name="a", sizes=[1])
    assert dataclasses.is_dataclass(value)
    assert dataclasses.replace(value, rank=2) == kind(name="a", sizes=[1], rank=2)
    assert dataclasses.asdict(value) == {"name": "a", "sizes": [1], "rank": 0}
    assert [(item.name, item.kw_only) for item in dataclasses.fields(kind)] == [
        ("name", True), ("sizes", True), ("rank", True),
    ]  # fmt: skip
    assert pickle.loads(pickle.dumps(value)) == value


@either
def test_pydantic_reads_it_and_names_every_problem(kind: Any) -> None:
    adapter = TypeAdapter(kind)
    value = adapter.validate_json('{"name": "a", "sizes": [1]}', strict=True)
    assert value == kind(name="a", sizes=[1])
    assert adapter.dump_python(value, mode="json") == {"name": "a", "sizes": [1], "rank": 0}
    with pytest.raises(ValidationError) as caught:
        adapter.validate_json('{"sizes": ["x"], "rank": "0"}', strict=True)
    assert [item["loc"] for item in caught.value.errors()] == [("name",), ("sizes", 0), ("rank",)]


@decorators
def test_values_with_equal_fields_are_equal_and_have_one_hash(decorate: Decorator) -> None:
    @decorate(frozen=True, slots=True)
    class Point:
        x: int
        note: str = dataclasses.field(default="", compare=False)

    @decorate(frozen=True, slots=True)
    class Other:
        x: int

    assert Point(1, "a") == Point(1, "b") != Point(2, "a")
    assert hash(Point(1, "a")) == hash(Point(1, "b")) != hash(Point(2, "a"))
    assert Point(1) != Other(1)


@decorators
def test_what_may_change_has_no_hash_and_what_is_never_compared_has_its_own(decorate: Decorator) -> None:
    @decorate(slots=True)
    class Open:
        x: int

    @decorate(frozen=True, eq=False)
    class Itself:
        x: int

    value = Open(1)
    value.x = 2
    assert value == Open(2)
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)
    itself = Itself(1)
    assert itself != Itself(1)
    assert len({itself, itself, Itself(1)}) == 2


@decorators
def test_what_the_class_defines_itself_stays(decorate: Decorator) -> None:
    @decorate(frozen=True)
    class Loose:
        x: int
        y: int = dataclasses.field(init=False, default=7)

        def __eq__(self, other: object) -> bool:
            return True

        def __repr__(self) -> str:
            return "loose"

    assert Loose(1) == Loose(2)
    assert repr(Loose(1)) == "loose"
    assert Loose(1).y == 7
    assert hash(Loose(1)) == hash(Loose(1)) != hash(Loose(2))


@decorators
def test_a_class_built_on_another_has_the_fields_of_both(decorate: Decorator) -> None:
    @decorate(frozen=True, kw_only=True)
    class Base:
        x: int

    @decorate(frozen=True, kw_only=True)
    class More(Base):
        y: int = 1

    assert (More(x=3).x, More(x=3).y) == (3, 1)
    assert Base(x=3) != More(x=3)


def test_a_frozen_value_with_a_dict_keeps_what_is_computed_once() -> None:
    value = Named("abc")
    assert value.length == 3
    assert pickle.loads(pickle.dumps(value)) == value
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.name = "b"  # type: ignore[misc]


def test_a_method_is_compiled_when_it_is_first_called() -> None:
    @values.dataclass(frozen=True, slots=True)
    class Point:
        x: int

    late = Point.__init__
    Point(1)
    assert Point.__init__ is not late
    assert Point.__init__.__code__.co_varnames == ("self", "x")
