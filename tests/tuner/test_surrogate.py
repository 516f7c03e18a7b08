"""What finished trials say about the others."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest

from tests.oracle import TOY_RECIPE, toy_cluster, toy_shape
from zplan.tuner.space import Problem, make_knobs
from zplan.tuner.surrogate import Observation, Part, Surrogate, features, make_kernel

KERNEL = (Part((0, 1), 0.35),)
HERE, NEAR, FAR = np.array([0.0, 0.0]), np.array([0.1, 0.0]), np.array([9.0, 9.0])


def _ran(point: object, predicted: float, measured: float | None, *, share: float = -1.0) -> Observation:
    return Observation(
        point=np.asarray(point),
        log_predicted=log(predicted),
        log_measured=log(measured) if measured is not None else None,
        log_share=share,
        out_of_memory=measured is None,
    )


def test_without_trials_the_formula_is_believed() -> None:
    assert Surrogate([], KERNEL).speed(HERE, log(500))[0] == pytest.approx(log(500))


def test_one_trial_corrects_every_speed() -> None:
    model = Surrogate([_ran(HERE, 100, 50)], KERNEL)
    assert exp(model.speed(FAR, log(1000))[0]) == pytest.approx(500)  # half of what the formula says, everywhere


def test_near_trials_count_more_than_far_ones() -> None:
    model = Surrogate([_ran(HERE, 100, 100), _ran(FAR, 100, 50)], KERNEL)
    assert model.speed(NEAR, log(100))[0] > model.speed(FAR, log(100))[0]
    assert model.speed(NEAR, log(100))[1] < model.speed(np.array([4.0, 4.0]), log(100))[1]


def test_out_of_memory_moves_the_limit_below_it() -> None:
    before = Surrogate([_ran(HERE, 100, 100, share=log(0.7))], KERNEL)
    after = Surrogate([_ran(HERE, 100, 100, share=log(0.7)), _ran(FAR, 100, None, share=log(0.9))], KERNEL)
    assert before.fits(log(0.9)) > 0.9
    assert after.fits(log(0.9)) < 0.2
    assert after.fits(log(0.7)) > 0.8


def test_what_cannot_fit_promises_nothing() -> None:
    model = Surrogate([_ran(HERE, 100, 100, share=log(0.5)), _ran(FAR, 100, None, share=log(0.6))], KERNEL)
    assert model.gain(NEAR, log(200), log(2.0)) < 1e-6 < model.gain(NEAR, log(200), log(0.4))


def test_an_unordered_knob_is_equally_far_from_all_its_values() -> None:
    knobs = [
        knob
        for knob in make_knobs(Problem(shape=toy_shape(), recipe=TOY_RECIPE, cluster=toy_cluster()))
        if knob.name == "stage"
    ]
    points = [features(knobs, {"stage": stage}) for stage in (0, 1, 3)]
    assert np.linalg.norm(points[0] - points[1]) == pytest.approx(np.linalg.norm(points[0] - points[2]))


def test_what_one_knob_taught_is_believed_whatever_the_others_are() -> None:
    knobs = make_knobs(Problem(shape=toy_shape(), recipe=TOY_RECIPE, cluster=toy_cluster()))

    def point(stage: int, micro_batch: int) -> np.ndarray:  # type: ignore[type-arg]
        draft = {"world_size": 4, "stage": stage, "train_micro_batch_size_per_gpu": micro_batch}
        return features(knobs, {**draft, "gradient_checkpointing": True})

    ran = [_ran(point(0, 1), 100, 100), _ran(point(3, 1), 100, 60)]
    model = Surrogate(ran, make_kernel(knobs))
    assert model.speed(point(3, 8), log(100))[0] < model.speed(point(0, 8), log(100))[0] - 0.1


def test_a_bucket_is_expected_to_change_less_than_a_stage() -> None:
    knobs = make_knobs(Problem(shape=toy_shape(), recipe=TOY_RECIPE, cluster=toy_cluster()))
    tried = {"world_size": 4, "stage": 2, "train_micro_batch_size_per_gpu": 1, "reduce_bucket_size": 10**9}
    model = Surrogate([_ran(features(knobs, tried), 100, 100)], make_kernel(knobs))
    bucket = model.speed(features(knobs, {**tried, "reduce_bucket_size": 10**6}), log(100))[1]
    stage = model.speed(features(knobs, {**tried, "stage": 3}), log(100))[1]
    assert bucket < stage / 2


def test_a_few_trials_that_agree_do_not_make_it_certain_of_a_stage_that_was_never_tried() -> None:
    """Under the smallest scale alone a stage deviates by at most 0.5 x sqrt(0.15^2 + 0.10^2)."""
    knobs = make_knobs(Problem(shape=toy_shape(), recipe=TOY_RECIPE, cluster=toy_cluster()))

    def point(stage: int) -> np.ndarray:  # type: ignore[type-arg]
        draft = {"world_size": 4, "stage": stage, "train_micro_batch_size_per_gpu": 1, "gradient_checkpointing": True}
        return features(knobs, draft)

    agreeing = [_ran(point(stage), 100, 100) for stage in (0, 1, 2)]
    scattered = [_ran(point(stage), 100, speed) for stage, speed in zip((0, 1, 2), (60, 100, 160), strict=True)]
    after = [Surrogate(ran, make_kernel(knobs)).speed(point(3), log(100))[1] for ran in (agreeing, scattered)]
    assert 0.5 * (0.15**2 + 0.10**2) ** 0.5 < after[0] < after[1]
