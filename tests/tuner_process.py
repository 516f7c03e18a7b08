"""A tuner in a process of its own: `python -m tests.tuner_process STUDY N_TRIALS SECONDS...`; it waits for a line."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import zplan.tuner.study
from tests.oracle import TOY_RECIPE, Oracle, toy_cluster, toy_shape
from zplan.errors import ZplanError
from zplan.trial import TrialResult, TrialSpec
from zplan.tuner.ledger import Record, Running
from zplan.tuner.propose import Proposal
from zplan.tuner.study import Effort, Progress, StudyOutcome, run_study

SHAPE = toy_shape(2048, 24)


@dataclass
class SlowOracle(Oracle):
    """Takes its time."""

    seconds: tuple[float, ...] = (0.0,)
    """Of the first trial, the second and so on; the last of them of all others, too."""

    def run(self, spec: TrialSpec) -> TrialResult:
        time.sleep(self.seconds[min(self.calls, len(self.seconds) - 1)])
        return super().run(spec)


class Printer:
    """One line an event."""

    def trial_started(self, trial: Running, proposal: Proposal) -> None:
        print("started", trial.number, trial.key, flush=True)

    def trial_finished(self, record: Record, progress: Progress) -> None:
        print("finished", record.number, record.key, flush=True)

    def message(self, text: str) -> None:
        print("message", text, flush=True)


def tune(
    study_path: str,
    n_trials: int,
    *seconds: float,
    timeout_seconds: float | None = None,
    least_gain: float = 0.01,
    **more: object,
) -> StudyOutcome:
    """A search in the toy world, without a ranking."""
    zplan.tuner.study.rank_candidates = lambda *args, **kwargs: ()
    arguments: dict[str, object] = {
        "shape": SHAPE,
        "backend": SlowOracle(SHAPE, error=0.3, noise=0.02, seconds=seconds or (0.0,)),
        "formula": Oracle(SHAPE, evidence="formula"),
        "cluster": toy_cluster(),
        "recipe": TOY_RECIPE,
        "observer": Printer(),
        "calibration_dir": Path(tempfile.mkdtemp()),
    }
    effort = Effort(n_trials=n_trials, timeout_seconds=timeout_seconds, least_gain=least_gain)
    return run_study(model_path="toy", effort=effort, study_path=study_path, **(arguments | more))  # type: ignore[arg-type]


if __name__ == "__main__":
    try:
        print("ready", flush=True)
        sys.stdin.readline()
        outcome = tune(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
        print("done", len(outcome.records), flush=True)
    except ZplanError as error:
        print(f"error {error.what}", flush=True)
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)
