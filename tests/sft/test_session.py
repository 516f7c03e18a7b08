"""Where a repeated command starts, and what a plan needs from the disk."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from sft import preflight
from sft.disk import weight_shapes
from sft.session import Session, with_resume
from tests.sft.test_checkpoint import make_checkpoint
from tests.sft.warm import make_plan, make_recipe
from zplan import files
from zplan.errors import ConfigError, DoesNotFitError
from zplan.plan import Plan, Rung


@pytest.fixture
def session(tmp_path: Path) -> Session:
    plan = make_plan(make_recipe(tmp_path / "model", tmp_path / "data.jsonl"), ranks=2)
    return Session(plan=plan, output_dir=str(tmp_path / "run"), max_steps=6)


def begin(session: Session, *, outcome: str | None) -> Path:
    """The folder as a run leaves it; `outcome` None is a run that was killed."""
    folder = Path(session.output_dir)
    files.save(session, folder / "run.json")
    if outcome is not None:
        files.save_json({"outcome": outcome}, folder / "training_report.json")
    checkpoint = make_checkpoint(folder, 4)
    mark = files.load_json(checkpoint / "zplan_checkpoint.json")
    files.save_json({**mark, "fingerprint": session.fingerprint}, checkpoint / "zplan_checkpoint.json")
    return checkpoint


def test_the_first_run_starts_at_the_beginning(session: Session) -> None:
    assert with_resume(session, None) == (session, [])


@pytest.mark.parametrize("outcome", [None, "stopped"])
def test_a_repeated_command_continues_what_was_not_finished(session: Session, outcome: str | None) -> None:
    checkpoint = begin(session, outcome=outcome)
    assert with_resume(session, None)[0].resume == str(checkpoint)


def test_a_finished_run_is_kept_under_another_name(session: Session) -> None:
    begin(session, outcome="finished")
    fresh, notes = with_resume(session, None)
    assert fresh.resume is None
    assert Path(f"{session.output_dir}.1", "training_report.json").is_file()
    assert "kept as" in notes[0]


def test_another_recipe_does_not_continue_an_unfinished_run(session: Session) -> None:
    begin(session, outcome=None)
    other = replace(session, plan=replace(session.plan, recipe=replace(session.plan.recipe, learning_rate=1.0)))
    assert with_resume(other, None)[0].resume is None
    assert Path(f"{session.output_dir}.1", "checkpoint-4").is_dir()


def test_asking_to_resume_without_a_checkpoint_starts_at_the_beginning(session: Session) -> None:
    resumed, notes = with_resume(session, "newest")
    assert resumed.resume is None
    assert "starting at step 0" in notes[0]


def test_only_adam_s_states_are_converted_for_another_number_of_ranks(session: Session) -> None:
    checkpoint = begin(session, outcome=None)  # of two ranks
    recipe = replace(session.plan.recipe, optimizer="adafactor")
    alone = replace(session, plan=make_plan(recipe, ranks=1))
    with pytest.raises(ConfigError, match="optimizer is adafactor"):
        with_resume(alone, str(checkpoint))
    assert with_resume(replace(session, plan=make_plan(recipe, ranks=2)), str(checkpoint))[0].resume == str(checkpoint)


def fitting_only(stage: int) -> object:
    return lambda plan: (plan.choice.zero.stage == stage, "GPU memory is short by 2.00 GiB")


def with_ladder(plan: Plan, smaller: Plan) -> Plan:
    return replace(
        plan, ladder=(Rung(choice=smaller.choice, deepspeed=smaller.deepspeed, reason="stage 3 shards more"),)
    )


def test_a_plan_that_does_not_fit_is_refused_and_fallback_takes_the_next_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, None)
    plan = with_ladder(make_plan(recipe, stage=2), make_plan(recipe, stage=3))
    monkeypatch.setattr(preflight, "check_fit", fitting_only(3))
    with pytest.raises(DoesNotFitError, match=r"short by 2.00 GiB"):
        preflight.choose_rung(plan, fallback=False, force=False)
    chosen, notes = preflight.choose_rung(plan, fallback=True, force=False)
    assert chosen.choice.zero.stage == 3
    assert notes == ["fallback: stage 3 shards more"]
    assert preflight.choose_rung(plan, fallback=False, force=True)[0] == plan


def test_merging_is_refused_when_the_host_cannot_hold_the_base_twice(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, None, method="lora"))
    step = 1 << 30

    def answer(free: int) -> None:
        data = {
            "host": {"phases": {"step": step}},
            "cluster": {"host": {"available_bytes": free, "cgroup_limit_bytes": None}},
        }
        done = subprocess.CompletedProcess([], 0, stdout=json.dumps(data))
        monkeypatch.setattr(preflight, "_estimate", lambda plan, *flags: done)

    sizes = [prod(shape) for shape in weight_shapes(tiny_model_dir).values()]
    needed = step + (sum(sizes) + max(sizes)) * 4  # fp32
    answer(needed)
    preflight.check_merge(plan)
    answer(needed - (1 << 20))
    with pytest.raises(DoesNotFitError, match=r"short by 1\.00 MiB of host memory"):
        preflight.check_merge(plan)
