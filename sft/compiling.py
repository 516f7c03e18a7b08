"""A rank whose compilers are at work is alive: it shows so, however long they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import psutil

THREAD_NAME = "looks for compilers"
_LOOK_SECONDS = 20.0
"""Between two looks; a trial that shows nothing for three minutes is ended (`zplan.backends.launcher.Limits`)."""


@contextmanager
def beating_while_compiling(beat: Callable[[], None], *, every_seconds: float = _LOOK_SECONDS) -> Iterator[None]:
    """While it is open, `beat` is called as often as processes below this one have worked since the last look.

    The first Muon trial builds DeepSpeed's fused_adam and compiles the orthogonalisation; the first with an optimizer
    offloaded from a GPU builds cpu_adam: minutes in which no step ends. A compiler that hangs uses no processor time.

    Source: deepspeed 0.19.8, ops/op_builder/builder.py:568 (jit_load: ninja); runtime/zero/muon/original_muon.py
    (torch.compile).
    """
    ended = Event()

    def look_and_beat() -> None:
        before = _work_below()
        while not ended.wait(every_seconds):
            now = _work_below()
            if now != before:
                beat()
            before = now

    looking = Thread(target=look_and_beat, name=THREAD_NAME, daemon=True)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join()


def _work_below() -> dict[int, float]:
    """Process -> processor seconds that it has used, for all that descend from this one."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found
