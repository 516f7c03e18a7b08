"""TrialSpec: one question. TrialResult: one answer. Three backends give it (formula, simulated, real).

`spec.json` and `result.json` are these two values: the only interface between zplan and the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from enum import StrEnum
from math import log, sqrt
from typing import Literal

from zplan.hardware import Cluster
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice

Evidence = Literal["formula", "simulated", "measured", "calibrated"]

SPEC_FILE = "spec.json"
RESULT_FILE = "result.json"
"""Written by rank 0, atomically, after every rank has reported."""


def error_file(rank: int) -> str:
    """What a rank that failed writes before it ends: type, message, phase, traceback."""
    return f"error_{rank}.json"


def progress_file(rank: int) -> str:
    """Touched by a rank when it enters a phase and at the end of every step; its mtime is the heartbeat."""
    return f"progress_{rank}"


def log_file(rank: int) -> str:
    """stdout and stderr of a rank."""
    return f"log_{rank}.txt"


WARMUP_STEPS = 2
"""Only the second has the optimizer's states while it computes, and ZeRO-3's recorded order of parameters: the peak of
a training is the peak of its second step, not of its first. The second is on the longest sequences, and so is the first
unless its own peak cannot matter; on CPU ranks the second is a timed one, too, where all are as long."""
_STEP_SCATTER = 0.10
"""Standard deviation of the log of one step's seconds, at the least: two or three steps cannot show it themselves."""
_BOUND_DEVIATIONS = 2.0
"""Half width of a confidence bound, in standard errors."""


def clearly_slower(step_seconds: Sequence[float], best_step_seconds: Sequence[float]) -> bool:
    """Whether a trial's lower confidence bound of log step seconds is already above the fastest trial's upper one.

        mean(log t) - 2 s / sqrt(k) > mean(log b) + 2 s / sqrt(k)

    Step i of both trains on as many tokens, so steps are compared with the best trial's first k; s is the larger of
    the sample's own deviation around the best's steps and 10 %. One step must take 1.5 times as long, two 1.33 times.
    """
    from statistics import fmean, stdev  # 10 ms, and only a trial needs it

    pairs = list(zip(step_seconds, best_step_seconds, strict=False))
    if not pairs:
        return False
    ratios = [log(mine / best) for mine, best in pairs]
    scatter = max(_STEP_SCATTER, stdev(ratios) if len(ratios) > 1 else 0.0)
    return fmean(ratios) > 2 * _BOUND_DEVIATIONS * scatter / sqrt(len(ratios))


class Outcome(StrEnum):
    """How a trial ended; exactly one."""

    OK = "ok"
    PRUNED = "pruned"
    GPU_OOM = "gpu_oom"
    HOST_OOM = "host_oom"
    TIMED_OUT = "timed_out"
    RANK_LOST = "rank_lost"
    ENV_BROKEN = "env_broken"
    BAD_CONFIG = "bad_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """Train `recipe` as `choice` says on `cluster`, for a few timed steps."""

    schema: Literal["zplan.trial/1"] = "zplan.trial/1"
    recipe: Recipe
    choice: Choice
    cluster: Cluster
    model_path: str
    """Folder with config.json and tokenizer that the trainer opens; weights only if `weights="real"`."""
    warmup_steps: int = WARMUP_STEPS
    timed_steps: int = 3
    weights: Literal["random", "real"] = "random"
    deadline_seconds: float = 600.0
    best_step_seconds: tuple[float, ...] = ()
    """Timed steps of the fastest trial so far; a trial that is clearly slower ends early, as `pruned`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What a backend answers. None is not known."""

    schema: Literal["zplan.result/1"] = "zplan.result/1"
    outcome: Outcome
    evidence: Evidence
    message: str = ""
    """One line for people: what happened, and what to type where that is known."""
    gpu_allocated_bytes: int | None = None
    """Peak per rank, worst rank: torch.cuda.max_memory_allocated; live tensor bytes on CPU ranks."""
    gpu_reserved_bytes: int | None = None
    gpu_used_bytes: int | None = None
    host_resident_bytes: int | None = None
    """Per node, all ranks."""
    host_pinned_bytes: int | None = None
    phases: Mapping[str, int] = field(default_factory=dict)
    """Phase -> peak allocated bytes on the worst rank: load, init, forward, backward, step, save."""
    step_seconds: float | None = None
    """Median of the timed steps (one optimizer step, all micro-batches)."""
    timed_step_seconds: tuple[float, ...] = ()
    """Each timed step; fewer than were asked for if the trial was pruned."""
    tokens_per_second: float | None = None
    """Real, non-padding tokens of all ranks per second of wall clock."""
    wall_seconds: float | None = None
    """Whole trial, start of the first process to the end of the last."""
    versions: Mapping[str, str] = field(default_factory=dict)
