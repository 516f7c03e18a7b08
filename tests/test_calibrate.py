"""Corrections learned from trials: per machine, per versions, judged on trials they have not seen."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.oracle import toy_cluster
from tests.tuner_process import tune
from zplan import calibrate, files
from zplan.backends.formula import FormulaBackend
from zplan.calibrate import (
    Corrections,
    accuracy,
    corrections_path,
    known_corrections,
    learn,
    machine_name,
    outdated,
    remember,
)
from zplan.candidates import Candidate, Fixed, evaluate
from zplan.catalog import find_model
from zplan.commands.estimate import estimate
from zplan.corrected import correct
from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.job import Job
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.trial import Evidence, Outcome, TrialResult, TrialSpec
from zplan.tuner.study import Silent
from zplan.zero_config import Choice, ZeroConfig, batch_sizes

CLUSTER = toy_cluster()
VERSIONS = {"deepspeed": "0.19.8"}
_FOUND = find_model("qwen2.5-0.5b", overrides={})
assert isinstance(_FOUND, ModelShape)
SHAPE = _FOUND
RECIPE = Recipe(model="qwen2.5-0.5b", train_batch_size=16, max_length=512)
CHOICE = Choice(zero=ZeroConfig(stage=2), batch=batch_sizes(RECIPE, micro_batch=1, world_size=4))


def _candidate(cluster: Cluster = CLUSTER) -> Candidate:
    return evaluate(SHAPE, RECIPE, CHOICE, cluster)


def _result(gpu_bytes: int, speed: float, *, outcome: Outcome = Outcome.OK) -> TrialResult:
    return TrialResult(
        outcome=outcome, evidence="formula", gpu_allocated_bytes=gpu_bytes, gpu_used_bytes=gpu_bytes,
        tokens_per_second=speed, step_seconds=1000 / speed,
    )  # fmt: skip


def _learned(ratios: list[float]) -> Corrections:
    return learn(Corrections(machine=machine_name(CLUSTER), versions=VERSIONS), _pairs(ratios))


def _pairs(ratios: list[float]) -> dict[str, tuple[TrialResult, TrialResult]]:
    return {f"s/{i}": (_result(1000, 100.0), _result(int(1000 * r), 100.0 / r)) for i, r in enumerate(ratios)}


def test_the_correction_is_the_median_ratio() -> None:
    plain = _candidate()
    corrected = correct(plain, _learned([1.1, 1.2, 9.0]), CLUSTER)
    more = round(plain.memory.gpu.allocated.expected * 1.2) - plain.memory.gpu.allocated.expected
    assert corrected.memory.gpu.allocated.expected == plain.memory.gpu.allocated.expected + more
    assert corrected.memory.gpu.used.expected == plain.memory.gpu.used.expected + more
    assert corrected.speed.tokens_per_second == pytest.approx((plain.speed.tokens_per_second or 0) / 1.2)
    assert corrected.speed.step_seconds == pytest.approx((plain.speed.step_seconds or 0) * 1.2)
    assert corrected.memory.host == plain.memory.host  # no trial told host bytes


def test_corrected_terms_still_add_up_to_the_peak() -> None:
    gpu = correct(_candidate(), _learned([1.1, 1.2, 1.3]), CLUSTER).memory.gpu
    at_peak = [term.bytes for term in gpu.terms if gpu.peak_phase in term.phases]
    assert sum(at_peak) == max(gpu.phases.values())


def test_two_trials_correct_nothing() -> None:
    assert correct(_candidate(), _learned([1.1, 1.2]), CLUSTER) == _candidate()


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


def test_corrections_are_kept_per_machine_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(CLUSTER, _pairs([1.1, 1.2, 1.3]), tmp_path)
    known = known_corrections(CLUSTER, tmp_path)
    assert known is not None
    assert known.ratio("gpu_bytes") == pytest.approx(1.2)
    assert known_corrections(toy_cluster(gpus=2), tmp_path) == known  # some of its GPUs
    assert known_corrections(toy_cluster(gpu_gib=80), tmp_path) is None
    monkeypatch.setattr(calibrate, "library_versions", lambda: {"deepspeed": "0.20"})
    assert known_corrections(CLUSTER, tmp_path) is None


def test_tuners_of_one_machine_add_to_what_is_known(tmp_path: Path) -> None:
    for study in "abc":
        remember(CLUSTER, {study: (_result(1000, 100.0), _result(1500, 50.0))}, tmp_path)
    known = known_corrections(CLUSTER, tmp_path)
    assert known is not None
    assert [sample.trial for sample in known.samples] == ["a", "b", "c"]


def test_a_damaged_file_is_named_and_may_be_deleted(tmp_path: Path) -> None:
    remember(CLUSTER, _pairs([1.1]), tmp_path)
    corrections_path(CLUSTER, tmp_path).write_text("{")
    with pytest.raises(ConfigError, match="not JSON") as caught:
        known_corrections(CLUSTER, tmp_path)
    assert caught.value.fix == f"rm {corrections_path(CLUSTER, tmp_path)}"


def test_what_was_saved_is_read_without_pydantic_and_anything_else_with_it(tmp_path: Path) -> None:
    """Both ways give one answer, and a damaged file is explained key by key."""
    remember(CLUSTER, _pairs([1.1, 1.2, 1.3]), tmp_path)
    path = corrections_path(CLUSTER, tmp_path)
    read = known_corrections(CLUSTER, tmp_path)
    assert read == files.load(Corrections, path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["samples"][0]["log_ratios"]["gpu_bytes"] = 0  # an int is a float to JSON
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert known_corrections(CLUSTER, tmp_path) == files.load(Corrections, path) != read
    saved["samples"][1] = {"trial": 1, "log_ratios": {"gpu_bytes": "much"}, "more": 1}
    path.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        known_corrections(CLUSTER, tmp_path)
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "samples.1.trial", "samples.1.log_ratios.gpu_bytes",
    ]  # fmt: skip


def test_corrections_measured_with_one_warm_up_step_are_not_used_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a search has measured anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember(CLUSTER, _pairs([1.5, 1.5, 1.5]))
    path = corrections_path(CLUSTER)
    path.write_text(path.read_text(encoding="utf-8").replace("zplan.calibration/2", "zplan.calibration/1"))
    assert known_corrections(CLUSTER) is None
    job = Job(shape=SHAPE, recipe=RECIPE, cluster=CLUSTER, fixed=Fixed(), choice=CHOICE)
    data = estimate(job, explain=None, verbose=False, quiet=True).data()
    assert data["evidence"] == "formula"
    assert [line for line in data["warnings"] if str(path) in line and "warmed up for one step" in line]
    told: list[str] = []

    class Listener(Silent):
        def message(self, text: str) -> None:
            told.append(text)

    tune(str(tmp_path / "study.journal"), 3, observer=Listener(), calibration_dir=None, cluster=CLUSTER)
    assert sum("warmed up for one step" in line for line in told) == 1
    assert outdated(CLUSTER) == ""
    assert known_corrections(CLUSTER) is not None


def test_a_correction_never_turns_does_not_fit_into_fits() -> None:
    small = toy_cluster(gpu_gib=2)
    plain = _candidate(small)
    assert plain.memory.gpu.verdict == "does_not_fit"
    assert correct(plain, _learned([0.01] * 3), small).memory.gpu.verdict == "does_not_fit"


def test_a_correction_turns_fits_into_does_not_fit() -> None:
    assert _candidate().memory.gpu.verdict == "fits"
    corrected = correct(_candidate(), _learned([9.0] * 3), CLUSTER).memory.gpu
    assert corrected.verdict == "does_not_fit"
    assert corrected.short_bytes == corrected.used.high - CLUSTER.gpu.free_bytes


def test_estimates_show_what_a_study_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of trials that need 1.5 times the formula's bytes; then the same question, asked by formula."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    @dataclass
    class Larger:
        inner: FormulaBackend
        evidence: Evidence = "measured"

        def run(self, spec: TrialSpec) -> TrialResult:
            said = self.inner.run(spec)
            size = round(1.5 * (said.gpu_allocated_bytes or 0))
            return replace(said, evidence="measured", gpu_allocated_bytes=size, gpu_used_bytes=None)

    formula = FormulaBackend(SHAPE)
    outcome = tune(
        str(tmp_path / "s.journal"), 5, backend=Larger(formula), formula=formula, cluster=CLUSTER, shape=SHAPE,
        recipe=RECIPE, calibration_dir=None,
    )  # fmt: skip
    found = {item.quantity: item for item in outcome.accuracy}
    assert found["gpu_bytes"].before == pytest.approx(1 - 1 / 1.5, abs=1e-6)
    assert found["gpu_bytes"].after == pytest.approx(0.0, abs=1e-6)
    job = Job(shape=SHAPE, recipe=RECIPE, cluster=CLUSTER, fixed=Fixed(), choice=CHOICE)
    answer = estimate(job, explain=None, verbose=False, quiet=True)
    data = answer.data()
    assert data["evidence"] == "calibrated"
    assert data["gpu"]["allocated_bytes"]["expected"] == pytest.approx(
        1.5 * _candidate().memory.gpu.allocated.expected, rel=1e-6
    )
    console = Console(width=80, file=StringIO(), record=True)
    console.print(answer.text)
    assert "calibrated by" in console.export_text()


def test_studies_of_the_same_name_in_two_folders_both_teach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        outcome = tune("study.journal", 3, calibration_dir=tmp_path)
    known = known_corrections(toy_cluster(), tmp_path)
    assert known is not None
    assert len(known.samples) == 2 * len(outcome.records)
