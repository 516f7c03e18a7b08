"""Exit status + error files + log tails + watchdog verdict -> exactly one Outcome. Pure: no file, no process.

The rank that failed first decides. Its peers only report that it went away, so their words are read last.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from zplan.trial import Outcome
from zplan.units import format_bytes, format_seconds
from zplan.values import dataclass

Watchdog = Literal["deadline", "stalled", "host_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExit:
    """How one rank's process ended."""

    rank: int
    returncode: int
    """As `subprocess`: negative is the signal."""
    ended_at: float
    """Seconds after the start of the trial."""
    ended_by_us: bool = False
    """True if the launcher ended it because of a peer or a watchdog."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankError:
    """`error_RANK.json`, as the trainer writes it before it exits."""

    type: str
    message: str
    phase: str = ""
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that is known about how a trial ended."""

    exits: tuple[RankExit, ...]
    watchdog: Watchdog | None = None
    watchdog_detail: str = ""
    errors: Mapping[int, RankError] = field(default_factory=dict)
    log_tails: Mapping[int, str] = field(default_factory=dict)
    has_result: bool = False
    host_oom_kills: int = 0
    """Processes that the kernel killed for memory in our cgroup while the trial ran (memory.events oom_kill)."""
    lowest_available_bytes: int | None = None
    """Least host memory that the watchdog saw."""
    host_floor_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A text that decides an outcome, and what mends it."""

    outcome: Outcome
    pattern: re.Pattern[str]
    mend: str


def _rule(outcome: Outcome, pattern: str, mend: str = "") -> Rule:
    return Rule(outcome, re.compile(pattern, re.IGNORECASE), mend)


RULES: tuple[Rule, ...] = (
    # The machine: checked first, because a broken machine also prints what looks like other failures.
    _rule(Outcome.ENV_BROKEN, r"due to ninja not being installed|Ninja is required to load", "pip install ninja"),
    _rule(
        Outcome.ENV_BROKEN,
        r"async_io requires the dev libaio|Unable to JIT load the async_io op",
        "apt-get install libaio-dev",
    ),
    _rule(
        Outcome.ENV_BROKEN,
        r"Error building extension|CUDA_HOME does not exist|command.*c\+\+.*No such file|"
        r"Unable to JIT load the \w+ op|fatal error: Python\.h",
        "install a C++ compiler (apt-get install g++ python3-dev), and the CUDA toolkit that torch was built with",
    ),
    _rule(
        Outcome.ENV_BROKEN,
        r"CUDAMismatchException|CUDA driver version is insufficient|NVIDIA driver on your system is too old|"
        r"no kernel image is available|Installed CUDA version .* does not match",
        "install the driver and toolkit that this torch build needs: python -m torch.utils.collect_env",
    ),
    _rule(
        Outcome.ENV_BROKEN,
        r"Cannot allocate memory.*(mlock|memlock)|RLIMIT_MEMLOCK|ibv_reg_mr.*Cannot allocate|ulimit -l",
        "ulimit -l unlimited (docker run --ulimit memlock=-1)",
    ),
    _rule(
        Outcome.ENV_BROKEN,
        r"No space left on device.*(/dev/shm|shm)|unable to (open|allocate) shared memory",
        "a larger /dev/shm (docker run --shm-size=16g)",
    ),
    _rule(Outcome.ENV_BROKEN, r"No space left on device|\[Errno 28\]", "free disk space"),
    _rule(
        Outcome.ENV_BROKEN,
        r"ncclSystemError|ncclInternalError|ncclUnhandledCudaError|NCCL WARN.*(Bootstrap|Could not find)|"
        r"NCCL error.*(unhandled system|internal) error",
        "NCCL_DEBUG=INFO zplan inspect; check NCCL_SOCKET_IFNAME and that all GPUs see each other",
    ),
    _rule(Outcome.ENV_BROKEN, r"ModuleNotFoundError: No module named", "make setup"),
    _rule(Outcome.ENV_BROKEN, r"(?<!Lazy)ImportError: ", "make setup"),
    _rule(Outcome.ENV_BROKEN, r"EADDRINUSE|Address already in use", "end the process that holds the port; run again"),
    _rule(Outcome.ENV_BROKEN, r"zplan\.errors\.MachineError: [^\n]*(\n  because: [^\n]*)?(\n  try: [^\n]*)?"),
    # GPU memory.
    _rule(Outcome.GPU_OOM, r"torch\.OutOfMemoryError|OutOfMemoryError: CUDA|CUDA out of memory|HIP out of memory"),
    _rule(Outcome.GPU_OOM, r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|CUDA error: out of memory"),
    _rule(Outcome.GPU_OOM, r"NCCL.*Cuda failure.*out of memory"),
    # Host memory; on CPU ranks this is also the device's memory.
    _rule(Outcome.HOST_OOM, r"DefaultCPUAllocator: (can't allocate|not enough) memory"),
    _rule(Outcome.HOST_OOM, r"Cannot allocate memory|MemoryError|std::bad_alloc"),
    _rule(Outcome.HOST_OOM, r"cudaHostAlloc|pin_memory.*out of memory"),
    # The configuration.
    _rule(Outcome.BAD_CONFIG, r"DeepSpeedConfigError|extra_forbidden|Extra inputs are not permitted|ValidationError"),
    _rule(Outcome.BAD_CONFIG, r"Check batch related parameters|DeepSpeed config values that mismatch"),
    _rule(Outcome.BAD_CONFIG, r"is not supported on your device|had not been implemented on CPU backend"),
    _rule(Outcome.BAD_CONFIG, r"Partial offloading only supported|Hybrid Optimizer Only Supports"),
    # A collective that ran into its own timeout: somebody hung.
    _rule(Outcome.TIMED_OUT, r"Timed out waiting \d+ms|Watchdog caught collective operation timeout"),
)
_PEER_LEFT = re.compile(r"Connection (closed|reset) by peer|Broken pipe|GLHF", re.IGNORECASE)
"""What gloo says on the ranks that did not fail."""
_CONFIG_ERRORS = {"AssertionError", "ValueError", "ConfigError", "TypeError", "KeyError", "NotImplementedError"}
"""Raised by DeepSpeed, transformers and TRL for settings that they refuse; only before the first step."""
_BEFORE_FIRST_STEP = {"", "load", "init", "spec"}


def classify(observed: Observed) -> tuple[Outcome, str]:
    """The outcome, and one line that says what happened and what to type."""
    if observed.watchdog is not None:
        return _watchdog_outcome(observed)
    failed = [item for item in observed.exits if item.returncode != 0 and not item.ended_by_us]
    if not failed:
        if observed.has_result:
            return Outcome.OK, ""
        return Outcome.RANK_LOST, "every rank ended with status 0, but none wrote result.json"
    return _first_failure(observed, sorted(failed, key=lambda item: (_only_lost_a_peer(observed, item), item.ended_at)))


def _watchdog_outcome(observed: Observed) -> tuple[Outcome, str]:
    if observed.watchdog == "host_memory":
        return Outcome.HOST_OOM, (
            f"ended by the watchdog: only {format_bytes(observed.lowest_available_bytes)} of host memory were left, "
            f"below the floor of {format_bytes(observed.host_floor_bytes)}"
        )
    reason = "went past its deadline" if observed.watchdog == "deadline" else "made no progress"
    return Outcome.TIMED_OUT, f"{reason} ({observed.watchdog_detail})"


def _only_lost_a_peer(observed: Observed, item: RankExit) -> bool:
    error = observed.errors.get(item.rank)
    text = f"{error.message}\n{error.traceback}" if error else observed.log_tails.get(item.rank, "")
    return item.returncode > 0 and _PEER_LEFT.search(text) is not None


def _first_failure(observed: Observed, failed: list[RankExit]) -> tuple[Outcome, str]:
    """Classify by the first rank that failed on its own."""
    first = failed[0]
    error = observed.errors.get(first.rank)
    text = f"{error.type}: {error.message}\n{error.traceback}" if error else observed.log_tails.get(first.rank, "")
    if first.returncode < 0 and error is None:
        return _by_signal(observed, first)
    for rule in RULES:
        match = rule.pattern.search(text)
        if match:
            mend = f"; try: {rule.mend}" if rule.mend else ""
            return rule.outcome, f"rank {first.rank}: {_line_of(text, match)}{mend}"
    if error is not None and error.phase in _BEFORE_FIRST_STEP and error.type.rpartition(".")[2] in _CONFIG_ERRORS:
        return Outcome.BAD_CONFIG, f"rank {first.rank}: {_first_line(f'{error.type}: {error.message}')}"
    what = _first_line(f"{error.type}: {error.message}") if error else f"{_last_line(text)}"
    after = format_seconds(first.ended_at)
    return Outcome.RANK_LOST, f"rank {first.rank} ended with status {first.returncode} after {after}: {what}"


def _by_signal(observed: Observed, first: RankExit) -> tuple[Outcome, str]:
    name = signal.Signals(-first.returncode).name if -first.returncode in set(signal.Signals) else str(first.returncode)
    if first.returncode == -signal.SIGKILL and observed.host_oom_kills > 0:
        return Outcome.HOST_OOM, f"rank {first.rank} was killed by the kernel for memory (cgroup oom_kill)"
    where = _last_line(observed.log_tails.get(first.rank, ""))
    said = f"; last line: {where}" if where else ""
    return Outcome.RANK_LOST, f"rank {first.rank} was ended by {name} after {format_seconds(first.ended_at)}{said}"


def _line_of(text: str, match: re.Match[str]) -> str:
    start = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.end())
    return text[start : end if end >= 0 else len(text)].strip()[:300]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2][:300]
