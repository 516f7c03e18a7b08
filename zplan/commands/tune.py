"""`zplan tune`: the search with its progress on screen, then the summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from zplan import files
from zplan.backends.base import Backend
from zplan.backends.formula import FormulaBackend
from zplan.commands import Answer
from zplan.errors import ConfigError, ExitCode
from zplan.job import Job
from zplan.ledger import Record, Running
from zplan.model_shape import ModelShape
from zplan.propose import Proposal
from zplan.report.labels import choice_label
from zplan.report.terminal import outcome_text, render_records
from zplan.study import Progress, StudyOutcome, run_study
from zplan.units import format_bytes, format_seconds

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
    seed: int,
    console: Console,
    quiet: bool,
) -> Answer:
    """Run or resume the study.

    Raises:
        ConfigError: no data set, no model folder, an unknown backend, another study's file.
        MachineError: the machine is broken.
    """
    if trials < 1:
        raise ConfigError(f"--trials is {trials}, below 1", fix="--trials 20")
    runner = make_backend(backend, job)
    model_path = model_folder(job) if backend == "real" else job.recipe.model
    observer = Screen(console, quiet=quiet)
    try:
        outcome = run_study(
            recipe=job.recipe, shape=job.shape, cluster=job.cluster, model_path=model_path, backend=runner,
            n_trials=trials, study_path=study, plan_path=plan_path, fixed=job.fixed, observer=observer,
            timeout_seconds=timeout_seconds, seed=seed, timed_steps=timed_steps,
        )  # fmt: skip
    finally:
        close = getattr(runner, "close", None)
        if close is not None:
            close()
    return _answer(outcome, plan_path, study)


def make_backend(name: str, job: Job) -> Backend:
    """The backend of --backend."""
    if name == "real":
        if job.recipe.dataset is None:
            raise ConfigError("no data set given", because="a real trial trains on real examples", fix="--dataset FILE")
        from zplan.backends.real import RealBackend

        return RealBackend(WORK_DIR)
    if name == "simulated":
        from zplan.backends.simulated import SimulatedBackend

        return SimulatedBackend(job.shape)
    if name == "formula":
        return FormulaBackend(job.shape)
    raise ConfigError(f"--backend is {name!r}", because="it is real, simulated or formula", fix="--backend real")


def model_folder(job: Job) -> str:
    """The folder that trials and training open: config.json and tokenizer, and weights for training.

    Raises:
        ConfigError: the model is only a catalogue name.
    """
    path = Path(job.recipe.model)
    folder = path.parent if path.is_file() else path
    if folder.is_dir():
        return str(folder.resolve())
    cached = cached_snapshot(job.shape, job.recipe.model)
    if cached is not None:
        return str(cached)
    raise ConfigError(
        f"{job.recipe.model} is not a folder, and its files are not in the local Hub cache",
        because="a trial needs the tokenizer, and training needs the weights",
        fix="hf download ORG/NAME, or --model FOLDER",
    )


def cached_snapshot(shape: ModelShape, name: str) -> Path | None:
    """The newest snapshot of a Hub id in the local cache."""
    from zplan.catalog import hub_snapshot

    return hub_snapshot(name)


class Screen:
    """One line a trial on stderr: what, outcome, GPU, host, tokens/s, best so far, time left."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet

    def trial_started(self, trial: Running, proposal: Proposal) -> None:
        if not self._quiet:
            self._console.print(f"trial {trial.number}: {choice_label(trial.choice)} ({trial.origin})", style="dim")

    def trial_finished(self, record: Record, progress: Progress) -> None:
        if self._quiet:
            return
        result = record.result
        line = Text(f"trial {record.number}: ")
        line.append_text(outcome_text(result.outcome))
        line.append(f"  GPU {format_bytes(result.gpu_used_bytes or result.gpu_allocated_bytes)}")
        line.append(f"  host {format_bytes(result.host_resident_bytes)}")
        if result.tokens_per_second:
            line.append(f"  {result.tokens_per_second:,.1f} tokens/s", style="bold")
        if progress.best is not None and progress.best.result.tokens_per_second:
            line.append(f"  best {progress.best.result.tokens_per_second:,.1f} (trial {progress.best.number})")
        line.append(f"  [{progress.num_finished}/{progress.n_trials}", style="dim")
        if progress.remaining_seconds:
            line.append(f", about {format_seconds(progress.remaining_seconds)} left", style="dim")
        line.append("]", style="dim")
        self._console.print(line)
        if result.message:
            self._console.print(f"  {result.message}", style="yellow", markup=False)

    def message(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, style="dim", markup=False)


def _answer(outcome: StudyOutcome, plan_path: str, study: str) -> Answer:
    data: dict[str, Any] = {
        "schema": "zplan.tune/1",
        "study": study,
        "stop_reason": outcome.stop_reason,
        "num_resumed": outcome.num_resumed,
        "best": outcome.best.number if outcome.best else None,
        "plan": plan_path if outcome.plan else None,
        "trials": [files.to_data(record) for record in outcome.records],
    }
    lines = [render_records(_by_speed(outcome.records), best=outcome.best), Text(f"stopped: {outcome.stop_reason}")]
    if outcome.plan is None:
        lines.append(Text("no configuration ran; see the outcomes above", style="red"))
        return Answer(data=lambda: data, text=Group(*lines), code=ExitCode.DOES_NOT_FIT)
    lines.append(Text(f"wrote {plan_path}; train with: python -m sft.train --plan {plan_path}"))
    return Answer(data=lambda: data, text=Group(*lines))


def _by_speed(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: -(record.result.tokens_per_second or 0.0))
