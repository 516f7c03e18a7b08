"""What trials on this machine teach the formulas: measured / predicted, kept per machine and library versions.

A correction is the median ratio over the trials, one for GPU bytes, one for host bytes, one for tokens/s. It is judged
on trials that it has not seen: each trial by the median of the others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Literal

from zplan import files
from zplan.backends.base import Backend
from zplan.hardware import Cluster
from zplan.trial import Outcome, TrialResult, TrialSpec

_LEAST_SAMPLES = 3
"""Below this a median is a guess."""
_MOST_SAMPLES = 400
Quantity = Literal["gpu_bytes", "host_bytes", "tokens_per_second"]
QUANTITIES: tuple[Quantity, ...] = ("gpu_bytes", "host_bytes", "tokens_per_second")
_FIELDS: dict[Quantity, tuple[str, ...]] = {
    "gpu_bytes": ("gpu_allocated_bytes", "gpu_reserved_bytes", "gpu_used_bytes"),
    "host_bytes": ("host_resident_bytes",),
    "tokens_per_second": ("tokens_per_second",),
}
"""TrialResult fields that one ratio corrects; the first is the one that is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trial: log(measured / predicted) of each quantity that both know."""

    trial: str
    """Study and trial number: a trial counts once, however often its study is read."""
    log_ratios: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """Everything that trials on one machine with one set of versions have shown."""

    schema: Literal["zplan.calibration/1"] = "zplan.calibration/1"
    machine: str
    versions: Mapping[str, str]
    samples: tuple[Sample, ...] = field(default=())

    def ratio(self, quantity: Quantity, *, without: str | None = None) -> float | None:
        """measured / predicted, the median over the trials; None if too few know it."""
        found = [s.log_ratios[quantity] for s in self.samples if quantity in s.log_ratios and s.trial != without]
        return exp(median(found)) if len(found) >= _LEAST_SAMPLES else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Median absolute error of one quantity, as a fraction, over `num_trials`."""

    quantity: Quantity
    num_trials: int
    before: float
    after: float | None
    """Each trial corrected by the others only; None while there are too few."""


def machine_name(cluster: Cluster) -> str:
    """One machine, whatever is free on it now."""
    gpu, host = cluster.gpu, cluster.host
    return f"{cluster.nodes}x{cluster.gpus_per_node} {gpu.name} {gpu.total_bytes} host {host.total_bytes}"


def corrections_path(cluster: Cluster, folder: Path | None = None) -> Path:
    """The machine's file: $XDG_CACHE_HOME/zplan/calibration by default."""
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zplan" / "calibration"
    return folder / f"{hashlib.sha256(machine_name(cluster).encode()).hexdigest()[:16]}.json"


def load_corrections(cluster: Cluster, versions: Mapping[str, str], folder: Path | None = None) -> Corrections:
    """What is known about this machine; nothing if its libraries have changed since.

    Raises:
        ConfigError: the file is damaged.
    """
    path = corrections_path(cluster, folder)
    nothing = Corrections(machine=machine_name(cluster), versions=dict(versions))
    if not path.exists():
        return nothing
    known = files.load(Corrections, path)
    return known if dict(known.versions) == dict(versions) and known.machine == nothing.machine else nothing


def learn(corrections: Corrections, pairs: Mapping[str, tuple[TrialResult, TrialResult]]) -> Corrections:
    """The corrections with more trials: name -> (predicted by the plain formula, measured)."""
    samples = {sample.trial: sample for sample in corrections.samples}
    for trial, (predicted, measured) in pairs.items():
        ratios = log_ratios(predicted, measured)
        if ratios:
            samples[trial] = Sample(trial=trial, log_ratios=ratios)
    return replace(corrections, samples=tuple(samples.values())[-_MOST_SAMPLES:])


def save_corrections(corrections: Corrections, cluster: Cluster, folder: Path | None = None) -> Path:
    """Keep them for later estimates on this machine."""
    path = corrections_path(cluster, folder)
    files.save(corrections, path)
    return path


def log_ratios(predicted: TrialResult, measured: TrialResult) -> dict[str, float]:
    """log(measured / predicted) of what both know; nothing for a trial that did not run to its end."""
    if measured.outcome is not Outcome.OK:
        return {}
    found: dict[str, float] = {}
    for quantity in QUANTITIES:
        name = _FIELDS[quantity][0]
        said, was = getattr(predicted, name), getattr(measured, name)
        if said and was:
            found[quantity] = log(was / said)
    return found


def apply(result: TrialResult, corrections: Corrections) -> TrialResult:
    """A prediction, corrected and labelled `calibrated`; unchanged while the machine is unknown.

    The verdict stays the formula's: fewer bytes by correction never turn "does not fit" into "fits" without a trial.
    """
    changes: dict[str, object] = {}
    for quantity in QUANTITIES:
        ratio = corrections.ratio(quantity)
        for name in _FIELDS[quantity]:
            value = getattr(result, name)
            if ratio is not None and value is not None:
                changes[name] = round(value * ratio) if name.endswith("_bytes") else value * ratio
    speed = corrections.ratio("tokens_per_second")
    if speed is not None and result.step_seconds is not None:
        changes["step_seconds"] = result.step_seconds / speed
    return replace(result, evidence="calibrated", **changes) if changes else result  # type: ignore[arg-type]


class CalibratedBackend:
    """A backend whose answers are corrected for this machine."""

    evidence: Literal["calibrated"] = "calibrated"

    def __init__(self, backend: Backend, corrections: Corrections) -> None:
        self._backend = backend
        self._corrections = corrections

    def run(self, spec: TrialSpec) -> TrialResult:
        """The inner backend's answer, corrected."""
        return apply(self._backend.run(spec), self._corrections)


def accuracy(corrections: Corrections) -> tuple[Accuracy, ...]:
    """Prediction error before and after correction, each trial judged by the median of the others."""
    found = []
    for quantity in QUANTITIES:
        seen = [sample for sample in corrections.samples if quantity in sample.log_ratios]
        if not seen:
            continue
        before = [abs(exp(-sample.log_ratios[quantity]) - 1) for sample in seen]
        after = _errors_after(corrections, seen, quantity)
        found.append(
            Accuracy(
                quantity=quantity,
                num_trials=len(seen),
                before=median(before),
                after=median(after) if after else None,
            )
        )
    return tuple(found)


def _errors_after(corrections: Corrections, seen: Sequence[Sample], quantity: Quantity) -> list[float]:
    errors = []
    for sample in seen:
        ratio = corrections.ratio(quantity, without=sample.trial)
        if ratio is not None:
            errors.append(abs(ratio * exp(-sample.log_ratios[quantity]) - 1))
    return errors
