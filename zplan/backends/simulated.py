"""SimulatedBackend: a dry run of the installed engine, in a child process, as a TrialResult."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from zplan.backends.formula import FormulaBackend
from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.memory.host import PROCESS_CPU, PROCESS_CUDA
from zplan.memory.outside import ranks_of_node
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.simulate.client import SimulationTimeoutError, WorkerClient, shared_worker
from zplan.simulate.report import SimulationError, SimulationReport
from zplan.simulate.request import SimulationRequest
from zplan.speed.estimate import estimate_speed
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.units import format_bytes
from zplan.zero_config import Choice


def simulate(
    shape: ModelShape,
    recipe: Recipe,
    choice: Choice,
    cluster: Cluster,
    *,
    steps: int = 2,
    trace: Path | str | None = None,
    layers: int | None = None,
    deadline_seconds: float = 600.0,
    worker: WorkerClient | None = None,
) -> SimulationReport:
    """Run the engine on simulated devices, in a child process that stays warm for the next question.

    Args:
        trace: file for a Chrome / Perfetto trace.
        layers: this many layers instead of the model's.

    Raises:
        SimulationError: names the module and the operation that could not run; the formula still answers.
        MachineError: the child process does not start.
    """
    request = SimulationRequest(
        config=with_layers(shape, layers),
        recipe=recipe,
        choice=choice,
        cluster=cluster,
        steps=steps,
        trace=str(Path(trace).absolute()) if trace is not None else None,
        alloc_conf=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    )
    return (worker or shared_worker()).ask(request, deadline_seconds=deadline_seconds)


def with_layers(shape: ModelShape, layers: int | None) -> Mapping[str, Any]:
    """config.json of the model, or of a shorter one."""
    if not shape.config:
        raise ConfigError(
            f"{shape.name} comes without its config.json", because="the simulation builds the model from it",
            fix="--model FOLDER",
        )  # fmt: skip
    if layers is None:
        return shape.config
    config = {**shape.config, "num_hidden_layers": layers}
    if config.get("layer_types"):
        config["layer_types"] = list(config["layer_types"])[:layers]
    return config


class SimulatedBackend:
    """Bytes from a dry run of the installed engine; seconds per step are the speed model's."""

    evidence: Literal["simulated"] = "simulated"

    def __init__(self, shape: ModelShape, *, worker: WorkerClient | None = None) -> None:
        self.shape = shape
        self.worker = worker

    def run(self, spec: TrialSpec) -> TrialResult:
        """Bytes by simulation; by formula, labelled so, where a simulated tensor cannot do what the model needs.

        Raises:
            MachineError: the child process does not start.
        """
        try:
            report = simulate(
                self.shape, spec.recipe, spec.choice, spec.cluster,
                deadline_seconds=spec.deadline_seconds, worker=self.worker,
            )  # fmt: skip
        except SimulationTimeoutError as error:
            return TrialResult(outcome=Outcome.TIMED_OUT, evidence="simulated", message=error.what)
        except SimulationError as error:
            if error.cause == "unsupported":
                answer = FormulaBackend(self.shape).run(spec)
                return replace(answer, message="; ".join(filter(None, (answer.message, f"by formula: {error.what}"))))
            outcome = Outcome.ENV_BROKEN if error.cause == "broken" else Outcome.BAD_CONFIG
            return TrialResult(outcome=outcome, evidence="simulated", message=error.what)
        speed = estimate_speed(self.shape, spec.recipe, spec.choice, spec.cluster)
        return replace(
            as_result(report, spec), step_seconds=speed.step_seconds, tokens_per_second=speed.tokens_per_second
        )


def as_result(report: SimulationReport, spec: TrialSpec) -> TrialResult:
    """A report as the answer that the tuner compares."""
    ranks = ranks_of_node(spec.choice, spec.cluster)
    resident = host_bytes_of_node(report, ranks, on_cpu=spec.cluster.gpu.kind == "cpu")
    short = resident - spec.cluster.host.available_bytes
    outcome, message = Outcome.OK, ""
    if report.oom_message:
        outcome, message = Outcome.GPU_OOM, report.oom_message
    elif short > 0:
        outcome, message = Outcome.HOST_OOM, f"host memory is short by {format_bytes(short)}"
    return TrialResult(
        outcome=outcome,
        evidence="simulated",
        message=message,
        gpu_allocated_bytes=report.gpu_allocated_bytes,
        gpu_reserved_bytes=report.gpu_reserved_bytes,
        gpu_used_bytes=report.gpu_used_bytes,
        host_resident_bytes=resident,
        host_pinned_bytes=max(report.pinned_phases.values(), default=0) * ranks,
        phases=dict(report.allocated_phases),
        wall_seconds=report.wall_seconds,
        versions=dict(report.versions),
    )


def host_bytes_of_node(report: SimulationReport, ranks: int, *, on_cpu: bool) -> int:
    """Simulated tensors of every rank of a node, and the processes themselves, which are not simulated."""
    if on_cpu:
        return ranks * (report.gpu_allocated_bytes + PROCESS_CPU)
    return ranks * (report.host_tensor_bytes + PROCESS_CUDA)
