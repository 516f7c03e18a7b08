"""WarmLauncher: the stack is imported once (`python -m sft.serve`), every trial forks its ranks from that process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from zplan.backends.launcher import TRIAL_MARK, Limits, Watch, end_marked, read_tail
from zplan.backends.outcome import Observed, RankError, RankExit
from zplan.hardware import DeviceKind
from zplan.processes import die_with_parent

_POLL_SECONDS = 0.05


class WarmLauncher:
    """Keeps one server process; a trial costs little more than its steps. The server never touches a GPU itself."""

    def __init__(self, kind: DeviceKind, command: Sequence[str] = (sys.executable, "-m", "sft.serve")) -> None:
        self._command = (*command, "--device", kind)
        self._server: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._buffer = b""
        self._mark = ""

    def start(self, env: Mapping[str, str]) -> None:
        """Let the server import the stack now; the first trial finds it running."""
        self._running_server(env)

    def launch(self, spec_path: Path, out_dir: Path, *, ranks: int, env: Mapping[str, str], limits: Limits) -> Observed:
        """Ask the server for one trial and watch it until the server says that all ranks are gone."""
        watch = Watch(out_dir, limits)
        try:
            server = self._running_server(env)
            self._send({"spec": str(spec_path), "out": str(out_dir), "ranks": ranks})
            answer = self._await_answer(watch)
            if answer is None and watch.verdict is not None:
                self._send({"stop": True})
                answer = self._read_until(time.monotonic() + limits.term_grace_seconds)
        except BaseException:
            self.close()
            raise
        if answer is None:
            return self._without_answer(watch, ranks)
        end_marked(self._mark, limits.term_grace_seconds, but=server.pid)
        return watch.observed(_exits(answer), more_errors=_refusal(answer))

    def close(self) -> None:
        """End the server and everything that it started."""
        server, self._server = self._server, None
        if server is None:
            return
        server.kill()
        server.wait()
        end_marked(self._mark, grace_seconds=5.0)
        for stream in (server.stdin, server.stdout, self._log):
            if stream is not None:
                stream.close()

    def _running_server(self, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        if self._server is not None and self._server.poll() is None:
            return self._server
        self.close()
        self._mark = f"{os.getpid()}:serve:{time.monotonic_ns()}"
        self._buffer = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the server)
        self._server = subprocess.Popen(
            self._command, env={**os.environ, **env, TRIAL_MARK: self._mark}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, start_new_session=True, preexec_fn=die_with_parent, bufsize=0,
        )  # fmt: skip
        return self._server

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._server is not None
        assert self._server.stdin is not None
        try:
            self._server.stdin.write((json.dumps(request) + "\n").encode())
        except BrokenPipeError:
            return  # the server is gone: the answer, or its absence, says so

    def _await_answer(self, watch: Watch) -> dict[str, Any] | None:
        """The answer; None if the server ended or a watchdog bit."""
        while watch.check() is None:
            answer = self._read_until(time.monotonic() + _POLL_SECONDS)
            if answer is not None:
                return answer
            if self._server is None or self._server.poll() is not None:
                return None
        return None

    def _read_until(self, deadline: float) -> dict[str, Any] | None:
        assert self._server is not None
        assert self._server.stdout is not None
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._server.stdout], [], [], left)[0]:
                return None
            chunk = os.read(self._server.stdout.fileno(), 1 << 16)
            if not chunk:
                time.sleep(_POLL_SECONDS)
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _without_answer(self, watch: Watch, ranks: int) -> Observed:
        """The server died, or did not end its ranks: it and they are ended here; its log is the evidence."""
        server = self._server
        status = server.poll() if server is not None else None
        text = self._server_log()
        self.close()
        exits = tuple(
            RankExit(rank=rank, returncode=status if status else -9, ended_at=watch.elapsed(), ended_by_us=not status)
            for rank in range(ranks)
        )
        return watch.observed(exits, more_tails=dict.fromkeys(range(ranks), text))

    def _server_log(self) -> str:
        if self._log is None:
            return ""
        return read_tail(Path(f"/proc/self/fd/{self._log.fileno()}"))


def _exits(answer: Mapping[str, Any]) -> tuple[RankExit, ...]:
    if answer.get("error"):
        return (RankExit(rank=0, returncode=2, ended_at=0.0),)
    ended_at, by_us = answer["ended_at"], set(answer["ended_by_us"])
    return tuple(
        RankExit(rank=int(rank), returncode=code, ended_at=ended_at[rank], ended_by_us=int(rank) in by_us)
        for rank, code in answer["exit"].items()
    )


def _refusal(answer: Mapping[str, Any]) -> dict[int, RankError]:
    """A request that the server could not start at all."""
    text = answer.get("error")
    return {0: RankError(type="ConfigError", message=str(text), phase="spec")} if text else {}
