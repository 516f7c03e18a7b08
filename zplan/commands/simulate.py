"""`zplan simulate`: one configuration, run by the installed engine on simulated GPUs."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from zplan.answer import estimate_data, limits_data
from zplan.backends.simulated import as_result
from zplan.backends.simulated import simulate as run_simulation
from zplan.commands import Answer
from zplan.errors import ConfigError, ExitCode
from zplan.job import Job
from zplan.memory.host_limits import limit_notes, verdict_of
from zplan.memory.terms import VERDICTS, HostLimit, NvmeEstimate, Phase, Verdict
from zplan.planner import Candidate, evaluate
from zplan.report.simulation import render_simulation
from zplan.report.terminal import question_lines, render_detail
from zplan.simulate.report import SimulationError, SimulationReport
from zplan.trial import Evidence, Outcome, TrialResult, TrialSpec
from zplan.units import format_bytes

_OF_RESIDENT = ("available memory", "cgroup")
"""Limits of what is resident; the others keep what the formula says is needed of them."""
_NOT_PLAYED: tuple[Phase, ...] = ("load", "save")
"""Phases of the host that a simulation does not go through as training does: weights are neither read nor written."""


def simulate(job: Job, *, steps: int, trace: str | None, quiet: bool) -> Answer:
    """Exact bytes of one configuration; the formula's answer stands beside them, or instead where none can be had.

    Raises:
        ConfigError: no stage given.
        SimulationError: a library refuses the question, or this machine's versions are in the way.
    """
    if steps < 1:
        raise ConfigError(f"--steps is {steps}, below 1", fix="--steps 2")
    choice = job.choice_or_refuse()
    candidate = evaluate(job.shape, job.recipe, choice, job.cluster)
    try:
        report = run_simulation(job.shape, job.recipe, choice, job.cluster, steps=steps, trace=trace)
    except SimulationError as error:
        if error.cause != "unsupported":
            raise
        return _by_formula(job, candidate, error, quiet=quiet)
    spec = TrialSpec(recipe=job.recipe, choice=choice, cluster=job.cluster, model_path="")
    result = as_result(report, spec)
    resident = max(result.host_resident_bytes or 0, _files_bytes(candidate))
    limits = _limits(candidate, resident)
    verdict = max(_gpu_verdict(result, job), verdict_of(limits)[0], candidate.memory.nvme.verdict, key=VERDICTS.index)
    problems = [result.message, *limit_notes(limits), _nvme_note(candidate.memory.nvme)]
    if resident > (result.host_resident_bytes or 0):  # reading or writing the weights takes more than the steps do
        told = f"host while weights are read or written: {format_bytes(resident)} a node, by formula"
        short = resident - job.cluster.host.available_bytes
        if short > 0:
            problems.append(f"{told}, short by {format_bytes(short)}")
        else:
            report = replace(report, notes=(*report.notes, told))
    body = render_simulation(report, candidate, verdict=verdict, problems=tuple(filter(None, problems)))
    return Answer(
        data=lambda: _data(job, candidate, report, result, resident, limits),
        text=body if quiet else _headed(job, body),
        code=ExitCode.DOES_NOT_FIT if verdict == "does_not_fit" else ExitCode.OK,
    )


def _gpu_verdict(result: TrialResult, job: Job) -> Verdict:
    """Tight: the allocator gets through only by giving its cache back, again and again."""
    if result.outcome is Outcome.GPU_OOM:
        return "does_not_fit"
    return "fits" if (result.gpu_used_bytes or 0) <= job.cluster.gpu.free_bytes else "tight"


def _files_bytes(candidate: Candidate) -> int:
    """A node's host bytes while the weights are read and written, by formula."""
    return max(candidate.memory.host.phases.get(phase, 0) for phase in _NOT_PLAYED)


def _limits(candidate: Candidate, resident: int) -> tuple[HostLimit, ...]:
    """The node's limits against what is resident there."""
    return tuple(
        replace(limit, needed_bytes=resident) if limit.name in _OF_RESIDENT else limit
        for limit in candidate.memory.host.limits
    )


def _nvme_note(nvme: NvmeEstimate) -> str:
    return f"NVMe is short by {format_bytes(nvme.short_bytes)}, by formula" if nvme.verdict == "does_not_fit" else ""


def _estimate(job: Job, candidate: Candidate, evidence: Evidence) -> dict[str, Any]:
    """What `estimate --json` answers, under the label of what answers here."""
    return estimate_data(
        candidate,
        shape=job.shape,
        recipe=job.recipe,
        cluster=job.cluster,
        origins=job.origins,
        warnings=job.warnings,
        evidence=evidence,
    )


def _by_formula(job: Job, candidate: Candidate, error: SimulationError, *, quiet: bool) -> Answer:
    """The formula's answer, labelled so, with the module and the operation that the simulation stopped at."""

    def data() -> dict[str, Any]:
        answer = _estimate(job, candidate, "formula")
        stopped = {"what": error.what, "module": error.module or None, "operation": error.operation or None}
        return {**answer, "simulation": None, "simulation_error": stopped}

    said = Text(f"not simulated: {error.what}\nwhat follows is the formula's answer", style="yellow")
    body = Group(said, Text(), render_detail(candidate, (), verbose=False))
    return Answer(
        data=data,
        text=body if quiet else _headed(job, body),
        code=ExitCode.OK if candidate.memory.fits else ExitCode.DOES_NOT_FIT,
    )


def _headed(job: Job, body: RenderableType) -> RenderableType:
    warned = [Text(f"warning: {line}", style="yellow") for line in job.warnings]
    return Group(question_lines(job.shape, job.recipe, job.cluster), Text(), body, *warned)


def _data(
    job: Job, candidate: Candidate, report: SimulationReport, result: TrialResult, resident: int,
    limits: tuple[HostLimit, ...],
) -> dict[str, Any]:  # fmt: skip
    """The estimate's fields with simulated bytes where the engine ran, and the whole report under `simulation`."""
    data = _estimate(job, candidate, "simulated")
    for name in ("allocated_bytes", "reserved_bytes", "used_bytes"):
        data["gpu"][name] = dict.fromkeys(("low", "expected", "high"), getattr(report, f"gpu_{name}"))
    data["gpu"]["phases"] = {**data["gpu"]["phases"], **report.allocated_phases}
    data["gpu"]["verdict"] = _gpu_verdict(result, job)
    data["gpu"]["short_bytes"] = max(0, report.gpu_used_bytes - job.cluster.gpu.free_bytes)
    verdict, short = verdict_of(limits)
    data["host"] |= {
        "resident_bytes": resident, "pinned_bytes": result.host_pinned_bytes, "short_bytes": short,
        "verdict": verdict, "limits": limits_data(limits),
    }  # fmt: skip
    data["speed"]["evidence"] = "formula"
    data["simulation"] = asdict(report)
    return data
