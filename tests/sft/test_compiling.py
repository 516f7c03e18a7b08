"""A rank whose compiler takes minutes is not taken for one that hangs; one whose child hangs is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from threading import Event

import pytest

from sft.compiling import beating_while_compiling

_WORK = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'while True: pass'])"
_WAIT = "import time; print(flush=True); time.sleep(1000)"


@pytest.mark.parametrize(("below", "alive"), [(f"{_WORK}; {_WAIT}", True), (_WAIT, False)])
def test_a_rank_beats_exactly_while_processes_below_it_work(below: str, alive: bool) -> None:
    """The one that works is a child's child, as a compiler below ninja is."""
    beaten = Event()
    with subprocess.Popen([sys.executable, "-c", below], stdout=subprocess.PIPE, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.2)  # it sleeps from now on
            with beating_while_compiling(beaten.set, every_seconds=0.2):
                assert beaten.wait(timeout=20 if alive else 2) == alive
        finally:
            os.killpg(child.pid, signal.SIGKILL)


def test_nothing_beats_behind_its_end() -> None:
    beats: list[int] = []
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            with beating_while_compiling(lambda: beats.append(1), every_seconds=0.01):
                time.sleep(0.3)
            before = len(beats)
            time.sleep(0.3)
            assert len(beats) == before
        finally:
            child.kill()
