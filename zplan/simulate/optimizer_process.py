"""The process in which DeepSpeed's SuperOffload runs Adam, as a thread of this one: a fork sees no fake tensor.

The worker is DeepSpeed's own function, unchanged (deepspeed 0.19.8, runtime/superoffload/superoffload_utils.py). It
runs only while the engine waits for it, so that a run is the same every time; what it allocates is counted as the host
memory of the rank that it serves.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any

import torch

from zplan.simulate.tracker import Tracker

REPLACED = (
    "SuperOffload's optimizer process: DeepSpeed's own worker in a thread, done with a sub-group before backward goes"
    " on; no CPU affinity"
)


class OptimizerProcesses:
    """What DeepSpeed asks `multiprocessing.get_context("spawn")` for.

    Args:
        modes: under which tensors are fake and counted; a thread enters them for itself.
    """

    def __init__(self, tracker: Tracker, modes: Sequence[AbstractContextManager[Any]]) -> None:
        self.tracker, self.modes = tracker, modes
        self.started: list[_Process] = []

    def get_context(self, _method: str) -> OptimizerProcesses:
        return self

    def SimpleQueue(self) -> _Queue:
        return _Queue(self)

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> _Process:
        self.started.append(_Process(self, target, args))
        return self.started[-1]

    def close(self) -> None:
        """End the workers as DeepSpeed does, by an empty task."""
        for process in self.started:
            if process.is_alive():
                process.tasks.put(None)
                process.join()

    def share(self, value: Any) -> None:
        """A tensor that is sent to another process is moved into shared memory; the pinned block that it leaves stays
        with the pinned allocator, which gives nothing back.

        Source: torch 2.13.0, multiprocessing/reductions.py (reduce_storage: _share_fd_cpu_);
        ATen/core/CachingHostAllocator.h (maybe_cache_block).
        """
        for tensor in value.values() if isinstance(value, dict) else ():
            if isinstance(tensor, torch.Tensor):
                self.tracker.share(tensor)


class _Queue:
    """Takes a task and lets the worker run until it wants the next one."""

    def __init__(self, processes: OptimizerProcesses) -> None:
        self.processes = processes
        self.items: deque[Any] = deque()
        self.reader: _Process | None = None

    def put(self, item: Any) -> None:
        self.processes.share(item)
        self.items.append(item)
        if self.reader is not None:
            self.reader.run()

    def get(self) -> Any:
        if not self.items and self.reader is not None:
            self.reader.wait()
        return self.items.popleft()

    def empty(self) -> bool:
        return not self.items


class _Process:
    """A thread and this one take turns: one runs while the other waits."""

    pid = 0

    def __init__(self, processes: OptimizerProcesses, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.processes, self.tasks = processes, args[0]
        self.tasks.reader = self
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._entered = ExitStack()
        self._thread = threading.Thread(target=self._work, args=(target, args), daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._theirs.acquire()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def run(self) -> None:
        """Let the worker go on, until it waits for a task or ends."""
        self._mine.release()
        self._theirs.acquire()

    def wait(self) -> None:
        """Called by the worker: let the other go on."""
        self._entered.close()
        self._theirs.release()
        self._mine.acquire()
        self._enter()

    def _enter(self) -> None:
        for mode in self.processes.modes:
            self._entered.enter_context(mode)

    def _work(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._enter()
        try:
            target(*args)
        finally:
            self._entered.close()
            self._theirs.release()


def spawned(processes: OptimizerProcesses) -> SimpleNamespace:
    """In place of torch.multiprocessing, of which the module uses this and two names in annotations."""
    return SimpleNamespace(get_context=processes.get_context)
