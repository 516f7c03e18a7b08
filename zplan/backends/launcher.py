"""Child processes of a trial: start one per rank, watch them, end all of them, and prove that nobody is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from zplan.backends.host_memory import available_host_bytes, count_oom_kills
from zplan.backends.outcome import Observed, RankError, RankExit, Watchdog
from zplan.errors import MachineError
from zplan.processes import die_with_parent, free_port
from zplan.trial import RESULT_FILE, error_file, log_file
from zplan.units import MIB, format_bytes, format_seconds
from zplan.values import dataclass

_POLL_SECONDS = 0.05
_TAIL_BYTES = 16 << 10
TRIAL_MARK = "ZPLAN_TRIAL"
"""Environment variable in every process of a trial: how left-over processes are found, whatever their parent is now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a trial is ended from outside."""

    deadline_seconds: float
    stall_seconds: float = 180.0
    """Without a heartbeat of any rank, counted from the first heartbeat."""
    host_floor_bytes: int = 512 * MIB
    """Host memory that must stay available."""
    peer_grace_seconds: float = 3.0
    """After one rank failed, how long its peers may take to say why they end."""
    term_grace_seconds: float = 5.0
    """Between SIGTERM and SIGKILL."""


class Launcher(Protocol):
    """Runs the ranks of one trial to their end."""

    def launch(
        self, spec_path: Path, out_dir: Path, *, ranks: int, env: Mapping[str, str], limits: Limits
    ) -> Observed: ...

    def close(self) -> None: ...


class ColdLauncher:
    """A fresh interpreter for every rank of every trial, each in its own session."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "sft.trial")) -> None:
        self._command = tuple(command)

    def launch(self, spec_path: Path, out_dir: Path, *, ranks: int, env: Mapping[str, str], limits: Limits) -> Observed:
        """Start the ranks and watch them until the last one is gone."""
        command = [*self._command, str(spec_path), "--out", str(out_dir)]
        mark = f"{os.getpid()}:{out_dir}"
        shared = {**os.environ, **env, TRIAL_MARK: mark, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        watch = Watch(out_dir, limits)
        processes: list[subprocess.Popen[bytes]] = []
        exits: dict[int, RankExit] = {}
        try:
            for rank in range(ranks):
                processes.append(_start(command, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, out_dir, rank))
            _watch_until_end(processes, exits, watch)
        finally:
            _end_groups(processes, limits.term_grace_seconds)
            _collect(processes, exits, watch, ended_by_us=True)
            end_marked(mark, limits.term_grace_seconds)
        return watch.observed(tuple(exits.values()))

    def close(self) -> None:
        """Nothing stays between trials."""


def _start(command: Sequence[str], env: Mapping[str, str], out_dir: Path, rank: int) -> subprocess.Popen[bytes]:
    with open(out_dir / log_file(rank), "wb") as log:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip


class Watch:
    """The clock, the heartbeats and the host memory of one running trial."""

    def __init__(self, out_dir: Path, limits: Limits) -> None:
        self.limits = limits
        self.verdict: Watchdog | None = None
        self.detail = ""
        self._out_dir = out_dir
        self._started = time.monotonic()
        self._oom_kills = count_oom_kills()
        self._lowest_bytes = available_host_bytes()
        if self._lowest_bytes < limits.host_floor_bytes:
            raise MachineError(
                f"only {format_bytes(self._lowest_bytes)} of host memory are available before the trial starts",
                because=f"the watchdog keeps {format_bytes(limits.host_floor_bytes)} free for the rest of the machine",
                fix="end other programs",
            )

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def check(self) -> Watchdog | None:
        """The first limit that is passed, now; remembered."""
        available = available_host_bytes()
        self._lowest_bytes = min(self._lowest_bytes, available)
        if available < self.limits.host_floor_bytes:
            self.verdict = "host_memory"
        elif self.elapsed() > self.limits.deadline_seconds:
            self.verdict, self.detail = "deadline", format_seconds(self.limits.deadline_seconds)
        else:
            silence = self._silence_seconds()
            if silence is not None and silence > self.limits.stall_seconds:
                self.verdict, self.detail = "stalled", f"no heartbeat for {format_seconds(silence)}"
        return self.verdict

    def _silence_seconds(self) -> float | None:
        beats = [path.stat().st_mtime for path in self._out_dir.glob("progress_*")]
        return time.time() - max(beats) if beats else None

    def observed(
        self,
        exits: tuple[RankExit, ...],
        *,
        more_errors: Mapping[int, RankError] | None = None,
        more_tails: Mapping[int, str] | None = None,
    ) -> Observed:
        """Exit statuses with what the ranks left in the folder, and what the launcher knows besides."""
        tails = {item.rank: read_tail(self._out_dir / log_file(item.rank)) for item in exits}
        errors = {item.rank: read_error(self._out_dir / error_file(item.rank)) for item in exits}
        return Observed(
            exits=exits,
            watchdog=self.verdict,
            watchdog_detail=self.detail,
            errors={rank: error for rank, error in errors.items() if error is not None} | dict(more_errors or {}),
            log_tails=tails | dict(more_tails or {}),
            has_result=(self._out_dir / RESULT_FILE).exists(),
            host_oom_kills=count_oom_kills() - self._oom_kills,
            lowest_available_bytes=self._lowest_bytes,
            host_floor_bytes=self.limits.host_floor_bytes,
        )


def _watch_until_end(processes: Sequence[subprocess.Popen[bytes]], exits: dict[int, RankExit], watch: Watch) -> None:
    """Return when all ranks ended, a watchdog bites, or a failed rank's peers had their grace."""
    first_failure: float | None = None
    while len(exits) < len(processes):
        _collect(processes, exits, watch)
        if first_failure is None and any(item.returncode for item in exits.values()):
            first_failure = watch.elapsed()
        if first_failure is not None and watch.elapsed() - first_failure > watch.limits.peer_grace_seconds:
            return
        if len(exits) < len(processes) and first_failure is None and watch.check() is not None:
            return
        time.sleep(_POLL_SECONDS)


def _collect(
    processes: Sequence[subprocess.Popen[bytes]], exits: dict[int, RankExit], watch: Watch, *, ended_by_us: bool = False
) -> None:
    for rank, process in enumerate(processes):
        status = process.poll()
        if rank not in exits and status is not None:
            exits[rank] = RankExit(rank=rank, returncode=status, ended_at=watch.elapsed(), ended_by_us=ended_by_us)


def _end_groups(processes: Sequence[subprocess.Popen[bytes]], term_grace_seconds: float) -> None:
    """SIGTERM, then SIGKILL, to every rank's whole process group; ranks that ended may have left children."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            _signal_group(process.pid, signal_number)
        deadline = time.monotonic() + term_grace_seconds
        while time.monotonic() < deadline and any(_group_lives(process) for process in processes):
            time.sleep(_POLL_SECONDS)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    return _signal_group(process.pid, 0)


def _signal_group(group: int, signal_number: int) -> bool:
    try:
        os.killpg(group, signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end_marked(mark: str, grace_seconds: float, *, but: int | None = None) -> None:
    """Kill whoever still carries the trial's mark, sessions of its own or not.

    Raises:
        MachineError: a process does not end even by SIGKILL (it is stuck in the kernel or a driver).
    """
    deadline = time.monotonic() + grace_seconds
    left = marked_processes(mark, but=but)
    while left and time.monotonic() < deadline:
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(_POLL_SECONDS)
        left = marked_processes(mark, but=but)
    if left:
        raise MachineError(
            f"processes {[process.pid for process in left]} of a trial do not end, even by SIGKILL",
            because="they wait inside the kernel, usually in a driver",
            fix="check dmesg and nvidia-smi; a restart of the machine ends them",
        )


def marked_processes(mark: str, *, but: int | None = None) -> list[psutil.Process]:
    """Every living process (`but` one) whose environment carries this trial's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == but or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(TRIAL_MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def read_tail(path: Path) -> str:
    """The end of a log, as text whatever it contains."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def read_error(path: Path) -> RankError | None:
    """`error_RANK.json`; None if there is none, or if the rank died while writing it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return RankError(**{name: str(data.get(name, "")) for name in ("type", "message", "phase", "traceback")})
    except (OSError, ValueError, AttributeError):
        return None
