"""What of a dry run is ours: seconds in the tracker, its dispatch and the report, and what the libraries take besides.

What is left when ours cost nothing is DeepSpeed's hooks, PEFT, transformers and torch's own C++: the floor of every
simulation that runs the installed engine operation by operation; below stage 3 a tape gets below it.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from zplan.simulate.request import SimulationRequest
from zplan.simulate.worker import ENVIRONMENT, import_libraries


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """CPU seconds of one run whose model was built before, which learns nothing new and plays nothing."""

    total: float
    ours: float
    """Within the tracker's entry points and the report. The clock's calls count among them, so what is left for the
    libraries is rather too little."""

    @property
    def libraries(self) -> float:
        return self.total - self.ours


class Stopwatch:
    """CPU seconds of this thread inside wrapped functions; of nested ones only the outermost is counted."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - started
                self._depth -= 1

        return timed


def measure_floor(request: SimulationRequest) -> Floor:
    """Three runs, each in a fork of this process: one learns, one is timed as it is, one with the clock inside."""
    os.environ.update(ENVIRONMENT)
    import_libraries()
    request = replace(request, replay=False)
    _in_fork(request, watched=False)
    total, _ = _in_fork(request, watched=False)
    _, ours = _in_fork(request, watched=True)
    return Floor(total=total, ours=ours)


def _in_fork(request: SimulationRequest, *, watched: bool) -> tuple[float, float]:
    """CPU seconds of the run, and of them those that are ours."""
    from zplan.simulate.learned import LEARNED

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            LEARNED.start()
            seconds = _run_seconds(request, watched=watched)
            with open(write, "wb") as pipe:
                pipe.write(pickle.dumps((seconds, LEARNED.news())))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        seconds, news = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    LEARNED.absorb(news)
    return seconds  # type: ignore[no-any-return]


def _run_seconds(request: SimulationRequest, *, watched: bool) -> tuple[float, float]:
    from zplan.simulate.run import DryRun

    watch = Stopwatch()
    with DryRun(request) as run:
        run.load()
        if watched:
            _watch_what_is_ours(watch)
        started = time.process_time()
        run.finish(request)
        return time.process_time() - started, watch.seconds


def _watch_what_is_ours(watch: Stopwatch) -> None:
    """For good: the process ends after the run."""
    from zplan.simulate import run, tracker

    for owner, name in (
        (tracker.Tracker, "__torch_dispatch__"),
        (tracker.Tracker, "detached"),
        (tracker.Tracker, "sliced"),
        (tracker.Tracker, "resized"),
        (run, "make_report"),
    ):
        setattr(owner, name, watch.around(getattr(owner, name)))
