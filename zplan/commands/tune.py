"""`zplan tune`: the search with its progress on screen, then the summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.text import Text

from zplan import files
from zplan.backends.base import Backend
from zplan.backends.formula import FormulaBackend
from zplan.backends.simulated import SimulatedBackend
from zplan.calibrate import Accuracy
from zplan.catalog import hub_snapshot
from zplan.commands import Answer
from zplan.errors import ConfigError, ExitCode
from zplan.job import Job
from zplan.report.labels import QUANTITY_NAMES, choice_label
from zplan.report.trials import progress_heading, progress_line, render_front, render_records
from zplan.tuner.ledger import Objective, Record, Running, has_speed, load_study
from zplan.tuner.propose import Proposal
from zplan.tuner.storage import without_password
from zplan.tuner.study import Effort, Progress, StudyOutcome, run_study
from zplan.tuner.winner import make_plan

WORK_DIR = Path(".zplan/trials")
"""Logs and results of the trials, below the current folder; safe to delete."""


def tune(
    job: Job,
    *,
    trials: int,
    backend: str,
    study: str,
    plan_path: str,
    timeout_seconds: float | None,
    timed_steps: int,
    deadline_seconds: float,
    seed: int,
    console: Console,
    quiet: bool,
    objective: str = "speed",
) -> Answer:
    """Run or resume the study.

    Raises:
        ConfigError: no data set, no model folder, an unknown backend, another study's file.
        MachineError: the machine is broken.
    """
    if trials < 1:
        raise ConfigError(f"--trials is {trials}, below 1", fix="--trials 20")
    runner = make_backend(backend, job)
    model_path = model_folder(job.recipe.model) if backend == "real" else job.recipe.model
    observer = Screen(console, world_size=job.cluster.world_size, quiet=quiet)
    effort = Effort(
        n_trials=trials, timeout_seconds=timeout_seconds, timed_steps=timed_steps, deadline_seconds=deadline_seconds
    )
    try:
        start = getattr(runner, "start", None)
        if start is not None:
            start(job.cluster)
        outcome = run_study(
            recipe=job.recipe, shape=job.shape, cluster=job.cluster, model_path=model_path, backend=runner,
            effort=effort, study_path=study, plan_path=plan_path, fixed=job.fixed, observer=observer, seed=seed,
            objective=as_objective(objective),
            simulator=SimulatedBackend(job.shape) if backend == "real" and job.shape.config else None,
        )  # fmt: skip
    finally:
        observer.close()
        close = getattr(runner, "close", None)
        if close is not None:
            close()
    return _answer(outcome, plan_path, study, world_size=job.cluster.world_size)


def make_backend(name: str, job: Job) -> Backend:
    """The backend of --backend."""
    if name == "real":
        if job.recipe.dataset is None:
            raise ConfigError("no data set given", because="a real trial trains on real examples", fix="--dataset FILE")
        from zplan.backends.real import RealBackend

        return RealBackend(WORK_DIR)
    if name == "simulated":
        return SimulatedBackend(job.shape)
    if name == "formula":
        return FormulaBackend(job.shape)
    raise ConfigError(f"--backend is {name!r}", because="it is real, simulated or formula", fix="--backend real")


def as_objective(name: str) -> Objective:
    """The value of --objective."""
    known: dict[str, Objective] = {"speed": "speed", "pareto": "pareto"}
    if name not in known:
        raise ConfigError(f"--objective is {name!r}", because="it is speed or pareto", fix="--objective pareto")
    return known[name]


def model_folder(model: str) -> str:
    """The folder that trials and training open: config.json and tokenizer, and weights for training.

    Raises:
        ConfigError: the model is only a catalogue name.
    """
    path = Path(model)
    folder = path.parent if path.is_file() else path
    if folder.is_dir():
        return str(folder.resolve())
    cached = hub_snapshot(model)
    if cached is not None:
        return str(cached)
    raise ConfigError(
        f"{model} is not a folder, and its files are not in the local Hub cache",
        because="a trial needs the tokenizer, and training needs the weights",
        fix="hf download ORG/NAME, or --model FOLDER",
    )


class Screen:
    """One line a trial on stderr: what, outcome, GPU, host, tokens/s, best so far, time left; the running one below."""

    def __init__(self, console: Console, *, world_size: int, quiet: bool) -> None:
        self._console, self._world_size, self._quiet = console, world_size, quiet
        self._status: Status | None = None
        self._headed = False

    def trial_started(self, trial: Running, proposal: Proposal) -> None:
        if self._quiet or not self._console.is_terminal:
            return
        text = Text(f"trial {trial.number} ({trial.origin}): {choice_label(trial.choice)}", style="dim")
        self._status = self._console.status(text)
        self._status.start()

    def trial_finished(self, record: Record, progress: Progress) -> None:
        self.close()
        if self._quiet:
            return
        if not self._headed:
            self._console.print(progress_heading())
            self._headed = True
        line = progress_line(
            record, best=progress.best, remaining_seconds=progress.remaining_seconds, world_size=self._world_size
        )
        self._console.print(line, soft_wrap=True)
        if record.result.message and not has_speed(record.result):
            self._console.print(f"    {record.result.message}", style="yellow", markup=False)

    def message(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, style="dim", markup=False)

    def close(self) -> None:
        """No trial runs any more."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def _answer(outcome: StudyOutcome, plan_path: str, study: str, *, world_size: int) -> Answer:
    is_pareto = outcome.objective == "pareto"
    lines: list[RenderableType]
    data: dict[str, Any] = {
        "schema": "zplan.tune/1",
        "study": without_password(study),
        "objective": outcome.objective,
        "stop_reason": outcome.stop_reason,
        "num_resumed": outcome.num_resumed,
        "best": outcome.best.number if outcome.best else None,
        "front": [record.number for record in outcome.front],
        "plan": plan_path if outcome.plan else None,
        "accuracy": [files.to_data(item) for item in outcome.accuracy],
        "trials": [files.to_data(record) for record in outcome.records],
    }
    if not outcome.records:
        lines = [Text(f"nothing was tried: {outcome.stop_reason}", style="red")]
        lines.append(Text("zplan estimate with the same flags says what is short, and what would change it"))
        return Answer(data=lambda: data, text=Group(*lines), code=ExitCode.DOES_NOT_FIT)
    front = outcome.front if is_pareto else ()
    lines = [render_records(_by_speed(outcome.records), best=outcome.best, front=front, world_size=world_size)]
    if front:
        lines += [Text(), render_front(front, world_size=world_size, plan_path=plan_path), Text()]
    lines.append(Text(f"stopped: {outcome.stop_reason}"))
    lines += [Text(_accuracy_line(item)) for item in outcome.accuracy if item.after is not None]
    if outcome.plan is None:
        lines.append(Text("no configuration ran; see the outcomes above", style="red"))
        return Answer(data=lambda: data, text=Group(*lines), code=ExitCode.DOES_NOT_FIT)
    lines.append(Text(f"wrote {plan_path}; train with:\n  python -m sft.train --plan {plan_path}"))
    return Answer(data=lambda: data, text=Group(*lines))


def _accuracy_line(item: Accuracy) -> str:
    """`GPU bytes: the formula was 12.0% off here (8 trials), calibrated 1.3%`."""
    before = f"{item.before:.1%} off" if item.before < 1 else f"{item.before + 1:.0f} times too high"
    name = QUANTITY_NAMES[item.quantity]
    return f"{name}: the formula was {before} here ({item.num_trials} trials), calibrated {item.after:.1%}"


def pick(trial: int, *, study: str, plan_path: str) -> str:
    """Write a trial of a study as the plan, with the smaller ones under it as its ladder; what was written.

    Raises:
        ConfigError: no such study, or the trial did not run.
    """
    question, records = load_study(study)
    folder = model_folder(question.recipe.model) if question.evidence == "measured" else question.recipe.model
    plan = make_plan(question, records, model_path=folder, study_path=study, trial=trial)
    assert plan is not None, "a trial that did not run is refused"
    files.save(plan, plan_path)
    return f"wrote {plan_path}: {choice_label(plan.choice)}"


def _by_speed(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: -(record.result.tokens_per_second or 0.0))
