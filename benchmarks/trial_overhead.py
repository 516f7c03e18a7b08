"""What a trial costs beside its timed steps: the tuner's warm trials against cold ones started by torchrun.

    python -m benchmarks.trial_overhead        # about 8 minutes on two idle cores; writes reports/trial_overhead.md

A real study of the demo model (SmolLM2-135M, fp32, two CPU ranks, 64 tokens) with real trials, as `zplan tune` runs it;
with `--methods full lora` another one of its adapters. After every fifth trial the same configuration is run again by
`torchrun -m sft.trial`, so that both sides see the same machine. Overhead is wall time minus the timed steps. Of a
study it is everything: the search, the start of the warm server, the model, the warm-up steps, the end of the
processes; of a cold trial it is the wall time of its torchrun. The warm-up steps are the same on both sides; of full
fine-tuning they are most of a warm trial's overhead: one step, which makes gradients and optimizer states, a short one
below ZeRO-3. The second step, the one with the peak, is a timed one, because all rows are 64 tokens long; what the
meter takes in it (0.1 to 0.3 s) counts as overhead.
Killed and started again, it goes on; a finished run starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from benchmarks.measured import FOLDER
from zplan import files
from zplan.backends.real import RealBackend, trial_environment
from zplan.demo import prepare_demo
from zplan.hardware import Cluster
from zplan.model_probe import probe_config
from zplan.probe import probe_hardware
from zplan.recipe import Method, Recipe
from zplan.report.labels import choice_label
from zplan.trial import RESULT_FILE, SPEC_FILE, Outcome, TrialResult, TrialSpec
from zplan.tuner.study import Effort, run_study

REPORT = Path(__file__).parents[1] / "reports" / "trial_overhead.md"
WORK = FOLDER / "trial_overhead"
ROWS = WORK / "rows.jsonl"
TRIALS, EVERY, GOAL = 20, 5, 0.25
METHODS: tuple[Method, ...] = ("full", "lora")


@dataclass(kw_only=True)
class SideBySide:
    """Runs every trial warm, and every fifth one cold besides; one line a run is kept."""

    warm: RealBackend
    method: Method
    evidence: Literal["measured"] = "measured"

    def __post_init__(self) -> None:
        self._count = len(warm_rows(read_rows(), self.method))
        self._mark = time.monotonic()

    def run(self, spec: TrialSpec) -> TrialResult:
        """The warm trial's answer; its wall time counts from the end of the one before."""
        result = self.warm.run(spec)
        self._keep("warm", spec, result, time.monotonic() - self._mark)
        if self._count % EVERY == 0:
            started = time.monotonic()
            cold = run_cold(spec)
            self._keep("cold", spec, cold, time.monotonic() - started)
        self._count += 1
        self._mark = time.monotonic()
        return result

    def _keep(self, kind: str, spec: TrialSpec, result: TrialResult, wall_seconds: float) -> None:
        row = {
            "method": self.method, "kind": kind, "trial": self._count, "label": choice_label(spec.choice),
            "outcome": result.outcome.value,
            "wall": wall_seconds, "timed": sum(result.timed_step_seconds), "steps": len(result.timed_step_seconds),
        }  # fmt: skip
        print(json.dumps(row), file=sys.stderr, flush=True)
        with ROWS.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def read_rows() -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def warm_rows(rows: list[dict[str, Any]], method: Method) -> list[dict[str, Any]]:
    """Those of the study of one method."""
    return [row for row in rows if row["kind"] == "warm" and row["method"] == method]


def run_cold(spec: TrialSpec) -> TrialResult:
    """The same trial by torchrun: an agent and a fresh interpreter for every rank."""
    out = WORK / f"cold-{time.monotonic_ns()}"
    out.mkdir()
    files.save(spec, out / SPEC_FILE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(spec.choice.batch.world_size)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "sft.trial"]
    subprocess.run(
        [*command, str(out / SPEC_FILE), "--out", str(out)], env={**os.environ, **trial_environment(spec.cluster)},
        check=True, capture_output=True, timeout=spec.deadline_seconds,
    )  # fmt: skip
    return files.load(TrialResult, out / RESULT_FILE)


def run(method: Method, trials: int, cluster: Cluster) -> None:
    """A study, or the rest of it; its early end for want of gain is switched off, so that all trials are run."""
    assets = prepare_demo()
    folder = assets.model_dir.resolve()
    recipe = Recipe(
        model=str(folder), dataset=str(assets.dataset_path.resolve()), dtype="fp32", max_length=64, train_batch_size=2,
        method=method,
    )  # fmt: skip
    shape = probe_config(folder / "config.json", name="demo")
    backend = RealBackend(WORK / "trials")
    try:
        both = SideBySide(warm=backend, method=method)  # its clock runs
        backend.start(cluster)
        run_study(
            recipe=recipe, shape=shape, cluster=cluster, model_path=str(folder), backend=both,
            effort=Effort(n_trials=trials, timed_steps=2, least_gain=0.0),
            study_path=str(WORK / f"{method}.journal"), calibration_dir=WORK,
        )  # fmt: skip
    finally:
        backend.close()


def overhead(row: dict[str, Any]) -> float:
    """Seconds beside the timed steps."""
    return float(row["wall"] - row["timed"])


def render(rows: list[dict[str, Any]], cluster: Cluster) -> str:
    """The report."""
    lines = [
        "# What a trial costs beside its timed steps", "",
        f"`python -m benchmarks.trial_overhead`: real trials of the demo model, {cluster.gpus_per_node} CPU ranks on "
        f"{cluster.host.num_cpus} cores; seconds, wall minus timed steps.", "",
    ]  # fmt: skip
    table = [
        "| method | trial | configuration | outcome | wall | timed | overhead | cold: wall | timed | overhead |",
        "|---" * 10 + "|",
    ]
    for method in METHODS:
        warm = warm_rows(rows, method)
        cold = {r["trial"]: r for r in rows if (r["kind"], r["method"]) == ("cold", method) and r["outcome"] in _RAN}
        if not cold:
            continue
        ours, theirs = fmean(map(overhead, warm)), fmean(map(overhead, cold.values()))
        lines.append(
            f"- {method}: overhead of a trial {ours:.1f} s over {len(warm)} trials of a study, "
            f"{ours / theirs:.0%} of a cold torchrun trial's {theirs:.1f} s over {len(cold)} (goal {GOAL:.0%})."
        )
        both = fmean(overhead(row) for row in warm if row["trial"] in cold)
        lines.append(
            f"- {method}: of the {len(cold)} configurations that were run both ways {both:.1f} s, {both / theirs:.0%}; "
            "the first of them starts the warm server."
        )
        table += [_line(method, row, cold.get(row["trial"])) for row in warm]
    return "\n".join([*lines, "", *table, "", (__doc__ or "").partition("reports/trial_overhead.md\n")[2].strip(), ""])


def _line(method: Method, row: dict[str, Any], other: dict[str, Any] | None) -> str:
    cold = f"{other['wall']:.1f} | {other['timed']:.1f} | {overhead(other):.1f}" if other else " | | "
    return (
        f"| {method} | {row['trial']} | {row['label']} | {row['outcome']} | {row['wall']:.1f} | {row['timed']:.1f} "
        f"| {overhead(row):.1f} | {cold} |"
    )


_RAN = (Outcome.OK.value, Outcome.PRUNED.value)


def main() -> None:
    """Go on with an unfinished run, or begin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["full"])
    options = parser.parse_args()
    if all(len(warm_rows(read_rows(), method)) >= options.trials for method in options.methods):
        shutil.rmtree(WORK)
    WORK.mkdir(parents=True, exist_ok=True)
    cluster = probe_hardware()
    for method in options.methods:
        run(method, options.trials, cluster)
    REPORT.write_text(render(read_rows(), cluster), encoding="utf-8")


if __name__ == "__main__":
    main()
