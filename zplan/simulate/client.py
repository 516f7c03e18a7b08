"""WorkerClient: the parent's end of the worker. Imports no torch; one worker serves many questions."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from typing import Any

from zplan import files
from zplan.errors import MachineError
from zplan.processes import die_with_parent
from zplan.simulate.report import SimulationError, SimulationReport
from zplan.simulate.request import SimulationRequest

START_SECONDS = 180.0
"""Imports of torch, transformers, trl and deepspeed on a busy machine with cold disks."""


class SimulationTimeoutError(SimulationError):
    """The deadline passed; the worker was ended."""


class WorkerClient:
    """Starts the worker on the first question and again after it was lost."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._buffer = b""
        self._idle = True

    def ask(self, request: SimulationRequest, *, deadline_seconds: float = 600.0) -> SimulationReport:
        """One question.

        Raises:
            SimulationError: the run could not answer; its text names the module and the operation.
            SimulationTimeoutError: it took longer than `deadline_seconds`.
            MachineError: the worker does not start.
        """
        process = self._started()
        self._idle = False
        assert process.stdin is not None
        process.stdin.write(json.dumps(files.to_data(request)).encode() + b"\n")
        process.stdin.flush()
        data = self._read_line(deadline_seconds)
        if data is None:
            raise SimulationError(f"the simulation's worker was lost: {self._log_tail()}", cause="broken")
        self._idle = True
        if "error" in data:
            raise SimulationError(**data["error"])
        return files.from_data(SimulationReport, data["report"], name="the worker's answer")

    @property
    def pid(self) -> int | None:
        """The worker's process, for who measures it."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the worker and whatever it forked; an idle one ends by itself when nobody can ask it any more."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._idle and process.stdin is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                process.stdin.close()
                process.wait(timeout=1.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._buffer = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zplan.simulate.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        if self._read_line(START_SECONDS) is None:
            tail = self._log_tail()
            self.close()
            raise MachineError(f"the simulation's worker does not start: {tail}", fix="zplan inspect")
        return self._process

    def _read_line(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None when the worker is gone."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    self.close()
                    raise SimulationTimeoutError(f"the simulation took longer than {seconds:.0f} s")
                chunk = os.read(self._process.stdout.fileno(), 1 << 20)
                if not chunk:
                    return None
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _log_tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


@cache
def shared_worker() -> WorkerClient:
    """One worker per process, ended with it."""
    client = WorkerClient()
    atexit.register(client.close)
    return client
