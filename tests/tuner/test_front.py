"""Three objectives: who is beaten, what the front is worth, and a search that fills it."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest

from tests.oracle import toy_cluster
from tests.tuner_process import tune
from zplan.errors import ConfigError
from zplan.trial import Outcome, TrialResult
from zplan.tuner.front import Front, Point, make_front, point, unbeaten
from zplan.tuner.ledger import load_study
from zplan.tuner.winner import make_plan

CORNER = Point(0.0, 10.0, 10.0)


def test_a_trial_is_beaten_by_one_that_is_no_worse_in_anything() -> None:
    points = [Point(2.0, 5.0, 5.0), Point(2.0, 5.0, 6.0), Point(1.0, 4.0, 6.0), Point(2.0, 5.0, 5.0)]
    assert unbeaten(points) == [0, 2]


def test_what_did_not_run_is_no_point() -> None:
    assert point(TrialResult(outcome=Outcome.GPU_OOM, evidence="measured", gpu_used_bytes=1)) is None


def test_the_volume_is_what_the_points_dominate_together() -> None:
    """Two boxes, 2 x 5 x 5 and 1 x 8 x 5, that share 1 x 5 x 5."""
    front = Front((Point(2.0, 5.0, 5.0), Point(1.0, 2.0, 5.0)), CORNER)
    assert front.volume() == pytest.approx(2 * 5 * 5 + 1 * 8 * 5 - 1 * 5 * 5)


def test_a_sure_gain_is_the_volume_that_it_adds() -> None:
    front = Front((Point(2.0, 5.0, 5.0),), CORNER)
    smaller = Point(1.0, 2.0, 5.0)
    grown = Front((*front.points, smaller), CORNER).volume() / front.volume() - 1
    assert front.expected_gain(1.0, 1e-9, smaller.log_gpu, smaller.log_host) == pytest.approx(grown)


def test_what_is_slower_and_larger_promises_nothing() -> None:
    front = Front((Point(2.0, 5.0, 5.0),), CORNER)
    assert front.expected_gain(1.0, 1e-9, 6.0, 6.0) == pytest.approx(0.0)


def test_a_quarter_of_the_fastest_speed_is_worth_nothing() -> None:
    cluster = toy_cluster()
    front = make_front([Point(log(1000.0), 20.0, 20.0)], cluster)
    assert front.expected_gain(log(250.0), 1e-9, 19.0, 19.0) == pytest.approx(0.0, abs=1e-6)
    assert front.expected_gain(log(500.0), 1e-9, 19.0, 19.0) > 0.01


def test_a_pareto_study_offers_smaller_ones_and_resumes(tmp_path: Path) -> None:
    study, plan_path = str(tmp_path / "study.journal"), tmp_path / "best.json"
    outcome = tune(study, 12, objective="pareto", plan_path=plan_path)
    fastest_only = tune(str(tmp_path / "other.journal"), 12)
    assert len(outcome.front) > len(fastest_only.front)
    assert outcome.best is not None
    assert outcome.front[0].key == outcome.best.key
    peaks = [record.result.gpu_used_bytes or 0 for record in outcome.front]
    assert min(peaks) < peaks[0] / 2
    again = tune(study, 12, objective="pareto")
    assert again.num_resumed == len(outcome.records)
    with pytest.raises(ConfigError, match="belongs to another question"):
        tune(study, 12)


def test_another_trial_of_the_front_becomes_the_plan(tmp_path: Path) -> None:
    study = str(tmp_path / "study.journal")
    front = tune(study, 12, objective="pareto").front
    question, records = load_study(study)
    plan = make_plan(question, records, model_path="toy", study_path=study, trial=front[-1].number)
    assert plan is not None
    assert plan.choice == front[-1].choice
    with pytest.raises(ConfigError, match="trial 99 is none"):
        make_plan(question, records, model_path="toy", study_path=study, trial=99)
