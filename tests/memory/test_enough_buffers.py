"""Whatever zplan proposes with parameters on NVMe, DeepSpeed has buffers enough for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.estimate_speed import CLUSTER
from benchmarks.formula_case import cut_layers
from zplan.backends.formula import FormulaBackend
from zplan.catalog.find import find_model
from zplan.errors import ConfigError
from zplan.fixes import _runnable_changes
from zplan.memory.schedule import Scheduler
from zplan.memory.swap_in import refuse_swapping, with_enough_buffers
from zplan.memory.swapping import buffers_used
from zplan.model_shape import ModelShape
from zplan.planner import Fixed, evaluate, rank_candidates
from zplan.recipe import Recipe
from zplan.trial import Outcome, TrialSpec
from zplan.tuner.pool import Rolls
from zplan.tuner.ranges import Options
from zplan.tuner.screen import Screen
from zplan.tuner.space import Problem, Space
from zplan.zero_config import Choice

MODELS = ("mistral-7b", "llama-3.2-1b", "smollm2-135m", "llama-3.1-70b", "mixtral-8x7b")
"""Dense, tied, small, large, a mixture of experts."""
ON_NVME = Fixed(offload_optimizer="nvme", offload_param="nvme")


def shape_of(model: str, layers: int | None = None) -> ModelShape:
    shape = find_model(model)
    assert isinstance(shape, ModelShape)
    return shape if layers is None else cut_layers(shape, layers)


def recipe_of(method: str) -> Recipe:
    return Recipe(model="any", train_batch_size=64, max_length=1024, method=method)  # type: ignore[arg-type]


def stops(shape: ModelShape, recipe: Recipe, choice: Choice) -> str:
    """Empty if DeepSpeed runs; asked of a schedule that follows every layer."""
    try:
        refuse_swapping(shape, recipe, choice, on_cpu=False)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Laps that go alike are not skipped: the check does not lean on what made the count."""
    buffers_used.cache_clear()
    monkeypatch.setattr(Scheduler, "_skipped", lambda *_: 0)
    monkeypatch.setattr("zplan.memory.swapping._Scheduler._skipped", lambda *_: 0)
    yield
    buffers_used.cache_clear()


def check_later(shape: ModelShape, recipe: Recipe, choices: list[Choice], request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("layer_by_layer")
    for choice in choices:
        assert stops(shape, recipe, choice) == "", choice


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model", MODELS)
def test_every_row_on_nvme_has_buffers_enough(model: str, method: str, request: pytest.FixtureRequest) -> None:
    shape, recipe = shape_of(model), recipe_of(method)
    rows = rank_candidates(shape, recipe, CLUSTER, fixed=ON_NVME)
    assert len(rows) > 2
    for row in rows:
        assert row.memory == evaluate(shape, recipe, row.choice, CLUSTER).memory  # the bytes of these buffers
    check_later(shape, recipe, [row.choice for row in rows], request)


def test_some_rows_would_have_stopped_with_deepspeed_s_own_count() -> None:
    shape, recipe = shape_of("mistral-7b"), recipe_of("lora")
    counts = {
        row.choice.zero.offload_param.buffer_count for row in rank_candidates(shape, recipe, CLUSTER, fixed=ON_NVME)
    }
    assert max(counts) > 5


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model", ["mistral-7b", "llama-3.2-1b", "mixtral-8x7b"])
def test_whatever_the_tuner_draws_is_looked_at_with_buffers_enough(
    model: str, method: str, request: pytest.FixtureRequest
) -> None:
    shape, recipe = shape_of(model, 6), recipe_of(method)
    on_nvme: dict[str, Any] = {"stage": Options((3,)), "offload_param.device": Options(("nvme",))}
    space = Space(Problem(shape=shape, recipe=recipe, cluster=CLUSTER), on_nvme)
    rolls = Rolls(random.Random(0))
    draws = [space.suggest(rolls) for _ in range(20)]
    spec = TrialSpec(recipe=recipe, choice=draws[0], cluster=CLUSTER, model_path="")
    looks = Screen(space=space, formula=FormulaBackend(shape), template=spec).look_at_all(draws)
    assert any(look.choice != space.canonical(draw) for look, draw in zip(looks, draws, strict=True))
    assert all(space.contains(look.choice) for look in looks)
    check_later(shape, recipe, [look.choice for look in looks if look.promising], request)


def test_a_draw_whose_range_has_no_number_that_is_enough_is_no_candidate() -> None:
    shape, recipe = shape_of("llama-3.2-1b", 2), recipe_of("lora")
    narrow: dict[str, Any] = {
        "stage": Options((3,)), "offload_param.device": Options(("nvme",)),
        "offload_param.buffer_count": Options((4,)), "world_size": Options((2,)),
    }  # fmt: skip
    space = Space(Problem(shape=shape, recipe=recipe, cluster=CLUSTER), narrow)
    choice = space.nearest(rank_candidates(shape, recipe, CLUSTER, fixed=ON_NVME)[0].choice)
    spec = TrialSpec(recipe=recipe, choice=choice, cluster=CLUSTER, model_path="")
    look = Screen(space=space, formula=FormulaBackend(shape), template=spec).look(choice)
    assert look.predicted.outcome is Outcome.BAD_CONFIG
    assert "buffers" in look.predicted.message


def test_a_change_comes_with_the_buffers_that_it_takes(request: pytest.FixtureRequest) -> None:
    """With checkpointing nine are enough, without it DeepSpeed takes fifteen."""
    shape, recipe = shape_of("mistral-7b"), recipe_of("full")
    (choice, *_) = (
        row.choice
        for row in rank_candidates(shape, recipe, CLUSTER, fixed=replace(ON_NVME, world_size=1))
        if row.choice.gradient_checkpointing
    )
    changes = dict(_runnable_changes(shape, recipe, choice, CLUSTER))
    assert "--no-gradient-checkpointing --set offload_param.buffer_count=15" in changes
    check_later(shape, recipe, list(changes.values()), request)


def test_a_count_that_the_user_gave_is_refused_not_raised() -> None:
    shape, recipe = shape_of("llama-3.2-1b", 2), recipe_of("lora")
    choice = rank_candidates(shape, recipe, CLUSTER, fixed=ON_NVME)[0].choice
    enough = with_enough_buffers(shape, recipe, choice, on_cpu=False)
    assert enough == choice
    with pytest.raises(ConfigError, match="buffer_count is 4"):
        rank_candidates(
            shape, recipe, CLUSTER, fixed=Fixed(offload_param="nvme", settings=("offload_param.buffer_count=4",))
        )
