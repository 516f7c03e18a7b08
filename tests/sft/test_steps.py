"""Which steps a trial takes, and on what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sft import steps
from sft.data import Example
from sft.steps import Steps, draw, may_begin_short, plan_steps, rows
from tests.sft.warm import make_recipe, make_spec
from zplan.trial import TrialSpec

BATCH, LENGTH = 8, 64
"""Of make_recipe."""


@pytest.fixture
def spec(tmp_path: Path) -> TrialSpec:
    return make_spec(make_recipe(tmp_path, None), timed_steps=3)


def examples(length: int, count: int = 5) -> tuple[Example, ...]:
    return tuple(Example([7] * length, [7] * length, str(index)) for index in range(count))


def lengths(spec: TrialSpec, found: tuple[Example, ...]) -> list[int]:
    """Tokens of the rows of each step."""
    drawn = draw(spec, found)
    made = rows(spec, plan_steps(spec, drawn), drawn, vocab_size=10)
    groups = [{len(row.input_ids) for row in made[start : start + BATCH]} for start in range(0, len(made), BATCH)]
    return [length for (length,) in groups]


def test_only_a_step_whose_peak_cannot_matter_is_short(spec: TrialSpec) -> None:
    on_gpu = replace(spec.cluster, gpu=replace(spec.cluster.gpu, kind="cuda"))
    assert may_begin_short(spec)
    assert not may_begin_short(replace(spec, warmup_steps=1))
    assert not may_begin_short(replace(spec, cluster=on_gpu))
    assert not may_begin_short(replace(spec, recipe=replace(spec.recipe, packing=True)))
    assert not may_begin_short(make_spec(spec.recipe, stage=3))


def test_the_longest_step_warms_up_where_the_timed_ones_are_shorter(spec: TrialSpec) -> None:
    found = (*examples(LENGTH), *examples(LENGTH - 1, count=1))
    assert plan_steps(spec, draw(spec, found)) == Steps(untimed=2, metered=2, timed=3, short=1)
    shorter = examples(40)
    assert lengths(spec, shorter) == [8, LENGTH, 40, 40, 40]


def test_the_longest_step_is_timed_where_all_are_as_long(spec: TrialSpec) -> None:
    assert plan_steps(spec, draw(spec, examples(LENGTH))) == Steps(untimed=1, metered=2, timed=3, short=1)
    assert lengths(spec, examples(LENGTH)) == lengths(spec, ()) == [8, LENGTH, LENGTH, LENGTH]


def test_the_step_of_the_peak_is_worst_case_whatever_the_data_learn(spec: TrialSpec) -> None:
    masked = tuple(replace(item, labels=[-100] * LENGTH) for item in examples(LENGTH))
    drawn = draw(spec, masked)
    made = rows(spec, plan_steps(spec, drawn), drawn, vocab_size=10)
    assert all(row.num_label_tokens == LENGTH for row in made[BATCH : 2 * BATCH])
    assert not any(row.num_label_tokens for row in made[2 * BATCH :])


def test_stage_3_begins_with_the_longest_because_it_has_no_trace_yet(spec: TrialSpec) -> None:
    spec = make_spec(spec.recipe, stage=3, timed_steps=2)
    assert plan_steps(spec, ()) == Steps(untimed=1, metered=2, timed=2, short=0)
    assert lengths(spec, examples(40)) == [LENGTH, LENGTH, 40, 40]
    assert lengths(spec, ()) == [LENGTH, LENGTH, LENGTH]


def test_a_deepspeed_that_searches_the_trace_is_not_timed_while_it_does(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "is_quick", lambda: False)
    assert plan_steps(make_spec(spec.recipe, stage=3), ()).untimed == 2
    assert plan_steps(spec, ()).untimed == 1


def test_cuda_and_packed_rows_are_timed_behind_the_warm_up(spec: TrialSpec) -> None:
    on_gpu = replace(spec.cluster, gpu=replace(spec.cluster.gpu, kind="cuda"))
    assert plan_steps(replace(spec, cluster=on_gpu), ()) == Steps(untimed=2, metered=2, timed=3, short=0)
    packed = replace(spec, recipe=replace(spec.recipe, packing=True))
    assert plan_steps(packed, examples(LENGTH)) == Steps(untimed=2, metered=2, timed=3, short=0)
