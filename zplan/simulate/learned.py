"""Learned: what operations returned for arguments of these layouts; a fork tells its parent, so no run learns it again.

An entry says nothing of a run: the outputs' layouts follow from the operation, its arguments and the default dtype.
News speak of layouts by number, and continue those that the parent had when it forked: a parent that has taken other
news since then numbers otherwise, and passes them over.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Shape, stride, dtype, device: all of a tensor that decides what operations make of it."""
MOST_ENTRIES = 50_000
"""A run has a few hundred; a worker that serves many models stops here."""
MOST_TAPES = 8
"""A tape has ten thousand steps or more."""


class Learned:
    """Entries by (id of the operation, rest of the key), and the numbers of layouts that keys are made of."""

    def __init__(self) -> None:
        self.entries: dict[tuple[Any, ...], Any] = {}
        self.layouts: dict[Layout, int] = {}
        self.tapes: dict[Any, Any] = {}
        """What models did in a micro-step (tape.py)."""
        self._added_tapes: dict[Any, Any] = {}
        self._added: list[tuple[Any, tuple[Any, ...]]] = []
        self._first_layout = 0
        self._state = b""
        """Equal in two processes that have taken the same news in the same order."""

    def number(self, layout: Layout) -> int:
        """Two tensors of one number are the same to every operation."""
        return self.layouts.setdefault(layout, len(self.layouts))

    def add(self, func: Any, key: tuple[Any, ...], entry: Any) -> None:
        self.entries[key] = entry
        self._added.append((func, key))

    def add_tape(self, key: Any, tape: Any) -> None:
        """The latest few are kept."""
        while len(self.tapes) >= MOST_TAPES:
            del self.tapes[next(iter(self.tapes))]
        self.tapes[key] = self._added_tapes[key] = tape

    def start(self) -> None:
        """What is added from now on is news to the parent."""
        self._added, self._added_tapes = [], {}
        self._first_layout = len(self.layouts)

    def news(self) -> bytes:
        """What was added since the start, for the parent's `absorb`; operations travel by name.

        This process is then in the state of a parent that has taken them, and may send it more.
        """
        layouts = list(self.layouts)[self._first_layout :]
        entries = [(str(func), key[1:], self.entries[key]) for func, key in self._added]
        before, self._state = self._state, os.urandom(8)
        return pickle.dumps((before, self._state, self._first_layout, layouts, entries, self._added_tapes))

    def absorb(self, news: bytes) -> None:
        """Take over what a fork has learned; its numbers continue those of this process at the time of the fork."""
        before, after, first_layout, layouts, entries, tapes = pickle.loads(news)
        for key, tape in tapes.items():
            self.add_tape(key, tape)
        if before != self._state or first_layout != len(self.layouts) or len(self.entries) > MOST_ENTRIES:
            return
        self._state = after
        for layout in layouts:
            self.number(layout)
        for name, rest, entry in entries:
            self.entries[(id(_operation(name)), *rest)] = entry


def _operation(name: str) -> Any:
    """`aten.mul.Tensor` -> the operation."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


LEARNED = Learned()
