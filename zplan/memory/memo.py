"""Memo: answers kept by what a formula read of its question, and nothing else. Kept: values under plain keys.

A formula takes a whole `Choice` and reads a few of its fields. Two choices that agree in the fields that it reads have
one answer, so the answer is kept under those. Which fields they are is noted while the formula runs: no list of them
can go out of date. A formula that is asked like this must be a pure function that reads its question by attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from itertools import takewhile
from operator import attrgetter
from typing import Any, Generic, TypeVar, cast

from zplan.values import dataclass

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Key = TypeVar("Key")
Value = TypeVar("Value")
_PLAIN = frozenset({int, str, bool, float, type(None)})
"""Types of nearly everything that is read."""


class Kept(dict[Key, Value]):
    """A dict that forgets everything when it is full; `keep` puts in.

    A key with the `id` of an object needs that object within the value: it lives as long as the key, then.
    """

    def __init__(self, most: int = 1024) -> None:
        super().__init__()
        self.most = most

    def keep(self, key: Key, value: Value) -> Value:
        if len(self) >= self.most:
            self.clear()
        self[key] = value
        return value


class _Reader:
    """Stands for the question: notes the first read of every attribute, the later ones cost what they always cost.

    A formula may ask another memo: what is read of the question there is read here as well.
    """

    def __init__(self, value: Any, path: str, reads: list[tuple[str, Any]]) -> None:
        self.__dict__.update(_value=value, _path=path, _reads=reads)

    def __getattr__(self, name: str) -> Any:
        value, path = getattr(self._value, name), self._path + name
        if type(value) in _PLAIN or not (is_dataclass(value) or isinstance(value, _Reader)):
            self._reads.append((path, value))
        else:
            value = _Reader(value, f"{path}.", self._reads)
        self.__dict__[name] = value
        return value


class _Branch:
    """The formula reads these attributes next, one after the other; what it reads after them depends on the values."""

    __slots__ = ("edges", "paths", "read")

    def __init__(self, paths: Sequence[str], edges: dict[Any, Any]) -> None:
        self.paths, self.read = tuple(paths), attrgetter(*paths)
        self.edges = edges
        """By what `read` returns: the value of a single attribute, a tuple of several."""

    def shares(self, reads: Sequence[tuple[str, Any]]) -> int:
        """How many of its attributes these reads begin with."""
        pairs = zip(self.paths, reads, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1][0], pairs))

    def split(self, count: int) -> None:
        """Leave the first attributes here; a branch for each set of their values has the rest."""
        rest: dict[Any, dict[Any, Any]] = {}
        for values, node in self.edges.items():
            rest.setdefault(_key(values[:count]), {})[_key(values[count:])] = node
        self.edges = {first: _Branch(self.paths[count:], edges) for first, edges in rest.items()}
        self.paths, self.read = self.paths[:count], attrgetter(*self.paths[:count])


def _key(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(slots=True)
class _Leaf(Generic[Answer]):
    answer: Answer


class Memo(Generic[Question, Answer]):
    """The formula, asked once for every set of values that it reads; forgets everything at `most_kept` answers."""

    def __init__(self, formula: Callable[[Question], Answer], *, most_kept: int) -> None:
        self.formula, self.most_kept = formula, most_kept
        self._edges: dict[Any, Any] = {}
        self._num_kept = 0

    def __call__(self, question: Question) -> Answer:
        node = self._edges.get(None)
        while type(node) is _Branch:
            node = node.edges.get(node.read(question))
        return node.answer if node is not None else self._ask(question)

    def _ask(self, question: Question) -> Answer:
        if self._num_kept >= self.most_kept:
            self._edges, self._num_kept = {}, 0
        reads: list[tuple[str, Any]] = []
        answer = self.formula(cast(Question, _Reader(question, "", reads)))
        self._keep(reads, answer)
        self._num_kept += 1
        return answer

    def _keep(self, reads: Sequence[tuple[str, Any]], answer: Answer) -> None:
        edges, key = self._edges, None
        while reads:
            branch: Any = edges.get(key)
            shared = branch.shares(reads) if type(branch) is _Branch else 0
            if not shared:
                # nothing is kept here, or a table of the formula's own spared it a read this time
                branch, shared = _Branch([path for path, _ in reads], {}), len(reads)
                edges[key] = branch
            elif shared < len(branch.paths):
                branch.split(shared)
            edges, key = branch.edges, _key([value for _, value in reads[:shared]])
            reads = reads[shared:]
        edges[key] = _Leaf(answer)
