"""`python -m sft.serve`: imports the stack once, then forks the ranks of each trial from the warm process.

stdin, one JSON object per line:
    {"spec": FILE, "out": DIR, "ranks": N}      starts a trial
    {"stop": true}                              ends the running one
stdout, one line per finished trial, with codes as `subprocess` gives them (negative is the signal):
    {"out": DIR, "exit": {rank: code}, "ended_at": {rank: seconds}, "ended_by_us": [rank, ...]}

The ranks of a trial are one process group. When one rank fails, its peers get a moment to write down why, and are
killed. When stdin closes or the parent dies, all is over.

Nothing here may call a torch operator, start a thread or touch CUDA: a fork would inherit it broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.ranks import die_with_parent, rank_variables
from sft.trial import preload, run_rank
from zplan import files
from zplan.errors import ConfigError, ExitCode, ZplanError
from zplan.processes import free_port
from zplan.trial import TrialSpec, log_file

_POLL_SECONDS = 0.02
_GRACE_SECONDS = 3.0
"""How long the peers of a failed rank may take to fail by themselves (gloo tells them within a second)."""


@dataclass(slots=True)
class Group:
    """The running ranks of one trial."""

    out: str
    started: float = field(default_factory=time.monotonic)
    pids: dict[int, int] = field(default_factory=dict)
    """rank -> process."""
    pgid: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    ended_at: dict[int, float] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    failed_at: float | None = None

    def reap(self) -> bool:
        """Collect ranks that ended; True when all have."""
        for rank, pid in self.pids.items():
            if rank in self.exits:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.exits[rank] = os.waitstatus_to_exitcode(status)
                self.ended_at[rank] = round(time.monotonic() - self.started, 3)
                if self.exits[rank] != 0 and self.failed_at is None:
                    self.failed_at = time.monotonic()
        return len(self.exits) == len(self.pids)

    def kill(self) -> None:
        """End what is left of the group."""
        left = self.pids.keys() - self.exits.keys()
        if left:
            self.killed |= left
            os.killpg(self.pgid, signal.SIGKILL)

    def report(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "exit": {str(rank): code for rank, code in sorted(self.exits.items())},
            "ended_at": {str(rank): seconds for rank, seconds in sorted(self.ended_at.items())},
            "ended_by_us": sorted(self.killed),
        }


class Requests:
    """Lines of stdin, without blocking."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.closed = False
        self._buffer = b""

    def poll(self, timeout: float | None) -> list[dict[str, Any]]:
        """Complete requests that have arrived; waits up to `timeout` seconds for the first."""
        ready, _, _ = select.select([self.descriptor], [], [], timeout)
        if ready:
            chunk = os.read(self.descriptor, 1 << 16)
            self.closed = not chunk
            self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]


def start_trial(request: dict[str, Any], answers: int) -> Group:
    """Fork the ranks of one trial.

    Raises:
        ConfigError: the request or the spec is malformed.
    """
    try:
        spec_path, out, ranks = Path(request["spec"]), Path(request["out"]), int(request["ranks"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"request {request} is malformed", because="spec, out and ranks are needed") from error
    spec = files.load(TrialSpec, spec_path)
    from sft.prepared import prepare_for_forks

    prepare_for_forks(spec)
    return fork_group(lambda: run_rank(spec, out), out, ranks=ranks, answers=answers)


def fork_group(work: Callable[[], int], out: Path, *, ranks: int, answers: int) -> Group:
    """Fork `ranks` children that run `work`, in one new process group, with their output in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    group = Group(out=str(out))
    for rank in range(ranks):
        variables = rank_variables(rank=rank, world_size=ranks, port=port)
        pid = fork_rank(work, variables, out / log_file(rank), pgid=group.pgid, close=(answers,))
        group.pgid = group.pgid or pid
        group.pids[rank] = pid
    return group


def fork_rank(
    work: Callable[[], int], variables: dict[str, str], log: Path, *, pgid: int, close: tuple[int, ...] = ()
) -> int:
    """Fork a child that runs `work` with its output in `log`; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself, or has ended
            os.setpgid(pid, pgid or pid)
        return pid
    code = int(ExitCode.BUG)
    try:
        os.setpgid(0, pgid)
        die_with_parent()
        for descriptor in close:
            os.close(descriptor)
        _redirect(log)
        os.environ.update(variables)
        code = work()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(log: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def wait(group: Group, requests: Requests, queue: list[dict[str, Any]]) -> None:
    """Until every rank has ended; further requests go to the queue."""
    while not group.reap():
        for request in requests.poll(_POLL_SECONDS) if not requests.closed else []:
            if request.get("stop"):
                group.kill()
            else:
                queue.append(request)
        if requests.closed:
            group.kill()
            time.sleep(_POLL_SECONDS)
        if group.failed_at is not None and time.monotonic() - group.failed_at > _GRACE_SECONDS:
            group.kill()


def serve(requests: Requests, answers: int, start: Callable[[dict[str, Any], int], Group] = start_trial) -> None:
    """Answer requests, one trial at a time, until stdin closes."""
    queue: list[dict[str, Any]] = []
    while not requests.closed:
        queue += [item for item in requests.poll(None) if not item.get("stop")] if not queue else []
        while queue and not requests.closed:
            request = queue.pop(0)
            try:
                group = start(request, answers)
                wait(group, requests, queue)
                answer = group.report()
            except ZplanError as error:
                answer = {"out": str(request.get("out")), "exit": {}, "error": str(error)}
            os.write(answers, (json.dumps(answer) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """The warm parent."""
    parser = argparse.ArgumentParser(prog="python -m sft.serve", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    die_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)
    preload(options.device)
    serve(Requests(0), answers)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
