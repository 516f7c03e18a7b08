"""The study on disk: every trial is one Optuna trial with one `record`, stored at once, readable by any tuner.

A trial's whole story (question, answer, prediction) is one user attribute, hence one line of the journal: whatever else
is damaged, the finished trials can be read back.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import PartialFixedSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from zplan import files
from zplan.errors import ConfigError, MachineError
from zplan.hardware import Cluster
from zplan.recipe import Recipe
from zplan.trial import Evidence, Outcome, TrialResult
from zplan.tuner import journal
from zplan.tuner.front import gpu_bytes
from zplan.tuner.space import Draft, Space
from zplan.tuner.storage import guarded, open_storage, without_password
from zplan.values import dataclass
from zplan.zero_config import Choice

optuna.logging.set_verbosity(optuna.logging.ERROR)
STUDY_NAME = "zplan"
_LOST_OWNER_SECONDS = 6 * 3600.0
"""A trial of another host that runs longer than this is taken for lost: its tuner cannot be looked up from here."""
_MOST_ATTEMPTS = 2
_LARGEST_INT = 1 << 53
"""Optuna keeps integers as floats."""
Origin = Literal["baseline", "ranking", "search", "confirm"]
Objective = Literal["speed", "pareto"]
_DIRECTIONS: Mapping[Objective, list[Literal["minimize", "maximize"]]] = {
    "speed": ["maximize"],
    "pareto": ["maximize", "minimize", "minimize"],
}
"""tokens/s; tokens/s, GPU bytes of the fullest rank, host bytes of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One finished trial."""

    key: str
    """Canonical key of the configuration."""
    origin: Origin
    """Why it was tried."""
    choice: Choice
    result: TrialResult
    predicted: TrialResult | None = None
    simulated: TrialResult | None = None
    started: float = 0.0
    """Seconds since the epoch."""
    finished: float = 0.0
    number: int = -1
    """The trial's number in the study; -1 before it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a study is about. Trials of different questions are never mixed."""

    recipe: Recipe
    cluster: Cluster
    evidence: Evidence
    """Measured, simulated or predicted by formula."""
    objective: Objective = "speed"
    """The fastest that fits, or the trials that no other beats in speed, GPU bytes and host bytes."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for two studies to be one; free memory and rates may vary."""
        gpu, host = self.cluster.gpu, self.cluster.host
        return {
            **files.to_data(self.recipe),
            "gpu": gpu.name,
            "gpu_total_bytes": gpu.total_bytes,
            "gpus_per_node": self.cluster.gpus_per_node,
            "nodes": self.cluster.nodes,
            "host_total_bytes": host.total_bytes,
            "evidence": self.evidence,
            **({"objective": self.objective} if self.objective != "speed" else {}),
        }

    def fingerprint(self) -> str:
        """A short name of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A trial that has started and has no answer yet."""

    number: int
    key: str
    origin: Origin
    choice: Choice
    started: float


class Ledger:
    """An open study."""

    def __init__(self, study: optuna.Study, path: str) -> None:
        self._study = study
        self._path = path
        self._read: dict[int, Record] = {}
        """By trial: what Optuna has once called complete never changes."""

    def records(self) -> tuple[Record, ...]:
        """Every finished trial, in the order in which they started."""
        trials = guarded(self._path, lambda: self._study.get_trials(deepcopy=False))
        finished = [t for t in trials if t.state is TrialState.COMPLETE and "record" in t.user_attrs]
        self._read |= {t.number: _record(t) for t in finished if t.number not in self._read}
        return tuple(self._read[t.number] for t in finished)

    def running(self) -> tuple[Running, ...]:
        """What this and other tuners are running now."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return tuple(_running(t) for t in trials if "started" in t.user_attrs)

    def interrupted(self) -> tuple[Choice, ...]:
        """Configurations whose tuner died in the middle of the trial, once, and that nobody has tried again."""
        done = {record.key for record in self.records()} | {trial.key for trial in self.running()} | self.deadly()
        return tuple({trial.key: trial.choice for trial in self._given_up() if trial.key not in done}.values())

    def deadly(self) -> set[str]:
        """Keys whose trial was given up twice: whatever ends the tuner there would end it again."""
        counts = Counter(trial.key for trial in self._given_up())
        return {key for key, count in counts.items() if count >= _MOST_ATTEMPTS}

    def _given_up(self) -> list[Running]:
        failed = self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        told = [trial for trial in failed if "started" in trial.user_attrs and "withdrawn" not in trial.user_attrs]
        return [_running(trial) for trial in told]

    def withdraw_if_taken(self, trial: Running) -> bool:
        """Whether another tuner has started this configuration before us; then our trial is taken back.

        Two tuners may propose the same at the same moment. Both see both trials; the lower number goes on.
        """
        others = [(other.key, other.number) for other in self.running()]
        others += [(record.key, record.number) for record in self.records()]
        if not any(key == trial.key and number < trial.number for key, number in others):
            return False

        def withdraw() -> None:
            self._trial(trial.number).set_user_attr("withdrawn", True)
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

        guarded(self._path, withdraw)
        return True

    def _trial(self, number: int) -> optuna.Trial:
        return optuna.Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)

    def begin(self, space: Space, choice: Choice, *, origin: Origin) -> Running:
        """Store that a trial starts, and by which process."""
        key, started = space.key(choice), time.time()
        draft = space.draft(choice)

        def write() -> Running:
            self._study.sampler = _scripted(draft)
            trial = self._study.ask()
            # The owner first: a trial without one would look like a live one for ever.
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": psutil.Process().create_time()}
            story = {"key": key, "origin": origin, "choice": files.to_data(choice), "started": started, "owner": owner}
            trial.set_user_attr("started", story)
            try:
                _store_knobs(trial, draft)
            except ValueError as error:  # Optuna: another distribution under the same name
                self._study.tell(trial.number, state=TrialState.FAIL)
                raise ConfigError(
                    f"the study {without_password(self._path)} keeps its knobs in another way",
                    because="another version of zplan wrote it",
                    fix="--study another-file",
                ) from error
            return Running(number=trial.number, key=key, origin=origin, choice=choice, started=started)

        return guarded(self._path, write)

    def finish(self, trial: Running, record: Record) -> Record:
        """Store a finished trial at once.

        Raises:
            MachineError: the study cannot be written; the record is then kept beside it and taken in by the next run.
        """
        record = replace(record, number=trial.number)
        try:
            guarded(self._path, lambda: self._tell(record))
        except MachineError:
            if "://" not in self._path:
                journal.keep_aside(Path(self._path), files.to_data(record))
            raise
        return record

    def _tell(self, record: Record) -> None:
        number = record.number
        trial = self._trial(number)
        if "record" not in trial.user_attrs:
            trial.set_user_attr("record", files.to_data(record))
        trial.set_constraint("memory", 1.0 if out_of_memory(record.result) else -1.0)
        trial.set_constraint("runs", -1.0 if has_speed(record.result) else 1.0)
        self._study.tell(number, _values(record.result, len(self._study.directions)), skip_if_finished=True)

    def abandon(self, trial: Running) -> None:
        """Give a trial up, so that the next run tries it again."""
        guarded(self._path, lambda: self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True))

    def take_over(self) -> int:
        """Finish or give up the trials of tuners that are gone; how many there were."""
        waiting = [t for t in self._study.get_trials(deepcopy=False) if t.state is TrialState.RUNNING]
        lost = [t for t in waiting if not _owner_lives(t)]
        aside = {} if "://" in self._path else journal.take_aside(Path(self._path))
        for trial in lost:
            data = trial.user_attrs.get("record") or aside.get(trial.number)
            if data is not None:
                self._tell(files.from_data(Record, data, name=self._path))
            else:
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        if aside:
            journal.forget_aside(Path(self._path))
        return len(lost)


def _values(result: TrialResult, num_objectives: int) -> list[float]:
    """What Optuna is told. Of a trial that did not run it is never read: constraints rank first."""
    gpu, host = gpu_bytes(result), result.host_resident_bytes
    values = [result.tokens_per_second or 0.0, float(gpu or "inf"), float(host or "inf")]
    return values[:num_objectives]


def out_of_memory(result: TrialResult) -> bool:
    """GPU or host memory did not suffice."""
    return result.outcome in (Outcome.GPU_OOM, Outcome.HOST_OOM)


def has_speed(result: TrialResult) -> bool:
    """The configuration ran and its speed is known, if only from a few steps."""
    return result.outcome in (Outcome.OK, Outcome.PRUNED)


def open_ledger(path: str, question: Question) -> Ledger:
    """Open or create the study of a question; trials of dead tuners are settled.

    Raises:
        ConfigError: the study belongs to another question.
        MachineError: it cannot be opened, written or locked.
    """
    storage = open_storage(path)
    study = guarded(path, lambda: _create(storage, path, question))
    if study.user_attrs["fingerprint"] != question.fingerprint():
        _refuse(path, study.user_attrs["identity"], question.identity())
    ledger = Ledger(study, path)
    guarded(path, ledger.take_over)
    return ledger


def _create(storage: BaseStorage, path: str, question: Question) -> optuna.Study:
    study = optuna.create_study(
        study_name=STUDY_NAME, storage=storage, directions=_DIRECTIONS[question.objective], load_if_exists=True
    )
    salvaged = None if "://" in path else journal.take_salvaged(Path(path))
    if "fingerprint" not in study.user_attrs:
        described = {
            "identity": question.identity(),
            "question": files.to_data(question),
            "fingerprint": question.fingerprint(),
        }
        for name, value in described.items():
            study.set_user_attr(name, (salvaged or {}).get(name, value))
    if salvaged is not None:
        for data in salvaged.get("records", []):
            study.add_trial(_salvaged_trial(files.from_data(Record, data, name=path), len(study.directions)))
        journal.forget_salvaged(Path(path))
    return study


def _salvaged_trial(record: Record, num_objectives: int) -> optuna.trial.FrozenTrial:
    return optuna.create_trial(
        state=TrialState.COMPLETE,
        values=_values(record.result, num_objectives),
        user_attrs={"record": files.to_data(record)},
        constraints={"runs": -1.0 if has_speed(record.result) else 1.0},
    )


def load_study(path: str) -> tuple[Question, tuple[Record, ...]]:
    """Read a study without changing it.

    Raises:
        ConfigError: there is none.
    """
    if "://" not in path and not Path(path).exists():
        raise ConfigError(f"{path} does not exist", because="there is no study yet", fix="zplan tune")
    try:
        study = optuna.load_study(study_name=STUDY_NAME, storage=open_storage(path))
    except KeyError as error:
        raise ConfigError(f"{path} holds no zplan study", fix="zplan tune --study another-file") from error
    question = files.from_data(Question, study.user_attrs["question"], name=path)
    return question, Ledger(study, path).records()


def _refuse(path: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    names = sorted(name for name in {*stored, *asked} if stored.get(name) != asked.get(name))
    raise ConfigError(
        f"the study {without_password(path)} belongs to another question",
        because="trials are comparable only for one recipe on one cluster, asked of one backend",
        problems=tuple(f"{name}: {stored.get(name)!r} in the study, {asked.get(name)!r} now" for name in names),
        fix="--study another-file",
    )


def _owner_lives(trial: optuna.trial.FrozenTrial) -> bool:
    story = trial.user_attrs.get("started")
    age = time.time() - trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    if story is None:
        return age < 60  # another tuner is between two writes, or died there
    owner = story["owner"]
    if owner["host"] != socket.gethostname():
        return age < _LOST_OWNER_SECONDS
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["since"]) < 1.0)
    except psutil.NoSuchProcess:
        return False


def _store_knobs(trial: optuna.Trial, draft: Draft) -> None:
    """Every knob as an Optuna parameter, in ranges that never change: a study takes no other choices later, but users
    narrow and widen, and a drive appears."""
    for name, value in draft.items():
        match value:
            case bool():
                trial.suggest_categorical(name, (False, True))
            case str():
                trial.suggest_categorical(name, ("none", "cpu", "nvme"))
            case int():
                trial.suggest_int(name, 0, _LARGEST_INT)
            case float():
                trial.suggest_float(name, 0.0, 1.0)


def _scripted(draft: Draft) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # "may change": the pinned version is what is tested
        return PartialFixedSampler(dict(draft), RandomSampler())


def _record(trial: optuna.trial.FrozenTrial) -> Record:
    record = files.from_data(Record, trial.user_attrs["record"], name=f"trial {trial.number}")
    return replace(record, number=trial.number)


def _running(trial: optuna.trial.FrozenTrial) -> Running:
    story = trial.user_attrs["started"]
    choice = files.from_data(Choice, story["choice"], name=f"trial {trial.number}")
    return Running(
        number=trial.number, key=story["key"], origin=story["origin"], choice=choice, started=story["started"]
    )
