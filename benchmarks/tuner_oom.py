"""How often a trial of the tuner runs out of memory: real trials on CPU ranks whose tensors are limited.

    python -m benchmarks.tuner_oom            # about 8 minutes on two idle cores; writes reports/tuner_oom.md

Studies of a tiny model as `zplan tune` runs them: the formula screens, the simulation confirms what comes near the
limit, real trials of two gloo ranks measure. Each study has a device of another size, from barely enough to plenty. A
trial whose fullest rank held more live tensor bytes than the device has, counted by the trial itself, is out of memory.
Afterwards every trial's configuration is simulated too, whether the search had asked or not.

Limits: live tensor bytes, as max_memory_allocated counts them; what a CUDA allocator loses by fragmentation, context
and NCCL buffers is not part of a CPU rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests import assets
from zplan.backends.base import Backend
from zplan.backends.real import RealBackend
from zplan.backends.simulated import SimulatedBackend
from zplan.hardware import Cluster
from zplan.model_probe import probe_config
from zplan.model_shape import ModelShape
from zplan.probe import probe_hardware
from zplan.recipe import Recipe
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.tuner.ledger import Record, out_of_memory
from zplan.tuner.study import run_study
from zplan.units import MIB

REPORT = Path(__file__).parents[1] / "reports" / "tuner_oom.md"
LIMITS_MIB = (40, 48, 80, 160, 320)
TRIALS = 8


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
    """The simulation, with the configurations that it refused."""

    inner: SimulatedBackend
    refusals: int = 0
    calls: int = 0
    evidence: Literal["simulated"] = "simulated"

    def run(self, spec: TrialSpec) -> TrialResult:
        """The simulation's answer."""
        result = self.inner.run(spec)
        self.calls += 1
        self.refusals += out_of_memory(result)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One row."""

    limit_mib: int
    records: Sequence[Record]
    asked: int
    refused: int
    afterwards: Sequence[TrialResult]
    """What the simulation says about each trial's configuration."""


def run_limit(limit_mib: int, model: Path, data: Path, folder: Path, real: RealBackend) -> Study:
    """One study on a device of this size."""
    shape = probe_config(model / "config.json", name="tiny")
    recipe = Recipe(model=str(model), dataset=str(data), dtype="fp32", max_length=256, train_batch_size=16)
    cluster = limited_cluster(limit_mib * MIB)
    simulator = Noted(SimulatedBackend(shape))
    outcome = run_study(
        recipe=recipe, shape=shape, cluster=cluster, model_path=str(model), backend=Limited(real, limit_mib * MIB),
        n_trials=TRIALS, study_path=str(folder / f"{limit_mib}.journal"), simulator=simulator, calibration_dir=folder,
    )  # fmt: skip
    return Study(
        limit_mib=limit_mib, records=outcome.records, asked=simulator.calls, refused=simulator.refusals,
        afterwards=[ask_again(shape, recipe, cluster, record) for record in outcome.records],
    )  # fmt: skip


def limited_cluster(limit_bytes: int) -> Cluster:
    """This machine's CPU ranks as devices of this size."""
    cluster = probe_hardware()
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
    lines = [
        "# Trials that run out of memory", "",
        f"`python -m benchmarks.tuner_oom`: {len(studies)} studies, {len(trials)} real trials on CPU ranks.", "",
        f"- Out of memory although we said `fits`: {len(lost)} of {len(trials)} trials (goal: at most 1 in 20).",
        f"- Out of memory of a configuration that the simulation says does not fit: {against} (goal 0).", "",
        "| device | trials | ran | out of memory | fullest that ran | simulated before a trial | of them refused |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for study in studies:
        peaks = [record.result.gpu_allocated_bytes or 0 for record in study.records]
        fullest = max((peak for peak in peaks if peak <= study.limit_mib * MIB), default=0) / (study.limit_mib * MIB)
        num_lost = sum(out_of_memory(record.result) for record in study.records)
        ran = sum(record.result.outcome in (Outcome.OK, Outcome.PRUNED) for record in study.records)
        lines.append(
            f"| {study.limit_mib} MiB | {len(study.records)} | {ran} | {num_lost} | {fullest:.0%} | {study.asked} "
            f"| {study.refused} |"
        )
    return "\n".join([*lines, "", (__doc__ or "").partition("reports/tuner_oom.md\n")[2].strip(), ""])


def main() -> None:
    """All studies, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=int, nargs="*", default=LIMITS_MIB, help="MiB of the devices")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = assets.build_tiny_model(folder / "model"), assets.build_tiny_dataset(folder / "data")
        real = RealBackend(folder / "trials")
        studies = []
        try:
            for limit in options.limits:
                studies.append(run_limit(limit, model, data, folder, real))
                print(render(studies), file=sys.stderr, flush=True)
        finally:
            real.close()
    REPORT.write_text(render(studies), encoding="utf-8")


if __name__ == "__main__":
    main()
