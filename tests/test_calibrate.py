"""Corrections learned from trials: per machine, per versions, judged on trials they have not seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracle import TOY_RECIPE, Oracle, toy_cluster, toy_shape
from zplan.calibrate import (
    CalibratedBackend,
    Corrections,
    accuracy,
    apply,
    learn,
    load_corrections,
    machine_name,
    save_corrections,
)
from zplan.errors import ConfigError
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.zero_config import Choice, ZeroConfig, batch_sizes

CLUSTER = toy_cluster()
VERSIONS = {"deepspeed": "0.19.8"}


def _result(gpu_bytes: int, speed: float, *, outcome: Outcome = Outcome.OK) -> TrialResult:
    return TrialResult(
        outcome=outcome, evidence="formula", gpu_allocated_bytes=gpu_bytes, gpu_used_bytes=gpu_bytes,
        tokens_per_second=speed, step_seconds=1000 / speed,
    )  # fmt: skip


def _learned(ratios: list[float]) -> Corrections:
    nothing = Corrections(machine=machine_name(CLUSTER), versions=VERSIONS)
    pairs = {f"s/{i}": (_result(1000, 100.0), _result(int(1000 * r), 100.0 / r)) for i, r in enumerate(ratios)}
    return learn(nothing, pairs)


def test_the_correction_is_the_median_ratio() -> None:
    corrected = apply(_result(2000, 50.0), _learned([1.1, 1.2, 9.0]))
    assert corrected.evidence == "calibrated"
    assert corrected.gpu_allocated_bytes == 2400  # 2000 x 1.2
    assert corrected.tokens_per_second == pytest.approx(50 / 1.2)
    assert corrected.step_seconds == pytest.approx(1000 / 50 * 1.2)


def test_two_trials_correct_nothing() -> None:
    assert apply(_result(2000, 50.0), _learned([1.1, 1.2])) == _result(2000, 50.0)


def test_a_failed_trial_teaches_no_ratio() -> None:
    nothing = Corrections(machine="m", versions={})
    pairs = {"s/0": (_result(1000, 100.0), _result(1500, 10.0, outcome=Outcome.GPU_OOM))}
    assert learn(nothing, pairs).samples == ()


def test_a_trial_counts_once() -> None:
    once = _learned([1.1, 1.2, 1.3])
    again = learn(once, {"s/0": (_result(1000, 100.0), _result(1100, 100.0))})
    assert len(again.samples) == 3


def test_the_error_after_is_judged_on_the_other_trials() -> None:
    found = {item.quantity: item for item in accuracy(_learned([1.2, 1.2, 1.2, 1.2, 2.4]))}
    assert found["gpu_bytes"].before == pytest.approx(1 - 1 / 1.2)
    assert found["gpu_bytes"].after == pytest.approx(0.0, abs=1e-9)
    assert accuracy(_learned([1.2, 1.2, 1.2]))[0].after is None  # the two others are too few


def test_corrections_are_kept_per_machine_and_versions(tmp_path: Path) -> None:
    learned = _learned([1.1, 1.2, 1.3])
    save_corrections(learned, CLUSTER, tmp_path)
    assert load_corrections(CLUSTER, VERSIONS, tmp_path) == learned
    assert load_corrections(CLUSTER, {"deepspeed": "0.20"}, tmp_path).samples == ()
    assert load_corrections(toy_cluster(gpus=2), VERSIONS, tmp_path).samples == ()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_corrections(_learned([1.1]), CLUSTER, tmp_path).write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_corrections(CLUSTER, VERSIONS, tmp_path)


def test_a_correction_never_turns_does_not_fit_into_fits() -> None:
    learned = _learned([0.5, 0.5, 0.5])
    assert apply(_result(9000, 1.0, outcome=Outcome.GPU_OOM), learned).outcome is Outcome.GPU_OOM


def test_a_backend_is_corrected_as_a_whole() -> None:
    spec = TrialSpec(
        recipe=TOY_RECIPE, cluster=CLUSTER, model_path="toy",
        choice=Choice(zero=ZeroConfig(stage=2), batch=batch_sizes(TOY_RECIPE, micro_batch=1, world_size=4)),
    )  # fmt: skip
    plain = Oracle(toy_shape(), evidence="formula")
    corrected = CalibratedBackend(plain, _learned([2.0, 2.0, 2.0])).run(spec)
    assert corrected.tokens_per_second == pytest.approx((plain.run(spec).tokens_per_second or 0) / 2)
