"""The whole data path with the real trainer: spec.json -> rank processes -> result.json -> study -> plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oracle import toy_cluster
from zplan import files
from zplan.backends.launcher import ColdLauncher
from zplan.backends.real import RealBackend
from zplan.model_probe import probe_config
from zplan.plan import Plan
from zplan.planner import Fixed
from zplan.recipe import Recipe
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.tuner.study import Effort, run_study
from zplan.zero_config import Choice, ZeroConfig, batch_sizes

CLUSTER = toy_cluster(kind="cpu", gpus=2)
BUCKET = 100_000
"""Elements of fp32."""


def _recipe(model: Path, dataset: Path) -> Recipe:
    return Recipe(model=str(model), dataset=str(dataset), dtype="fp32", max_length=64, train_batch_size=4)


def _spec(
    model: Path, dataset: Path, *, deadline_seconds: float = 300.0, best_step_seconds: tuple[float, ...] = ()
) -> TrialSpec:
    recipe = _recipe(model, dataset)
    zero = ZeroConfig(stage=2, reduce_bucket_size=BUCKET)
    return TrialSpec(
        best_step_seconds=best_step_seconds,
        recipe=recipe,
        cluster=CLUSTER,
        model_path=str(model),
        choice=Choice(zero=zero, batch=batch_sizes(recipe, micro_batch=1, world_size=2)),
        timed_steps=2,
        deadline_seconds=deadline_seconds,
    )


@pytest.mark.slow
def test_a_real_study_of_two_ranks_becomes_a_plan_that_resumes(
    tmp_path: Path, tiny_model_dir: Path, tiny_dataset: Path
) -> None:
    def tune(n_trials: int, backend: RealBackend) -> list[TrialResult]:
        outcome = run_study(
            recipe=_recipe(tiny_model_dir, tiny_dataset),
            shape=probe_config(tiny_model_dir / "config.json", name="tiny"),
            cluster=CLUSTER,
            model_path=str(tiny_model_dir),
            backend=backend,
            effort=Effort(n_trials=n_trials, timed_steps=2),
            study_path=str(tmp_path / "study.journal"),
            plan_path=tmp_path / "best.json",
            fixed=Fixed(world_size=2),
            calibration_dir=tmp_path,
        )
        return [record.result for record in outcome.records]

    backend = RealBackend(tmp_path / "trials")
    try:
        first = tune(2, backend)
        again = tune(3, backend)
    finally:
        backend.close()
    # a trial that this machine happens to run slower than the best ends early, and that is an answer too
    ended = [result.outcome for result in again]
    assert set(ended) <= {Outcome.OK, Outcome.PRUNED}, [result.message for result in again]
    assert ended[0] is ended[-1] is Outcome.OK, "the first has none to be compared with, the last confirms the winner"
    assert again[: len(first)] == first
    assert all(result.evidence == "measured" and result.gpu_allocated_bytes for result in again)
    plan = files.load(Plan, tmp_path / "best.json")
    assert plan.deepspeed["train_batch_size"] == 4
    assert plan.choice.batch.world_size == 2


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBackend]:
    """One warm server for all tests that need nothing else of it."""
    backend = RealBackend(tmp_path_factory.mktemp("warm"))
    yield backend
    backend.close()


@pytest.mark.slow
def test_a_cold_trial_gives_the_same_loss_as_a_warm_one(
    tmp_path: Path, warm: RealBackend, tiny_model_dir: Path, tiny_dataset: Path
) -> None:
    spec = _spec(tiny_model_dir, tiny_dataset)
    answers = [RealBackend(tmp_path / "cold", ColdLauncher()).run(spec), warm.run(spec)]
    assert [answer.outcome for answer in answers] == [Outcome.OK] * 2, [answer.message for answer in answers]
    assert answers[0].message == answers[1].message  # "loss 6.2619 to 6.2682"


@pytest.mark.slow
def test_a_trial_that_is_clearly_slower_ends_early_with_what_it_measured(
    warm: RealBackend, tiny_model_dir: Path, tiny_dataset: Path
) -> None:
    fast, slow = (
        warm.run(_spec(tiny_model_dir, tiny_dataset, best_step_seconds=best)) for best in ((60.0,) * 2, (1e-6,) * 2)
    )
    assert (fast.outcome, len(fast.timed_step_seconds)) == (Outcome.OK, 2), fast.message
    assert (slow.outcome, len(slow.timed_step_seconds)) == (Outcome.PRUNED, 1), slow.message
    assert "after 1 of 2 timed steps" in slow.message
    assert slow.tokens_per_second
    # The same warm-up was measured, but not to the byte: one of gloo's threads may be the last to drop the tensors of a
    # collective, scalars or a bucket, and until it does they are alive.
    bucket_bytes = 4 * BUCKET
    assert set(slow.phases) == set(fast.phases) == {"load", "init", "forward", "backward", "step"}
    assert slow.phases == pytest.approx(fast.phases, abs=bucket_bytes)
    assert slow.gpu_allocated_bytes == pytest.approx(fast.gpu_allocated_bytes, abs=bucket_bytes)


@pytest.mark.slow
def test_a_warm_trial_past_its_deadline_ends_and_the_server_goes_on(
    warm: RealBackend, tiny_model_dir: Path, tiny_dataset: Path
) -> None:
    assert warm.run(_spec(tiny_model_dir, tiny_dataset)).outcome is Outcome.OK
    late = warm.run(_spec(tiny_model_dir, tiny_dataset, deadline_seconds=0.5))
    assert late.outcome is Outcome.TIMED_OUT
    assert warm.run(_spec(tiny_model_dir, tiny_dataset)).outcome is Outcome.OK
