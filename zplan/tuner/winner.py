"""The study's answer: the fastest configuration that fits, as a Plan with a ladder of safer, smaller ones under it."""

from __future__ import annotations

from collections.abc import Sequence

from zplan.calibrate import library_versions
from zplan.errors import ConfigError
from zplan.plan import Plan, Rung
from zplan.trial import Outcome, TrialResult
from zplan.tuner.front import gpu_bytes, point, unbeaten
from zplan.tuner.ledger import Question, Record
from zplan.tuner.storage import without_password
from zplan.units import format_bytes
from zplan.zero_config import Choice, deepspeed_config

_RUNGS = 3


def rank_records(records: Sequence[Record]) -> list[Record]:
    """The trials that ran, fastest first; one per configuration, by the mean over its runs."""
    by_key: dict[str, list[Record]] = {}
    for record in records:
        by_key.setdefault(record.key, []).append(record)
    whole = [runs for runs in by_key.values() if all(run.result.outcome is Outcome.OK for run in runs)]
    return [runs[-1] for runs in sorted(whole, key=lambda runs: -_mean_speed(runs))]


def _mean_speed(runs: Sequence[Record]) -> float:
    return sum(run.result.tokens_per_second or 0.0 for run in runs) / len(runs)


def compared(records: Sequence[Record], study_path: str) -> dict[str, tuple[TrialResult, TrialResult]]:
    """Trial -> what the formula said and what was measured; its start tells studies of the same name apart."""
    return {
        f"{without_password(study_path)}#{record.number}@{record.started:.3f}": (record.predicted, record.result)
        for record in records
        if record.predicted is not None and record.predicted.evidence == "formula"
    }


def peak_bytes(record: Record) -> int | None:
    """GPU bytes of a trial by the best evidence there is: used, else allocated; measured before predicted."""
    for result in (record.result, record.simulated, record.predicted):
        found = gpu_bytes(result) if result is not None else None
        if found is not None:
            return found
    return None


def front_records(records: Sequence[Record]) -> list[Record]:
    """The trials that no other beats in speed, GPU bytes and host bytes, fastest first."""
    known = [(record, found) for record in rank_records(records) if (found := point(record.result)) is not None]
    return [known[index][0] for index in unbeaten([found for _, found in known])]


def make_plan(
    question: Question, records: Sequence[Record], *, model_path: str, study_path: str, trial: int | None = None
) -> Plan | None:
    """The plan of the fastest trial that ran every time it was tried, or of `trial`; None if none did.

    Raises:
        ConfigError: `trial` is not one that ran.
    """
    ranked = rank_records(records)
    if trial is not None:
        ranked = _from_trial(ranked, records, trial)
    if not ranked:
        return None
    winner = ranked[0]
    is_simulated = question.evidence == "simulated"
    return Plan(
        model_path=model_path,
        recipe=question.recipe,
        choice=winner.choice,
        deepspeed=_deepspeed(question, winner.choice),
        cluster=question.cluster,
        predicted=winner.predicted,
        simulated=winner.result if is_simulated else winner.simulated,
        measured=winner.result if question.evidence == "measured" else None,
        ladder=make_ladder(question, ranked),
        study=without_password(study_path),
        trial=winner.number,
        versions=library_versions(),
    )


def _from_trial(ranked: list[Record], records: Sequence[Record], trial: int) -> list[Record]:
    """The ranking from this trial's configuration down."""
    key = next((record.key for record in records if record.number == trial), None)
    found = next((index for index, record in enumerate(ranked) if record.key == key), None)
    if found is None:
        raise ConfigError(
            f"trial {trial} is none that ran to its end every time",
            because=f"those that did, fastest first, are {', '.join(str(record.number) for record in ranked)}",
            fix=f"zplan pick {ranked[0].number}" if ranked else "zplan tune",
        )
    return ranked[found:]


def make_ladder(question: Question, ranked: Sequence[Record]) -> tuple[Rung, ...]:
    """Runner-ups, each with a smaller peak than the rung above: where training steps down to when memory runs out."""
    rungs: list[Rung] = []
    ceiling = peak_bytes(ranked[0])
    for record in ranked[1:]:
        peak = peak_bytes(record)
        if ceiling is None or peak is None or peak >= ceiling or len(rungs) == _RUNGS:
            continue
        speed = record.result.tokens_per_second or 0.0
        best = ranked[0].result.tokens_per_second or speed or 1.0
        rungs.append(
            Rung(
                choice=record.choice,
                deepspeed=_deepspeed(question, record.choice),
                reason=f"{format_bytes(ceiling - peak)} less per GPU than the one above, {speed / best:.0%} of the "
                f"fastest's speed (trial {record.number})",
                predicted=record.predicted,
                measured=record.result if question.evidence == "measured" else None,
            )
        )
        ceiling = peak
    return tuple(rungs)


def _deepspeed(question: Question, choice: Choice) -> dict[str, object]:
    # CPU ranks keep torch's AdamW: DeepSpeedCPUAdam is a compiled op that brings nothing where there is no GPU.
    return deepspeed_config(question.recipe, choice, cpu_adam=question.cluster.gpu.kind == "cuda")
