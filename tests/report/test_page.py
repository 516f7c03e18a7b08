"""The study as rows, and the rows as one page that needs nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas as pd
import pytest

from tests.oracle import TOY_RECIPE, toy_cluster
from zplan.report.html import render_report
from zplan.report.rows import accuracy_rows, best_so_far, pareto_rows, study_rows
from zplan.trial import Outcome, TrialResult
from zplan.tuner.ledger import Question, Record
from zplan.units import GIB
from zplan.zero_config import Choice, ZeroConfig, batch_sizes

QUESTION = Question(recipe=TOY_RECIPE, cluster=toy_cluster(), evidence="measured")


def record(number: int, *, stage: int, gpu: float, host: float, speed: float | None, message: str = "") -> Record:
    """A trial that ran, or ran out of memory if it has no speed; the formula said 2 GiB."""
    result = TrialResult(
        outcome=Outcome.OK if speed else Outcome.GPU_OOM, evidence="measured", message=message,
        gpu_allocated_bytes=int(gpu * GIB) if speed else None, gpu_used_bytes=int(gpu * GIB),
        host_resident_bytes=int(host * GIB), tokens_per_second=speed, step_seconds=1000 / speed if speed else None,
    )  # fmt: skip
    predicted = TrialResult(outcome=Outcome.OK, evidence="formula", gpu_allocated_bytes=2 * GIB)
    return Record(
        key=str(number), origin="search", number=number, result=result, predicted=predicted, started=0.0, finished=9.0,
        choice=Choice(zero=ZeroConfig(stage=stage), batch=batch_sizes(TOY_RECIPE, micro_batch=1, world_size=4)),
    )  # fmt: skip


RECORDS = (
    record(0, stage=0, gpu=4, host=1, speed=100.0),
    record(1, stage=1, gpu=9, host=1, speed=None, message="CUDA out of memory, <b>really</b>"),
    record(2, stage=2, gpu=2, host=3, speed=80.0),
    record(3, stage=3, gpu=4, host=3, speed=70.0),
    record(4, stage=3, gpu=5, host=2, speed=150.0),
)


def test_the_best_so_far_ignores_what_did_not_run() -> None:
    rows = study_rows(RECORDS)
    assert best_so_far(rows.iloc[1:]).tolist()[1:] == [80, 80, 150]
    assert best_so_far(rows).tolist() == [100, 100, 100, 100, 150]


def test_the_front_holds_what_no_other_trial_beats_in_all_three() -> None:
    # trial 3 is slower than trial 2 and needs more of the GPU; trial 1 did not run
    assert pareto_rows(study_rows(RECORDS))["trial"].tolist() == [4, 0, 2]


def test_an_error_of_prediction_is_relative_to_the_trial_and_only_of_those_that_ran() -> None:
    errors = dict(accuracy_rows(study_rows(RECORDS))[["trial", "gpu_error"]].itertuples(index=False))
    assert errors == pytest.approx({0: 2 / 4 - 1, 2: 2 / 2 - 1, 3: 2 / 4 - 1, 4: 2 / 5 - 1})


def test_the_page_names_the_winner_escapes_what_processes_said_and_needs_no_network() -> None:
    page = render_report(QUESTION, RECORDS)
    assert re.search(
        r"Fastest: trial 4, <strong>ZeRO-3[^<]*</strong>, 150.0 tokens/s,\s+5.00 GiB allocated per rank", page
    )
    assert "4 of 5 trials ran" in page
    assert "&lt;b&gt;really&lt;/b&gt;" in page
    assert "<b>really" not in page
    assert not re.search(r'(?:src|href)="(?!#)[^"]*"', page.replace('xlink:href="#', 'href="#'))


def test_a_page_about_simulations_says_that_its_speed_is_predicted() -> None:
    page = render_report(replace(QUESTION, evidence="simulated"), RECORDS)
    assert "Memory is simulated and speed predicted: nothing was measured." in page
    assert "Prediction against simulation" in page
    assert "All numbers are measured." in render_report(QUESTION, RECORDS)
    assert ">DDP, 1 x" in page, "the name of the terminal's tables"


def test_a_study_without_a_successful_trial_has_a_page_too() -> None:
    page = render_report(QUESTION, RECORDS[1:2])
    assert "No trial ran." in page
    assert pd.isna(best_so_far(study_rows(RECORDS[1:2])).iloc[0])
