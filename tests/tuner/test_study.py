"""The search in a small known world: what it tries, what it leaves, when it ends."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import TOY_RECIPE, Oracle, toy_cluster
from tests.tuner_process import SHAPE, tune
from zplan import files
from zplan.errors import ConfigError, MachineError
from zplan.plan import Plan
from zplan.planner import Fixed
from zplan.trial import Evidence, Outcome, TrialResult, TrialSpec, clearly_slower
from zplan.tuner.ledger import Record, out_of_memory
from zplan.zero_config import Choice

ROOT = Path(__file__).parents[2]


def _study(tmp_path: Path) -> str:
    return str(tmp_path / "study.journal")


def test_the_best_fits_and_becomes_a_plan(tmp_path: Path) -> None:
    outcome = tune(_study(tmp_path), 8, plan_path=tmp_path / "best.json")
    plan = files.load(Plan, tmp_path / "best.json")
    assert outcome.plan == plan
    assert outcome.best is not None
    assert plan.choice == outcome.best.choice
    assert plan.measured is not None
    assert plan.measured.evidence == "measured"
    assert plan.predicted is not None
    assert plan.predicted.evidence == "formula"
    assert plan.deepspeed["train_batch_size"] == TOY_RECIPE.train_batch_size
    assert "auto" not in json.dumps(plan.deepspeed)


def test_the_ladder_only_goes_down(tmp_path: Path) -> None:
    plan = tune(_study(tmp_path), 10).plan
    assert plan is not None
    assert plan.measured is not None
    peaks = [plan.measured.gpu_used_bytes] + [rung.measured.gpu_used_bytes for rung in plan.ladder if rung.measured]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_the_first_trial_is_what_a_user_would_have_taken(tmp_path: Path) -> None:
    first = tune(_study(tmp_path), 1).records[0]
    assert first.origin == "baseline"
    assert first.choice.zero.reduce_bucket_size == SHAPE.hidden_size**2
    assert first.choice.gradient_checkpointing


def test_the_winner_is_run_again(tmp_path: Path) -> None:
    outcome = tune(_study(tmp_path), 5)
    assert outcome.best is not None
    runs = [record for record in outcome.records if record.key == outcome.best.key]
    assert len(runs) == 2
    assert runs[-1].origin == "confirm"
    assert "ran again" in outcome.stop_reason


def test_no_configuration_is_tried_twice_but_the_winner(tmp_path: Path) -> None:
    keys = [record.key for record in tune(_study(tmp_path), 12).records if record.origin != "confirm"]
    assert len(set(keys)) == len(keys)


def test_running_again_resumes(tmp_path: Path) -> None:
    first = tune(_study(tmp_path), 3)
    again = tune(_study(tmp_path), 6)
    assert again.num_resumed == len(first.records)
    assert again.records[: len(first.records)] == first.records
    assert sum(record.origin != "confirm" for record in again.records) == 6
    backend = Oracle(SHAPE)
    tune(_study(tmp_path), 6, backend=backend)
    assert backend.calls <= 1  # nothing left to do but, perhaps, to confirm


def test_a_finished_trial_is_read_from_the_study_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    from_data = files.from_data

    def counted(kind: type[Any], data: Any, *, name: str) -> Any:
        if kind is Record:
            read.append(name)
        return from_data(kind, data, name=name)

    monkeypatch.setattr(files, "from_data", counted)
    records = tune(_study(tmp_path), 5).records
    assert sorted(read) == sorted(f"trial {record.number}" for record in records)


def test_a_study_of_another_recipe_is_refused(tmp_path: Path) -> None:
    tune(_study(tmp_path), 1)
    with pytest.raises(ConfigError, match="another question") as caught:
        tune(_study(tmp_path), 2, recipe=replace(TOY_RECIPE, max_length=2048))
    assert "max_length: 1024 in the study, 2048 now" in str(caught.value)


def test_free_memory_may_change_between_runs(tmp_path: Path) -> None:
    tune(_study(tmp_path), 1)
    cluster = toy_cluster()
    less = replace(cluster, gpu=replace(cluster.gpu, free_bytes=cluster.gpu.free_bytes - 1))
    assert len(tune(_study(tmp_path), 2, cluster=less).records) >= 2


def test_the_search_learns_where_memory_ends(tmp_path: Path) -> None:
    """Everything takes 1.4x what the formula says: at most a few trials pay for learning it, and the best fits."""
    backend = Oracle(SHAPE, memory_error=1.4)
    outcome = tune(_study(tmp_path), 14, backend=backend)
    failed = [record for record in outcome.records if record.result.outcome is Outcome.GPU_OOM]
    assert outcome.best is not None
    assert outcome.best.result.outcome is Outcome.OK
    assert len(failed) <= 5
    assert failed == [] or failed[-1].number < outcome.records[-1].number


@dataclass
class Noted:
    """A simulation, with the choices that it refused."""

    inner: Oracle
    refused: list[Choice] = field(default_factory=list)
    evidence: Evidence = "simulated"

    def run(self, spec: TrialSpec) -> TrialResult:
        result = self.inner.run(spec)
        if out_of_memory(result):
            self.refused.append(spec.choice)
        return result


class Broken:
    """A machine without a compiler."""

    evidence = "measured"

    def run(self, spec: TrialSpec) -> TrialResult:
        return TrialResult(outcome=Outcome.ENV_BROKEN, evidence="measured", message="no ninja; try: pip install ninja")


def test_a_broken_machine_stops_the_study_and_leaves_it_usable(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="pip install ninja"):
        tune(_study(tmp_path), 5, backend=Broken())
    assert len(tune(_study(tmp_path), 2).records) >= 2


def test_nothing_that_does_not_fit_by_formula_costs_a_trial(tmp_path: Path) -> None:
    backend = Oracle(SHAPE, memory_error=1.0)
    outcome = tune(_study(tmp_path), 10, backend=backend)
    assert all(record.result.outcome is Outcome.OK for record in outcome.records)


def test_a_simulation_that_says_no_saves_the_trial(tmp_path: Path) -> None:
    simulator = Oracle(SHAPE, evidence="simulated", memory_error=1.4)
    outcome = tune(_study(tmp_path), 8, backend=Oracle(SHAPE, memory_error=1.4), simulator=simulator)
    searched = [record for record in outcome.records if record.origin == "search"]
    assert searched
    assert all(record.result.outcome is Outcome.OK for record in searched)


@pytest.mark.parametrize("gpu_gib", [5, 7, 9, 12])
def test_what_the_simulation_refuses_never_costs_a_trial(tmp_path: Path, gpu_gib: int) -> None:
    """The formula is bent: it says 0.9 of the bytes, so it lets pass what does not fit."""
    simulator = Noted(Oracle(SHAPE, evidence="simulated"))
    outcome = tune(
        _study(tmp_path), 16, formula=Oracle(SHAPE, evidence="formula", memory_error=0.9), simulator=simulator,
        backend=Oracle(SHAPE), cluster=toy_cluster(gpu_gib=gpu_gib), least_gain=0.0,
    )  # fmt: skip
    assert [record for record in outcome.records if out_of_memory(record.result)] == []
    assert sum(record.result.outcome is Outcome.OK for record in outcome.records) >= 16
    assert simulator.refused  # each of which would have been the next trial


def test_a_search_in_which_the_simulation_refuses_everything_says_so(tmp_path: Path) -> None:
    simulator = Noted(Oracle(SHAPE, evidence="simulated", memory_error=2.0))
    fixed = Fixed(stage=2, offload_optimizer="none", world_size=4)  # 84 % of the card and more, by formula
    outcome = tune(_study(tmp_path), 4, simulator=simulator, cluster=toy_cluster(gpu_gib=8), fixed=fixed)
    refused = len(simulator.refused)
    assert outcome.records == ()
    assert f"of those that fit by formula the simulation refused {refused}" in outcome.stop_reason
    assert refused >= 8


def test_a_baseline_that_the_simulation_refuses_gives_way_to_the_next(tmp_path: Path) -> None:
    more = {"formula": Oracle(SHAPE, evidence="formula", memory_error=0.9), "cluster": toy_cluster(gpu_gib=7)}
    simulator = Noted(Oracle(SHAPE, evidence="simulated"))
    outcome = tune(_study(tmp_path), 3, simulator=simulator, **more)
    first = tune(str(tmp_path / "without.journal"), 1, **more).records[0]
    assert [record.origin for record in outcome.records].count("baseline") == 1
    assert outcome.records[0].origin == "baseline"
    assert outcome.records[0].key != first.key
    assert first.result.outcome is Outcome.GPU_OOM
    assert first.choice in simulator.refused
    again = tune(_study(tmp_path), 5, simulator=simulator, **more)
    assert [record.origin for record in again.records].count("baseline") == 1


def test_an_interrupted_trial_that_no_longer_fits_is_not_run_again(tmp_path: Path) -> None:
    class Interrupting:
        evidence = "measured"

        def run(self, spec: TrialSpec) -> TrialResult:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(_study(tmp_path), 3, backend=Interrupting())
    cluster = toy_cluster()
    less = replace(cluster, gpu=replace(cluster.gpu, free_bytes=6 << 30))
    records = tune(_study(tmp_path), 3, backend=Oracle(SHAPE), cluster=less).records
    assert all(record.result.outcome is Outcome.OK for record in records)


def test_the_time_limit_ends_the_search(tmp_path: Path) -> None:
    outcome = tune(_study(tmp_path), 50, 0.05, timeout_seconds=0.2)
    assert "time is used up" in outcome.stop_reason
    assert len(outcome.records) < 20


def test_a_search_ends_when_too_little_is_promised(tmp_path: Path) -> None:
    early = tune(_study(tmp_path), 16, least_gain=10.0)
    assert "promises only" in early.stop_reason
    assert len([record for record in early.records if record.origin != "confirm"]) < 12
    whole = tune(str(tmp_path / "whole.journal"), 16, least_gain=0.0)
    assert "16 trials are done" in whole.stop_reason


@dataclass
class WithSteps:
    """An oracle whose trials are timed step by step and end early when they are clearly slower."""

    inner: Oracle
    evidence: Evidence = "measured"

    def run(self, spec: TrialSpec) -> TrialResult:
        result = self.inner.run(spec)
        if result.step_seconds is None:
            return result
        if clearly_slower([result.step_seconds], spec.best_step_seconds):
            return replace(result, outcome=Outcome.PRUNED, timed_step_seconds=(result.step_seconds,))
        return replace(result, timed_step_seconds=(result.step_seconds,) * spec.timed_steps)


def test_slower_trials_are_pruned_and_never_win(tmp_path: Path) -> None:
    """The wrong half of the formula's ranking is far slower; the search learns it from one step."""
    backend = WithSteps(Oracle(SHAPE, error=0.8, seed=2))
    outcome = tune(_study(tmp_path), 12, backend=backend)
    outcomes = {record.result.outcome for record in outcome.records}
    assert outcomes == {Outcome.OK, Outcome.PRUNED}
    assert outcome.best is not None
    assert outcome.best.result.outcome is Outcome.OK
    fastest = max(record.result.tokens_per_second or 0.0 for record in outcome.records)
    assert outcome.best.result.tokens_per_second == fastest
    assert tune(_study(tmp_path), 12, backend=backend).num_resumed == len(outcome.records)


@dataclass
class Cannot:
    """A simulation that knows nothing about this family; counts how often it is asked."""

    calls: int = 0
    evidence: Evidence = "simulated"

    def run(self, spec: TrialSpec) -> TrialResult:
        self.calls += 1
        return TrialResult(outcome=Outcome.BAD_CONFIG, evidence="simulated", message="no fake kernel")


def test_what_cannot_be_simulated_is_still_tried(tmp_path: Path) -> None:
    simulator = Cannot()
    outcome = tune(_study(tmp_path), 6, cluster=toy_cluster(gpu_gib=16), simulator=simulator)
    assert simulator.calls
    assert len([record for record in outcome.records if record.origin != "confirm"]) == 6


def test_nothing_is_simulated_where_memory_is_far_from_full(tmp_path: Path) -> None:
    simulator = Cannot()
    tune(_study(tmp_path), 6, cluster=toy_cluster(gpu_gib=4096), simulator=simulator)
    assert simulator.calls == 0


@dataclass
class AlwaysFails:
    """Every trial ends for the same reason, told by another rank and with another folder each time."""

    message: str
    outcome: Outcome = Outcome.BAD_CONFIG
    calls: int = 0
    evidence: Evidence = "measured"

    def run(self, spec: TrialSpec) -> TrialResult:
        self.calls += 1
        message = f"rank {self.calls % 2}: {self.message} [logs: /tmp/trial-{self.calls}]"
        return TrialResult(outcome=self.outcome, evidence="measured", message=message)


def test_a_fault_that_all_trials_share_ends_the_search_and_is_told(tmp_path: Path) -> None:
    backend = AlwaysFails("ConfigError: no example of data.jsonl is shorter than 32 tokens")
    with pytest.raises(ConfigError, match="is shorter than 32 tokens"):
        tune(_study(tmp_path), 20, backend=backend)
    assert backend.calls == 3
    assert len([record for record in tune(_study(tmp_path), 6).records if record.result.tokens_per_second]) >= 3


def test_running_out_of_memory_alike_does_not_end_the_search(tmp_path: Path) -> None:
    backend = AlwaysFails("CUDA out of memory", Outcome.GPU_OOM)
    tune(_study(tmp_path), 5, backend=backend)
    assert backend.calls == 5


def test_a_study_goes_on_when_knobs_are_narrowed_and_writes_only_what_is_asked_for(tmp_path: Path) -> None:
    wide = tune(_study(tmp_path), 5)
    stages = {record.choice.zero.stage for record in wide.records}
    wanted = next(
        stage for stage in (2, 1, 3) if wide.best and stage != wide.best.choice.zero.stage and stage in stages
    )
    narrow = tune(_study(tmp_path), 8, fixed=Fixed(stage=wanted, settings=("world_size=2,4",)), plan_path=None)
    assert narrow.num_resumed == len(wide.records)
    assert {record.choice.zero.stage for record in narrow.records[len(wide.records) :]} == {wanted}
    assert narrow.plan is not None
    assert narrow.plan.choice.zero.stage == wanted
    assert tune(_study(tmp_path), 9).best is not None  # and widened again
