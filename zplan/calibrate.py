"""What trials on this machine teach the formulas: measured / predicted, kept per machine and library versions.

A correction is the median ratio over the trials, one for GPU bytes, one for host bytes, one for tokens/s. It is judged
on trials that it has not seen: each trial by the median of the others.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields, replace
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zplan import files
from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.values import dataclass
from zplan.versions import installed_version

if TYPE_CHECKING:
    from zplan.trial import TrialResult

_LEAST_SAMPLES = 3
"""Below this a median is a guess."""
_MOST_SAMPLES = 400
_LIBRARIES = ("zplan", "torch", "deepspeed", "transformers", "trl", "peft", "accelerate", "optuna")
_SCHEMA = "zplan.calibration/2"
_OUTDATED = {
    "zplan.calibration/1": "its trials warmed up for one step, and the peak of a training is that of its second"
}
"""Earlier schemas, and why what they hold is not used any more."""
Quantity = Literal["gpu_bytes", "host_bytes", "tokens_per_second"]
QUANTITIES: tuple[Quantity, ...] = ("gpu_bytes", "host_bytes", "tokens_per_second")
_FIELDS: dict[Quantity, str] = {
    "gpu_bytes": "gpu_allocated_bytes",
    "host_bytes": "host_resident_bytes",
    "tokens_per_second": "tokens_per_second",
}
"""The field of TrialResult that is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trial: log(measured / predicted) of each quantity that both know."""

    trial: str
    """Study and trial number: a trial counts once, however often its study is read."""
    log_ratios: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """Everything that trials on one machine with one set of versions have shown."""

    schema: Literal["zplan.calibration/2"] = "zplan.calibration/2"
    machine: str
    versions: Mapping[str, str]
    samples: tuple[Sample, ...] = field(default=())

    def ratio(self, quantity: Quantity, *, without: str | None = None) -> float | None:
        """measured / predicted, the median over the trials; None if too few know it."""
        from statistics import median  # 10 ms, and only a calibrated machine needs it

        found = [s.log_ratios[quantity] for s in self.samples if quantity in s.log_ratios and s.trial != without]
        return exp(median(found)) if len(found) >= _LEAST_SAMPLES else None


_KEYS = {item.name for item in fields(Corrections)}
_SAMPLE_KEYS = {item.name for item in fields(Sample)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Median absolute error of one quantity, as a fraction, over `num_trials`."""

    quantity: Quantity
    num_trials: int
    before: float
    after: float | None
    """Each trial corrected by the others only; None while there are too few."""


def machine_name(cluster: Cluster) -> str:
    """One machine, whatever is free on it now and however many of its GPUs are used."""
    gpu, host = cluster.gpu, cluster.host
    size = f" {gpu.total_bytes}" if gpu.kind == "cuda" else ""  # a CPU rank is as large as its share of the host
    return f"{gpu.name}{size} host {host.total_bytes}"


def library_versions() -> dict[str, str]:
    """Installed versions of what decides a trial's numbers."""
    found = {name: installed_version(name) for name in _LIBRARIES}
    return {name: version for name, version in found.items() if version is not None}


def corrections_path(cluster: Cluster, folder: Path | None = None) -> Path:
    """The machine's file: $XDG_CACHE_HOME/zplan/calibration by default."""
    import hashlib  # loads OpenSSL

    return (folder or _folder()) / f"{hashlib.sha256(machine_name(cluster).encode()).hexdigest()[:16]}.json"


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zplan" / "calibration"


def _saved(cluster: Cluster, folder: Path | None) -> Path | None:
    """The machine's file if there is one; a user who never tuned has not even the folder."""
    if not (folder or _folder()).is_dir():
        return None
    path = corrections_path(cluster, folder)
    return path if path.exists() else None


def load_corrections(cluster: Cluster, versions: Mapping[str, str], folder: Path | None = None) -> Corrections:
    """What is known about this machine; nothing if its libraries, or the way trials measure, have changed since.

    Raises:
        ConfigError: the file is damaged.
    """
    path = _saved(cluster, folder)
    nothing = Corrections(machine=machine_name(cluster), versions=dict(versions))
    if path is None:
        return nothing
    try:
        with _named(path):
            data = files.load_json(path)
            known = _as_saved(data) or files.from_data(Corrections, data, name=str(path))
    except ConfigError:
        if outdated(cluster, folder):
            return nothing
        raise
    return known if dict(known.versions) == dict(versions) and known.machine == nothing.machine else nothing


def _as_saved(data: Any) -> Corrections | None:
    """What `remember` saved, without the 90 ms of pydantic; None for anything else, which pydantic may explain."""
    if not isinstance(data, dict) or data.keys() != _KEYS or data["schema"] != _SCHEMA:
        return None
    machine, versions, samples = data["machine"], data["versions"], data["samples"]
    if not (isinstance(machine, str) and _maps_to(str, versions) and isinstance(samples, list)):
        return None
    for sample in samples:
        if not (isinstance(sample, dict) and sample.keys() == _SAMPLE_KEYS and isinstance(sample["trial"], str)):
            return None
        if not _maps_to(float, sample["log_ratios"]):
            return None
    return Corrections(machine=machine, versions=versions, samples=tuple(Sample(**sample) for sample in samples))


def _maps_to(kind: type, value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says what the file is that cannot be read, and that it may be deleted."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            error.what,
            because="what trials taught about this machine is kept there; it is damaged, or of another zplan",
            fix=f"rm {path}",
            problems=error.problems,
        ) from error


def outdated(cluster: Cluster, folder: Path | None = None) -> str:
    """A line that says why what earlier trials taught about this machine is not used; empty if it is, or there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = _saved(cluster, folder)
    if path is None:
        return ""
    with _named(path):
        data = files.load_json(path)
    reason = _OUTDATED.get(str(data.get("schema"))) if isinstance(data, dict) else None
    return f"the corrections in {path} are not used: {reason}; zplan tune measures anew" if reason else ""


def known_corrections(cluster: Cluster, folder: Path | None = None) -> Corrections | None:
    """What trials have taught about this machine; None before they have taught enough."""
    if _saved(cluster, folder) is None:
        return None
    known = load_corrections(cluster, library_versions(), folder)
    return known if any(known.ratio(quantity) is not None for quantity in QUANTITIES) else None


def learn(corrections: Corrections, pairs: Mapping[str, tuple[TrialResult, TrialResult]]) -> Corrections:
    """The corrections with more trials: name -> (predicted by the plain formula, measured)."""
    samples = {sample.trial: sample for sample in corrections.samples}
    for trial, (predicted, measured) in pairs.items():
        ratios = log_ratios(predicted, measured)
        if ratios:
            samples[trial] = Sample(trial=trial, log_ratios=ratios)
    return replace(corrections, samples=tuple(samples.values())[-_MOST_SAMPLES:])


def remember(
    cluster: Cluster, pairs: Mapping[str, tuple[TrialResult, TrialResult]], folder: Path | None = None
) -> Corrections:
    """Keep what these trials say for later estimates on this machine; tuners that do so at once wait for each other."""
    path = corrections_path(cluster, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = load_corrections(cluster, library_versions(), folder)
        learned = learn(known, pairs)
        if learned != known:
            files.save(learned, path)
    return learned


def log_ratios(predicted: TrialResult, measured: TrialResult) -> dict[str, float]:
    """log(measured / predicted) of what both know; nothing for a trial that did not run to its end."""
    from zplan.trial import Outcome  # only who has run trials needs it

    if measured.outcome is not Outcome.OK:
        return {}
    found: dict[str, float] = {}
    for quantity in QUANTITIES:
        name = _FIELDS[quantity]
        said, was = getattr(predicted, name), getattr(measured, name)
        if said and was:
            found[quantity] = log(was / said)
    return found


def accuracy(corrections: Corrections) -> tuple[Accuracy, ...]:
    """Prediction error before and after correction, each trial judged by the median of the others."""
    from statistics import median

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
