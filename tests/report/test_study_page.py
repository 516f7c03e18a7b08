"""The page of a study: the front of three objectives, and the formula's error before and after."""

from __future__ import annotations

import re
from pathlib import Path

from tests.oracle import Oracle
from tests.tuner_process import SHAPE, tune
from zplan.report.html import render_report
from zplan.report.rows import pareto_rows, study_rows
from zplan.tuner.ledger import load_study


def test_the_page_shows_the_front_and_what_the_trials_teach(tmp_path: Path) -> None:
    study = str(tmp_path / "study.journal")
    outcome = tune(study, 8, objective="pareto", backend=Oracle(SHAPE, memory_error=1.25))
    rows = study_rows(outcome.records)
    assert list(pareto_rows(rows)["trial"]) == [record.number for record in outcome.front]
    page = render_report(*load_study(study))
    assert page.count("<svg") == 3
    (gpu,) = re.findall(r"GPU bytes</td><td>(\d+)</td><td>([\d.]+%)</td><td>([\d.]+%)</td>", page)
    assert gpu == (str(sum(record.result.tokens_per_second is not None for record in outcome.records)), "20.0%", "0.0%")
    assert all(f"<td>{record.number}*</td>" in page for record in outcome.front)
