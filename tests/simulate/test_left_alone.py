"""A worker whose client was killed: nothing goes on simulating for nobody."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ASK = """
from tests.simulate.test_template import question
from zplan.simulate.client import WorkerClient

client = WorkerClient()
many_layers = {**question(3).config, "num_hidden_layers": 40}
print(client._started().pid, flush=True)
while True:
    client.ask(question(3, config=many_layers))
"""


def test_a_run_and_a_kept_model_end_when_their_client_is_killed() -> None:
    client = subprocess.Popen(
        [sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        assert client.stdout is not None
        worker = psutil.Process(int(client.stdout.readline()))
        wait_until(lambda: len(worker.children(recursive=True)) > 1, 300.0)  # the template, and the run in its fork
        everyone = [worker, *worker.children(recursive=True)]
    finally:
        client.kill()
        client.wait()
    wait_until(lambda: not any(map(is_alive, everyone)), 60.0)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
