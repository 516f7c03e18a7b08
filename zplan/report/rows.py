"""Study -> rows. Every number that a report shows is computed here and tested; drawing is looked at."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from zplan.report.labels import choice_label
from zplan.tuner.ledger import Record
from zplan.tuner.winner import front_records

COLUMNS = (
    "trial", "configuration", "origin", "outcome", "stage", "micro_batch", "gradient_checkpointing",
    "tokens_per_second", "step_seconds", "gpu_bytes", "predicted_gpu_bytes", "gpu_error", "host_bytes", "seconds",
    "message", "front",
)  # fmt: skip


def study_rows(records: Sequence[Record]) -> pd.DataFrame:
    """One row a trial, in the order in which they ran. Bytes and seconds as measured; NaN is unknown."""
    front = {record.number for record in front_records(records)}
    rows = [{**_row(record), "front": record.number in front} for record in records]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(record: Record) -> dict[str, object]:
    result, predicted = record.result, record.predicted
    gpu, expected = result.gpu_allocated_bytes, predicted.gpu_allocated_bytes if predicted else None
    return {
        "trial": record.number,
        "configuration": choice_label(record.choice),
        "origin": record.origin,
        "outcome": result.outcome.value,
        "stage": record.choice.zero.stage,
        "micro_batch": record.choice.batch.train_micro_batch_size_per_gpu,
        "gradient_checkpointing": record.choice.gradient_checkpointing,
        "tokens_per_second": result.tokens_per_second,
        "step_seconds": result.step_seconds,
        "gpu_bytes": gpu,
        "predicted_gpu_bytes": expected,
        "gpu_error": expected / gpu - 1 if gpu and expected else None,
        "host_bytes": result.host_resident_bytes,
        "seconds": record.finished - record.started,
        "message": result.message,
    }


def best_so_far(rows: pd.DataFrame) -> pd.Series[float]:
    """The fastest successful trial up to each trial, tokens/s; NaN before the first."""
    speed = pd.to_numeric(rows["tokens_per_second"]).where(rows["outcome"] == "ok")
    return speed.cummax().ffill()


def pareto_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The trials that no other beats in all of speed, GPU and host bytes, fastest first."""
    return rows[rows["front"].astype(bool)].sort_values("tokens_per_second", ascending=False)


def accuracy_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Predicted against measured GPU peak of the trials that have both."""
    return rows.dropna(subset=["gpu_error"])[
        ["trial", "configuration", "predicted_gpu_bytes", "gpu_bytes", "gpu_error"]
    ]
