"""A run that ends its process: the answer says how, and what was printed last."""

from __future__ import annotations

import faulthandler
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zplan.simulate.worker import in_fork

THROWN = "terminate called after throwing an instance of 'c10::Error'\n  what():  no such tensor\nframe #0: abort"


def _end(text: str, number: int) -> Callable[[], dict[str, Any]]:
    def respond() -> dict[str, Any]:
        faulthandler.disable()  # pytest's
        os.write(2, text.encode())
        os.kill(os.getpid(), number)
        raise AssertionError

    return respond


@pytest.mark.parametrize(
    ("text", "number", "said"),
    [
        (THROWN, signal.SIGABRT, "the simulation ended with SIGABRT: no such tensor"),
        ("warning\nout of luck\n", signal.SIGSEGV, "the simulation ended with SIGSEGV: out of luck"),
        ("", signal.SIGKILL, "the simulation ended with SIGKILL"),
    ],
)
def test_the_answer_repeats_what_the_run_said_last(tmp_path: Path, text: str, number: int, said: str) -> None:
    earlier = os.dup(2)
    with (tmp_path / "log").open("w+b") as log:
        log.write(b"of another run\n")
        log.flush()
        os.dup2(log.fileno(), 2)
        try:
            answers = io.StringIO()
            in_fork(_end(text, number), answers)
        finally:
            os.dup2(earlier, 2)
            os.close(earlier)
    assert json.loads(answers.getvalue())["error"]["what"] == said
