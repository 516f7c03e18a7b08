"""`zplan simulate`: one configuration, run by the installed engine on simulated GPUs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from zplan.answer import estimate_data
from zplan.backends.simulated import simulate as run_simulation
from zplan.commands import Answer
from zplan.errors import ConfigError, ExitCode
from zplan.job import Job
from zplan.planner import Candidate, evaluate
from zplan.report.simulation import render_simulation
from zplan.report.terminal import question_lines
from zplan.simulate.report import SimulationReport


def simulate(job: Job, *, steps: int, trace: str | None, quiet: bool) -> Answer:
    """Exact bytes of one configuration; the formula's answer stands beside them.

    Raises:
        ConfigError: no stage given.
        SimulationError: a module or an operation cannot run on fake tensors; it is named.
    """
    if steps < 1:
        raise ConfigError(f"--steps is {steps}, below 1", fix="--steps 2")
    choice = job.choice_or_refuse()
    candidate = evaluate(job.shape, job.recipe, choice, job.cluster)
    report = run_simulation(job.shape, job.recipe, choice, job.cluster, steps=steps, trace=trace)
    fits = not report.oom_message and report.gpu_reserved_bytes <= job.cluster.gpu.free_bytes
    body = render_simulation(report, candidate, fits=fits)
    return Answer(
        data=lambda: _data(job, candidate, report, fits=fits),
        text=body if quiet else _headed(job, body),
        code=ExitCode.OK if fits else ExitCode.DOES_NOT_FIT,
    )


def _headed(job: Job, body: RenderableType) -> RenderableType:
    return Group(question_lines(job.shape, job.recipe, job.cluster), Text(), body)


def _data(job: Job, candidate: Candidate, report: SimulationReport, *, fits: bool) -> dict[str, Any]:
    """The estimate's fields with simulated bytes where the engine ran, and the whole report under `simulation`."""
    data = estimate_data(
        candidate, shape=job.shape, recipe=job.recipe, cluster=job.cluster, origins=job.origins, evidence="simulated"
    )
    for name, value in (("allocated_bytes", report.gpu_allocated_bytes), ("reserved_bytes", report.gpu_reserved_bytes)):
        data["gpu"][name] = {"low": value, "expected": value, "high": value}
    free = job.cluster.gpu.free_bytes
    data["gpu"]["phases"] = {**data["gpu"]["phases"], **report.allocated_phases}
    data["gpu"]["verdict"] = "fits" if fits else "does_not_fit"
    data["gpu"]["short_bytes"] = max(0, report.gpu_reserved_bytes - free)
    data["simulation"] = asdict(report)
    return data
