"""The tuner: propose, screen, run, record, until the trials are used up or no gain is left; resume by running again."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from zplan import files
from zplan.backends.base import Backend, Predictor
from zplan.backends.formula import FormulaBackend
from zplan.calibrate import Accuracy, accuracy, corrections_path, outdated, remember
from zplan.errors import ConfigError, MachineError
from zplan.hardware import Cluster
from zplan.model_shape import ModelShape
from zplan.plan import Plan
from zplan.planner import Fixed, rank_candidates
from zplan.recipe import Recipe
from zplan.trial import WARMUP_STEPS, Outcome, TrialResult, TrialSpec
from zplan.tuner.ledger import Ledger, Objective, Question, Record, Running, has_speed, open_ledger
from zplan.tuner.narrowing import narrow
from zplan.tuner.propose import Proposal, Proposer
from zplan.tuner.screen import Screen
from zplan.tuner.space import Problem, Space
from zplan.tuner.winner import compared, front_records, make_plan, rank_records
from zplan.values import dataclass
from zplan.zero_config import Choice

_PATIENCE = 3
"""Proposals in a row that expect less than `Effort.least_gain`."""
_LEAST_TRIALS = 6
"""Trials that ran before the model's expectation is trusted to stop a search."""
_SAME_FAILURES = 3
"""Different configurations that fail alike before any has run: the fault is not theirs."""
_MOST_CONFIRMATIONS = 3
"""Runs that one search spends on confirming; on a noisy machine the lead changes with every run."""
_CONFIRM_TOLERANCE = 0.10
"""A confirmation this much slower than its first run is told to the user: the machine is not quiet."""


_NOT_MEMORY = (Outcome.BAD_CONFIG, Outcome.RANK_LOST, Outcome.TIMED_OUT)
"""Failures that a smaller configuration need not mend."""


class Observer(Protocol):
    """How the tuner tells what it does; the command line draws it."""

    def trial_started(self, trial: Running, proposal: Proposal) -> None: ...

    def trial_finished(self, record: Record, progress: Progress) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where the study stands after a trial."""

    num_finished: int
    n_trials: int
    best: Record | None
    front: tuple[Record, ...]
    """Trials that nothing beats in all of speed, GPU bytes and host bytes."""
    remaining_seconds: float | None
    """By the mean duration of this run's trials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOutcome:
    """What a run of the tuner ended with."""

    records: tuple[Record, ...]
    """All trials of the study, earlier runs' included."""
    best: Record | None
    plan: Plan | None
    stop_reason: str
    num_resumed: int
    """Trials that the study had before this run."""
    objective: Objective = "speed"
    front: tuple[Record, ...] = ()
    """Trials that no other beats in speed, GPU bytes and host bytes, fastest first."""
    accuracy: tuple[Accuracy, ...] = ()
    """Prediction error on this machine, before and after what its trials have taught; empty unless measured."""


class Silent:
    """The observer of those who do not look."""

    def trial_started(self, trial: Running, proposal: Proposal) -> None:
        return None

    def trial_finished(self, record: Record, progress: Progress) -> None:
        return None

    def message(self, text: str) -> None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much a search may cost."""

    n_trials: int
    """Trials that the study has when it is done, earlier runs' included, confirmations not."""
    timeout_seconds: float | None = None
    warmup_steps: int = WARMUP_STEPS
    timed_steps: int = 3
    deadline_seconds: float = 600.0
    """Of one trial."""
    least_gain: float = 0.01
    """Expected improvement, as a fraction, below which another trial is not worth its time; 0 ends no search."""


def run_study(
    *,
    recipe: Recipe,
    shape: ModelShape,
    cluster: Cluster,
    model_path: str,
    backend: Backend,
    effort: Effort,
    study_path: str,
    plan_path: Path | str | None = None,
    fixed: Fixed | None = None,
    observer: Observer | None = None,
    seed: int = 0,
    simulator: Backend | None = None,
    formula: Predictor | None = None,
    calibration_dir: Path | None = None,
    objective: Objective = "speed",
) -> StudyOutcome:
    """Search for the fastest choice that fits, and write it to `plan_path`. Running it again resumes the study.

    Args:
        model_path: folder that the trials open.
        backend: answers the trials.
        study_path: journal file, or a database URL.
        simulator: confirms a suggestion before it costs a trial; None skips that.
        formula: predicts; FormulaBackend unless given.
        calibration_dir: where what was learned about this machine is kept; the user's cache by default.
        objective: the fastest that fits, or all that no other beats in speed, GPU and host memory; the plan is the
            fastest's either way.

    Raises:
        ConfigError: the study belongs to another recipe or cluster, a knob that does not exist.
        MachineError: the machine is broken, or the study cannot be written.
    """
    question = Question(recipe=recipe, cluster=cluster, evidence=backend.evidence, objective=objective)
    ledger = open_ledger(study_path, question)
    space, ranking = narrowed_space(shape, question, fixed)
    search = Search(
        question=question, ledger=ledger, space=space, shape=shape, ranking=ranking, backend=backend,
        formula=formula if formula is not None else FormulaBackend(shape), simulator=simulator, effort=effort,
        model_path=model_path, observer=observer if observer is not None else Silent(), seed=seed,
    )  # fmt: skip
    num_resumed = len(ledger.records())
    if backend.evidence == "measured" and (line := outdated(cluster, calibration_dir)):
        search.observer.message(line)
    stop_reasons = search.run(), search.confirm_winner()
    plan = make_plan(question, search.allowed_records(), model_path=model_path, study_path=study_path)
    if plan is not None and plan_path is not None:
        files.save(plan, plan_path)
    return StudyOutcome(
        records=ledger.records(), best=search.best(), plan=plan, stop_reason="; ".join(filter(None, stop_reasons)),
        accuracy=calibrate_machine(question, ledger.records(), study_path, calibration_dir),
        num_resumed=num_resumed, objective=objective, front=tuple(front_records(search.allowed_records())),
    )  # fmt: skip


def narrowed_space(shape: ModelShape, question: Question, fixed: Fixed | None) -> tuple[Space, tuple[Choice, ...]]:
    """Every knob within the user's decisions, and the planner's ranking under them."""
    recipe, cluster = question.recipe, question.cluster
    narrowing = narrow(fixed if fixed is not None else Fixed())
    space = Space(Problem(shape=shape, recipe=recipe, cluster=cluster), narrowing.ranges, narrowing.base)
    ranked = rank_candidates(shape, recipe, cluster, fixed=narrowing.fixed)
    return space, tuple(candidate.choice for candidate in ranked)


@dataclass(kw_only=True)
class Search:
    """One run of the tuner over an open study."""

    question: Question
    ledger: Ledger
    space: Space
    shape: ModelShape
    ranking: Sequence[Choice]
    backend: Backend
    formula: Predictor
    simulator: Backend | None
    effort: Effort
    model_path: str
    observer: Observer
    seed: int

    def __post_init__(self) -> None:
        template = self._spec(self.space.choice({"world_size": 1, "stage": 0}))
        self._screen = Screen(self.space, self.formula, template, self.simulator)
        self._proposer = Proposer(
            self._screen, self.shape, self.ranking, seed=self.seed, objective=self.question.objective
        )
        self._started = time.monotonic()
        self._durations: list[float] = []
        self._failures: list[TrialResult] = []

    def run(self) -> str:
        """Trial after trial; returns why it ended."""
        hopeless = 0
        while True:
            reason = self._budget_ends()
            if reason:
                return reason
            proposal = self._next()
            if proposal is None:
                refused = len(self._screen.refusals())
                but = f"; of those that fit by formula the simulation refused {refused}" if refused else ""
                fits = "every configuration that can fit has been tried" if self.ledger.records() else "nothing can fit"
                return f"{fits}{but}"
            low = proposal.expected_gain is not None and proposal.expected_gain < self.effort.least_gain
            hopeless = hopeless + 1 if low else 0
            ran = sum(has_speed(record.result) for record in self.ledger.records())
            if hopeless >= _PATIENCE and ran >= _LEAST_TRIALS:
                more = "more speed" if self.question.objective == "speed" else "beyond the front"
                promised = f"{proposal.expected_gain:.1%} {more}"
                return f"the best untried configuration promises only {promised}, {_PATIENCE} times in a row"
            self._start_and_run(proposal)

    def allowed_records(self) -> tuple[Record, ...]:
        """The trials within the user's ranges; earlier runs of the study may have had wider ones."""
        return tuple(record for record in self.ledger.records() if self.space.contains(record.choice))

    def best(self) -> Record | None:
        """The fastest of them that ran every time it was tried."""
        return next(iter(rank_records(self.allowed_records())), None)

    def _budget_ends(self) -> str:
        finished = sum(record.origin != "confirm" for record in self.ledger.records())
        if finished + len(self.ledger.running()) >= self.effort.n_trials:
            return f"{finished} trials are done"
        timeout = self.effort.timeout_seconds
        if timeout is not None and time.monotonic() - self._started + self._mean_duration() > timeout:
            return "the time is used up"
        return ""

    def _mean_duration(self) -> float:
        return sum(self._durations) / len(self._durations) if self._durations else 0.0

    def _next(self) -> Proposal | None:
        interrupted = self._proposer.again(filter(self.space.contains, self.ledger.interrupted()))
        if interrupted is not None:
            self.observer.message("a trial that was interrupted is run again")
            return interrupted
        self._screen.refused |= self.ledger.deadly()
        return self._proposer.next(self.ledger.records(), self.ledger.running())

    def _start_and_run(self, proposal: Proposal) -> None:
        trial = self.ledger.begin(self.space, proposal.choice, origin=proposal.origin)
        if proposal.origin == "confirm" or not self.ledger.withdraw_if_taken(trial):
            self._run_one(trial, proposal)

    def _run_one(self, trial: Running, proposal: Proposal) -> None:
        self.observer.trial_started(trial, proposal)
        try:
            result = self.backend.run(replace(self._spec(proposal.choice), best_step_seconds=self._to_beat(proposal)))
        except BaseException:
            self.ledger.abandon(trial)
            raise
        if result.outcome is Outcome.ENV_BROKEN:
            self.ledger.abandon(trial)
            raise MachineError(
                f"trial {trial.number} met a broken machine: {result.message}",
                because="no other configuration can do better until this is mended; finished trials are kept",
                fix="mend it and run the same command again: it resumes",
            )
        record = self.ledger.finish(trial, self._record(trial, proposal, result))
        self._durations.append(record.finished - record.started)
        self.observer.trial_finished(record, self._progress())
        self._failures.append(result)
        self._refuse_what_always_fails()

    def _refuse_what_always_fails(self) -> None:
        """Raises ConfigError when this run's first trials all failed alike: recipe, data or trainer are at fault."""
        first = self._failures[:_SAME_FAILURES]
        texts = {_without_rank(result.message) for result in first}
        if len(first) < _SAME_FAILURES or len(texts) > 1 or any(item.outcome not in _NOT_MEMORY for item in first):
            return
        if not any(has_speed(record.result) for record in self.ledger.records()):
            raise ConfigError(
                f"every trial fails alike: {first[0].message}",
                because=f"{_SAME_FAILURES} different configurations did, so the fault is in what they have in common",
                fix="read that log; mend the recipe, the data or the deadline (--deadline), and run the command again",
            )

    def _to_beat(self, proposal: Proposal) -> tuple[float, ...]:
        """Timed steps of the fastest trial; none for what must run to its end: a confirmation, what may be small."""
        must_end = proposal.origin == "confirm" or self.question.objective == "pareto"
        best = None if must_end else self.best()
        return best.result.timed_step_seconds if best is not None else ()

    def _record(self, trial: Running, proposal: Proposal, result: TrialResult) -> Record:
        return Record(
            key=trial.key, origin=proposal.origin, choice=proposal.choice, result=result,
            predicted=proposal.predicted, simulated=proposal.simulated, started=trial.started, finished=time.time(),
        )  # fmt: skip

    def _progress(self) -> Progress:
        finished = sum(record.origin != "confirm" for record in self.ledger.records())
        left = max(0, self.effort.n_trials - finished)
        return Progress(
            num_finished=finished, n_trials=self.effort.n_trials, best=self.best(),
            front=tuple(front_records(self.allowed_records())),
            remaining_seconds=left * self._mean_duration() if self._durations else None,
        )  # fmt: skip

    def confirm_winner(self) -> str:
        """Run the fastest once more. If it fails, or its mean falls behind, the next one is confirmed instead."""
        for attempt in range(_MOST_CONFIRMATIONS + 1):
            records = self.allowed_records()
            ranked = rank_records(records)
            if not ranked or self.question.evidence != "measured":
                return ""
            runs = [record for record in records if record.key == ranked[0].key]
            if len(runs) > 1:
                return _confirmation(runs)
            if attempt < _MOST_CONFIRMATIONS:
                self._start_and_run(self._proposer.propose(ranked[0].choice, "confirm"))
        return f"{_MOST_CONFIRMATIONS} winners fell behind when they ran again: this machine is not quiet"

    def _spec(self, choice: Choice) -> TrialSpec:
        return TrialSpec(
            recipe=self.question.recipe, choice=choice, cluster=self.question.cluster, model_path=self.model_path,
            warmup_steps=self.effort.warmup_steps, timed_steps=self.effort.timed_steps,
            deadline_seconds=self.effort.deadline_seconds,
        )  # fmt: skip


def calibrate_machine(
    question: Question, records: Sequence[Record], study_path: str, folder: Path | None
) -> tuple[Accuracy, ...]:
    """Keep what this study's trials say about the formulas on this machine, for later estimates."""
    if question.evidence != "measured":
        return ()
    try:
        return accuracy(remember(question.cluster, compared(records, study_path), folder))
    except OSError as error:
        raise MachineError(
            f"what the trials taught about this machine cannot be kept: {error.strerror}",
            because=f"{corrections_path(question.cluster, folder)} cannot be written; the study and the plan are",
            fix="free disk space, or export XDG_CACHE_HOME=ANOTHER-FOLDER",
        ) from error


def _without_rank(message: str) -> str:
    """A failure's text without what differs between trials: the rank that told it, and its folder."""
    return re.sub(r"^rank \d+: | \[logs: .*\]$", "", message)


def _confirmation(runs: Sequence[Record]) -> str:
    first, last = (run.result.tokens_per_second or 0.0 for run in (runs[0], runs[-1]))
    change = last / first - 1 if first else 0.0
    if abs(change) > _CONFIRM_TOLERANCE:
        return f"the winner ran again, but {change:+.0%} tokens/s: this machine is not quiet"
    return f"the winner ran again: {change:+.1%} tokens/s"
