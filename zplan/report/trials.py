"""The trials of a study as terminal tables. Rows in, Rich renderables out; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from zplan.report.labels import strategy_code
from zplan.report.terminal import plain_table, signed
from zplan.trial import Evidence, Outcome, TrialResult
from zplan.tuner.front import gpu_bytes
from zplan.units import format_bytes, format_bytes_short

if TYPE_CHECKING:
    from zplan.tuner.ledger import Record
    from zplan.zero_config import Choice

_OUTCOME_STYLE = {Outcome.OK: "green", Outcome.PRUNED: "yellow"}


def outcome_text(outcome: Outcome) -> Text:
    return Text(outcome.value, style=_OUTCOME_STYLE.get(outcome, "red"))


_TRIALS: Mapping[Evidence, str] = {
    "measured": "Trials, measured",
    "simulated": "Trials on simulated memory with predicted seconds: nothing was measured",
    "formula": "Trials by formula: nothing was measured",
    "calibrated": "Trials by formula, calibrated: nothing was measured",
}


def render_records(
    records: Sequence[Record], *, best: Record | None, world_size: int, front: Sequence[Record] = ()
) -> RenderableType:
    """The trials of a study, fastest first; it fits 80 columns. An asterisk marks the front."""
    table = plain_table(_TRIALS[records[0].result.evidence] if records else "Trials")
    table.padding = (0, 1, 0, 0)
    for heading in ("", "#", "configuration", "outcome", "GPU", "predicted", "host", "tokens/s"):
        justify: Literal["left", "right"] = "left" if heading in ("", "configuration", "outcome") else "right"
        table.add_column(heading, justify=justify, no_wrap=heading != "configuration")
    on_front = {record.number for record in front}
    for record in records:
        result = record.result
        measured, predicted = compared_gpu_bytes(record)
        mark = "*" if record.number in on_front else ""
        table.add_row(
            "→" if best is not None and record.number == best.number else mark,
            str(record.number),
            _configuration(record.choice, world_size) + (" again" if record.origin == "confirm" else ""),
            outcome_text(result.outcome),
            format_bytes_short(measured),
            format_bytes_short(predicted),
            format_bytes_short(result.host_resident_bytes),
            format_speed(result.tokens_per_second),
        )
    return table


def compared_gpu_bytes(record: Record) -> tuple[int | None, int | None]:
    """Peak of the fullest rank and its prediction: used where the device tells, else allocated."""
    result, predicted = record.result, record.predicted
    if result.gpu_used_bytes is not None:
        return result.gpu_used_bytes, predicted.gpu_used_bytes if predicted else None
    return result.gpu_allocated_bytes, predicted.gpu_allocated_bytes if predicted else None


def _configuration(choice: Choice, world_size: int) -> str:
    """`ZeRO-3 par:cpu 4/8 2x1`: strategy, GPUs used if not all, micro-batch x accumulation."""
    batch = choice.batch
    cut = f"{batch.train_micro_batch_size_per_gpu}x{batch.gradient_accumulation_steps}"
    return f"{strategy_code(choice, world_size)} {cut}"


def format_speed(tokens_per_second: float | None) -> str:
    """tokens/s for people; slow ones with a decimal."""
    if not tokens_per_second:
        return "-"
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:,.1f}"


def render_front(front: Sequence[Record], *, world_size: int, plan_path: str) -> RenderableType:
    """What each trial of the front gives up in speed and saves in memory, compared with the fastest."""
    table = plain_table("Nothing beats these in all of speed, GPU and host memory")
    for heading in ("#", "configuration", "tokens/s", "GPU", "host/node"):
        table.add_column(heading, justify="left" if heading == "configuration" else "right", no_wrap=True)
    for record in front:
        result, fastest = record.result, front[0].result
        is_first = record is front[0]
        table.add_row(
            str(record.number),
            _configuration(record.choice, world_size),
            format_speed(result.tokens_per_second) if is_first else _share(result, fastest),
            *(
                format_bytes(size) if is_first or size is None or first is None else signed(size - first)
                for size, first in (
                    (gpu_bytes(result), gpu_bytes(fastest)),
                    (result.host_resident_bytes, fastest.host_resident_bytes),
                )
            ),
        )
    hint = Text(f"the first is in {plan_path}; another of them: zplan pick {front[-1].number}", style="dim")
    return Group(table, hint)


def _share(result: TrialResult, fastest: TrialResult) -> str:
    return f"{(result.tokens_per_second or 0.0) / (fastest.tokens_per_second or 1.0) - 1:+.0%}"


_PROGRESS = "{:>3} {:<31} {:<20} {:>8} {:>8} {:>5}"
_NUMBERS = "{:<6} {:>6} {:>6}"
"""#, configuration, outcome with GPU and host bytes, tokens/s, best so far, time left: 80 columns."""


def progress_heading() -> Text:
    """The names of the columns of `progress_line`."""
    sizes = _NUMBERS.format("", "GPU", "host")
    return Text(_PROGRESS.format("#", "configuration", sizes, "tokens/s", "best", "left"), style="dim")


def progress_line(record: Record, *, best: Record | None, remaining_seconds: float | None, world_size: int) -> Text:
    """One finished trial; an outcome without numbers takes their place."""
    result = record.result
    outcome, configuration = result.outcome.value, _configuration(record.choice, world_size)
    sizes = (format_bytes_short(gpu_bytes(result)), format_bytes_short(result.host_resident_bytes))
    line = _PROGRESS.format(
        record.number,
        configuration,
        _NUMBERS.format(outcome, *sizes) if result.tokens_per_second else outcome,
        format_speed(result.tokens_per_second),
        format_speed(best.result.tokens_per_second if best else None),
        _minutes(remaining_seconds),
    )
    text = Text(line)
    start = line.index(f" {outcome}", len(configuration))
    text.stylize(_OUTCOME_STYLE.get(result.outcome, "red"), start, start + 1 + len(outcome))
    return text


def _minutes(seconds: float | None) -> str:
    if not seconds:
        return ""
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 100 * 60 else f"{seconds / 3600:.0f}h"
