"""The ranks of one node as child processes: started together, ended together, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sft.ranks import environment, rank_variables
from zplan.errors import ExitCode
from zplan.hardware import DeviceKind
from zplan.processes import free_port
from zplan.trial import log_file

PARENT_VARIABLE = "ZPLAN_TRAIN_PARENT"
"""Process id of the launcher; a rank that finds another parent has been orphaned before it could ask to die with it."""
_POLL_SECONDS = 0.1
_REPEAT_SECONDS = 1.0
"""timeout(1) signals the process and its group: the same request arrives twice."""
_PEER_GRACE_SECONDS = 10.0
"""After a rank failed, how long its peers may take to say why they end."""
_STOP_GRACE_SECONDS = 600.0
"""After SIGTERM or Ctrl-C, how long the ranks may take to finish their step and save."""


@dataclass(slots=True)
class Ranks:
    """The running ranks, and what was asked of them."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    stop_signal: int | None = None
    stop_count: int = 0
    stopped_at: float = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """First signal: ask the ranks to save and end. Second: end them."""
        if self.stop_count and time.monotonic() - self.stopped_at < _REPEAT_SECONDS:
            return
        self.stop_count += 1
        self.stop_signal = number
        self.stopped_at = time.monotonic()
        if self.stop_count == 1:
            print("zplan: saving after this step; once more ends at once", file=sys.stderr, flush=True)
            self.send(signal.SIGTERM)
        else:
            self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """To the process group of every rank that runs."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    @property
    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How the ranks ended."""

    status: int
    """Exit status of the whole."""
    reason: str = ""
    """Which rank failed first and how; empty if none did."""
    killed: bool = False
    """That rank was ended by a signal, so it could not say anything itself."""


def launch(arguments: Sequence[str], *, num_ranks: int, kind: DeviceKind, log_dir: Path) -> Ended:
    """Run `python -m sft.train ARGUMENTS` once per rank, and say how they ended.

    Rank 0 speaks on our stdout and stderr, the others into `log_N.txt`.
    """
    ranks = Ranks()
    previous = {number: signal.signal(number, ranks.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    port = free_port()
    try:
        for rank in range(num_ranks):
            ranks.processes.append(_start(arguments, rank, num_ranks, port, kind, log_dir))
        return _wait(ranks, log_dir)
    finally:
        ranks.send(signal.SIGKILL)
        for process in ranks.processes:
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(
    arguments: Sequence[str], rank: int, num_ranks: int, port: int, kind: DeviceKind, log_dir: Path
) -> subprocess.Popen[bytes]:
    variables = {**environment(kind), **os.environ, **rank_variables(rank=rank, world_size=num_ranks, port=port)}
    variables[PARENT_VARIABLE] = str(os.getpid())
    command = [sys.executable, "-m", "sft.train", *arguments]
    if rank == 0:
        return subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, start_new_session=True)
    with (log_dir / log_file(rank)).open("wb") as log:
        return subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _wait(ranks: Ranks, log_dir: Path) -> Ended:
    deadline: float | None = None
    first_failure: tuple[int, int] | None = None
    stopping = False
    while None in ranks.codes:
        time.sleep(_POLL_SECONDS)
        failed = [(rank, code) for rank, code in enumerate(ranks.codes) if code]
        if failed and first_failure is None:
            first_failure = failed[0]
            deadline = time.monotonic() + _PEER_GRACE_SECONDS
        if ranks.stop_signal is not None and not stopping:
            stopping = True
            deadline = deadline or time.monotonic() + _STOP_GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            ranks.send(signal.SIGKILL)
    first_failure = first_failure or next(((rank, code) for rank, code in enumerate(ranks.codes) if code), None)
    return _ended(ranks, first_failure, log_dir)


def _ended(ranks: Ranks, first_failure: tuple[int, int] | None, log_dir: Path) -> Ended:
    if ranks.stop_signal is not None:
        stopped = ExitCode.INTERRUPTED if ranks.stop_signal == signal.SIGINT else 128 + signal.SIGTERM
        return Ended(status=int(stopped))
    if first_failure is None:
        return Ended(status=int(ExitCode.OK))
    rank, code = first_failure
    if code < 0:
        reason = f"rank {rank} was ended by {signal.Signals(-code).name}"
        print(f"zplan: {reason}", file=sys.stderr)
        if code == -signal.SIGKILL:
            print("  because: somebody sent it; when memory runs out, the kernel does", file=sys.stderr)
        print("  try:     the same command again continues from the newest checkpoint", file=sys.stderr)
        return Ended(status=int(ExitCode.BUG), reason=reason, killed=True)
    if rank > 0:
        tail = (log_dir / log_file(rank)).read_text(errors="replace")[-2000:]
        print(f"zplan: rank {rank} ended with status {code}:\n{tail}", file=sys.stderr)
    return Ended(status=code, reason=f"rank {rank} ended with status {code}")
