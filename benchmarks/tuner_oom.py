"""How often a trial of the tuner runs out of memory: real trials on CPU ranks whose tensors are limited.

    python -m benchmarks.tuner_oom            # about 15 minutes on two idle cores; writes reports/tuner_oom.md

Studies of a tiny model as `zplan tune` runs them: the formula screens, the simulation confirms what comes near the
limit, real trials of two gloo ranks measure. Each study has a device of another size: from barely enough to plenty; or
`edge`, as large to the byte as the formula says that one configuration is, whose stage the study keeps, and whose
micro-batch is the largest that it tries; or `bent`, where the formula says nine tenths of the bytes and lets
pass what does not fit, so that the simulation has to refuse it. A trial
whose fullest rank held more live tensor bytes than the device has, counted by the trial itself, is out of memory.
Afterwards every trial's configuration is simulated too, whether the search had asked or not, and what the simulation
refused is run all the same (the first three of a study), to see whether it was right.

Limits: live tensor bytes, as max_memory_allocated counts them; what a CUDA allocator loses by fragmentation, context
and NCCL buffers is not part of a CPU rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tests import assets
from zplan.backends.base import Backend
from zplan.backends.formula import FormulaBackend
from zplan.backends.real import RealBackend
from zplan.backends.simulated import SimulatedBackend
from zplan.hardware import Cluster
from zplan.memory.estimate import estimate_memory
from zplan.model_probe import probe_config
from zplan.model_shape import ModelShape
from zplan.planner import Fixed, make_choice
from zplan.probe import probe_hardware
from zplan.recipe import Recipe
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.tuner.ledger import Record, out_of_memory
from zplan.tuner.study import Effort, run_study
from zplan.units import MIB
from zplan.zero_config import Choice

REPORT = Path(__file__).parents[1] / "reports" / "tuner_oom.md"
TRIALS = 8
BENT = 0.9
CHECKED = 3
"""Refusals of a study that are run all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a study runs on."""

    kind: Literal["round", "edge", "bent"]
    size: int
    """MiB; at the edge the micro-batch of the configuration that just fits by formula."""

    @property
    def name(self) -> str:
        """The row's."""
        return {
            "round": f"{self.size} MiB",
            "edge": f"edge of ZeRO-2, micro-batch {self.size}",
            "bent": f"{self.size} MiB, formula x {BENT}",
        }[self.kind]


DEVICES = (
    *(Device(kind="round", size=size) for size in (40, 48, 80, 160, 320)),
    *(Device(kind="edge", size=size) for size in (2, 4, 8)),
    *(Device(kind="bent", size=size) for size in (40, 80, 160)),
)


_AT_EDGE = Fixed(stage=2, gradient_checkpointing=False, offload_optimizer="none")


@dataclass
class Limited:
    """Real trials on a device of `limit_bytes`."""

    inner: Backend
    limit_bytes: int
    evidence: Literal["measured"] = "measured"

    def run(self, spec: TrialSpec) -> TrialResult:
        """The real answer; out of memory where the fullest rank held more than the device has."""
        result = self.inner.run(spec)
        peak = result.gpu_allocated_bytes or 0
        return replace(result, outcome=Outcome.GPU_OOM) if peak > self.limit_bytes else result


@dataclass
class Noted:
    """The simulation, with the questions whose configurations it refused."""

    inner: SimulatedBackend
    refused: list[TrialSpec] = field(default_factory=list)
    calls: int = 0
    evidence: Literal["simulated"] = "simulated"

    def run(self, spec: TrialSpec) -> TrialResult:
        """The simulation's answer."""
        result = self.inner.run(spec)
        self.calls += 1
        if out_of_memory(result):
            self.refused.append(spec)
        return result


@dataclass
class Bent:
    """A formula that says `factor` of the bytes on the device."""

    inner: FormulaBackend
    factor: float
    evidence: Literal["formula"] = "formula"

    def run(self, spec: TrialSpec) -> TrialResult:
        """The bent answer."""
        return self.run_all(spec, [spec.choice])[0]

    def run_all(self, spec: TrialSpec, choices: Sequence[Choice]) -> list[TrialResult]:
        """Its verdict is that of a device which is larger by as much as it says less."""
        larger = with_device(spec.cluster, int(spec.cluster.gpu.free_bytes / self.factor))
        answers = self.inner.run_all(replace(spec, cluster=larger), choices)
        return [replace(answer, **{name: self._less(getattr(answer, name)) for name in _BENT}) for answer in answers]

    def _less(self, size: int | None) -> int | None:
        return None if size is None else int(size * self.factor)


_BENT = ("gpu_allocated_bytes", "gpu_reserved_bytes", "gpu_used_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One row."""

    device: Device
    limit_bytes: int
    records: Sequence[Record]
    asked: int
    refused: int
    checked: Sequence[TrialResult]
    """What became of refused configurations that were run all the same."""
    afterwards: Sequence[TrialResult]
    """What the simulation says about each trial's configuration."""


def run_device(device: Device, model: Path, data: Path, folder: Path, real: RealBackend) -> Study:
    """One study."""
    shape = probe_config(model / "config.json", name="tiny")
    recipe = Recipe(model=str(model), dataset=str(data), dtype="fp32", max_length=256, train_batch_size=16)
    limit = limit_bytes(device, shape, recipe)
    cluster, backend, simulator = limited_cluster(limit), Limited(real, limit), Noted(SimulatedBackend(shape))
    outcome = run_study(
        recipe=recipe, shape=shape, cluster=cluster, model_path=str(model), backend=backend, simulator=simulator,
        effort=Effort(n_trials=TRIALS), study_path=str(folder / f"{device.kind}-{device.size}.journal"),
        calibration_dir=folder,
        formula=Bent(FormulaBackend(shape), BENT) if device.kind == "bent" else None, fixed=fixed(device),
    )  # fmt: skip
    return Study(
        device=device, limit_bytes=limit, records=outcome.records, asked=simulator.calls,
        refused=len(simulator.refused), checked=[backend.run(spec) for spec in simulator.refused[:CHECKED]],
        afterwards=[ask_again(shape, recipe, cluster, record) for record in outcome.records],
    )  # fmt: skip


def fixed(device: Device) -> Fixed:
    """At the edge the stage, and the micro-batch from above."""
    if device.kind != "edge":
        return Fixed()
    return replace(_AT_EDGE, settings=(f"train_micro_batch_size_per_gpu=1..{device.size}",))


def limit_bytes(device: Device, shape: ModelShape, recipe: Recipe) -> int:
    """What a rank may hold."""
    if device.kind != "edge":
        return device.size * MIB
    cluster = probe_hardware()
    choice = make_choice(shape, recipe, cluster, fixed=replace(_AT_EDGE, micro_batch=device.size))
    return estimate_memory(shape, recipe, choice, cluster).gpu.used.expected


def limited_cluster(limit_bytes: int) -> Cluster:
    """This machine's CPU ranks as devices of this size."""
    return with_device(probe_hardware(), limit_bytes)


def with_device(cluster: Cluster, limit_bytes: int) -> Cluster:
    """The same cluster with devices of this size."""
    return replace(cluster, gpu=replace(cluster.gpu, total_bytes=limit_bytes, free_bytes=limit_bytes))


def ask_again(shape: ModelShape, recipe: Recipe, cluster: Cluster, record: Record) -> TrialResult:
    """The simulation of a trial's configuration."""
    spec = TrialSpec(recipe=recipe, choice=record.choice, cluster=cluster, model_path="")
    return SimulatedBackend(shape).run(spec)


def render(studies: Sequence[Study]) -> str:
    """The report."""
    trials = [record for study in studies for record in study.records]
    lost = [record for record in trials if out_of_memory(record.result)]
    against = sum(
        out_of_memory(record.result) and out_of_memory(said)
        for study in studies
        for record, said in zip(study.records, study.afterwards, strict=True)
    )
    checked = [result for study in studies for result in study.checked]
    right = sum(map(out_of_memory, checked))
    lines = [
        "# Trials that run out of memory", "",
        f"`python -m benchmarks.tuner_oom`: {len(studies)} studies, {len(trials)} real trials on CPU ranks.", "",
        f"- Out of memory although we said `fits`: {len(lost)} of {len(trials)} trials (goal: at most 1 in 20).",
        f"- Out of memory of a configuration that the simulation says does not fit: {against} (goal 0).",
        f"- Refused by the simulation: {sum(study.refused for study in studies)} configurations that the formula had"
        f" let pass; {right} of {len(checked)} that were run all the same did not fit.", "",
        "| device | trials | ran | out of memory | fullest that ran | simulated before a trial | of them refused"
        " | run all the same | did not fit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join(
        [*lines, *map(row, studies), "", (__doc__ or "").partition("reports/tuner_oom.md\n")[2].strip(), ""]
    )


def row(study: Study) -> str:
    """A line of the table."""
    peaks = [record.result.gpu_allocated_bytes or 0 for record in study.records]
    fullest = max((peak for peak in peaks if peak <= study.limit_bytes), default=0) / study.limit_bytes
    lost = sum(out_of_memory(record.result) for record in study.records)
    ran = sum(record.result.outcome in (Outcome.OK, Outcome.PRUNED) for record in study.records)
    return (
        f"| {study.device.name} | {len(study.records)} | {ran} | {lost} | {fullest:.1%} | {study.asked} "
        f"| {study.refused} | {len(study.checked)} | {sum(map(out_of_memory, study.checked))} |"
    )


def main() -> None:
    """All studies, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", help="only devices of these kinds; writes no report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = assets.build_tiny_model(folder / "model"), assets.build_tiny_dataset(folder / "data")
        real, studies = RealBackend(folder / "trials"), []
        try:
            for device in (device for device in DEVICES if not options.kinds or device.kind in options.kinds):
                studies.append(run_device(device, model, data, folder, real))
                print(render(studies), file=sys.stderr, flush=True)
        finally:
            real.close()
    if not options.kinds:
        REPORT.write_text(render(studies), encoding="utf-8")


if __name__ == "__main__":
    main()
