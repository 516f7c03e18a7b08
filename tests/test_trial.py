"""When a trial is clearly slower than the best."""

from __future__ import annotations

from zplan.trial import clearly_slower


def test_one_step_must_take_half_as_long_again() -> None:
    assert not clearly_slower([1.45], [1.0, 1.0, 1.0])  # log 1.45 = 0.37 < 2 x 2 x 0.10 / sqrt(1)
    assert clearly_slower([1.55], [1.0, 1.0, 1.0])  # log 1.55 = 0.44


def test_more_steps_decide_smaller_differences() -> None:
    assert clearly_slower([1.4, 1.4], [1.0, 1.0])  # log 1.4 = 0.34 > 2 x 2 x 0.10 / sqrt(2) = 0.28
    assert not clearly_slower([1.4], [1.0, 1.0])


def test_steps_are_compared_with_the_same_examples() -> None:
    assert not clearly_slower([3.0, 1.0], [3.0, 1.0])
    assert clearly_slower([6.0, 2.0], [3.0, 1.0])


def test_a_trial_that_scatters_is_given_time() -> None:
    assert not clearly_slower([3.0, 1.0], [1.0, 1.0])


def test_without_a_best_nothing_is_slower() -> None:
    assert not clearly_slower([100.0], [])
