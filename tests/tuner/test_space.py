"""Knobs act where DeepSpeed reads them; configurations that run alike have one key."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import TOY_RECIPE, toy_cluster, toy_shape
from zplan.errors import ConfigError
from zplan.recipe import Recipe
from zplan.tuner.pool import Rolls
from zplan.tuner.ranges import Elements, Options, Range
from zplan.tuner.space import KNOB_NAMES, Problem, Space, make_knobs, nearest_micro_batch, world_sizes
from zplan.zero_config import Choice, OffloadOptimizer, OffloadParam, ZeroConfig, batch_sizes

SHAPE = toy_shape()
PROBLEM = Problem(shape=SHAPE, recipe=TOY_RECIPE, cluster=toy_cluster())
NVME = Problem(shape=SHAPE, recipe=TOY_RECIPE, cluster=toy_cluster(nvme="/nvme"))
CPU = Problem(shape=SHAPE, recipe=TOY_RECIPE, cluster=toy_cluster(kind="cpu"))


def _choice(zero: ZeroConfig, *, world_size: int = 4) -> Choice:
    return Choice(zero=zero, batch=batch_sizes(TOY_RECIPE, micro_batch=2, world_size=world_size))


def _same(space: Space, left: ZeroConfig, right: ZeroConfig, *, world_size: int = 4) -> bool:
    return space.key(_choice(left, world_size=world_size)) == space.key(_choice(right, world_size=world_size))


def test_the_names_are_those_of_the_knobs() -> None:
    assert tuple(knob.name for knob in make_knobs(PROBLEM)) == KNOB_NAMES


def test_stage_3_limits_are_dead_below_stage_3() -> None:
    space = Space(PROBLEM)
    assert _same(space, ZeroConfig(stage=2), ZeroConfig(stage=2, stage3_max_live_parameters=1, sub_group_size=7))
    assert not _same(space, ZeroConfig(stage=3), ZeroConfig(stage=3, stage3_max_live_parameters=1))


def test_offload_param_is_dead_below_stage_3() -> None:
    cpu = OffloadParam(device="cpu")
    assert _same(Space(PROBLEM), ZeroConfig(stage=2), ZeroConfig(stage=2, offload_param=cpu))
    assert not _same(Space(PROBLEM), ZeroConfig(stage=3), ZeroConfig(stage=3, offload_param=cpu))


def test_every_zero_knob_is_dead_at_stage_0() -> None:
    zero = ZeroConfig(
        stage=0, reduce_bucket_size=1, overlap_comm=True, offload_optimizer=OffloadOptimizer(device="cpu")
    )
    assert _same(Space(PROBLEM), ZeroConfig(stage=0), zero)


def test_nvme_below_stage_3_is_cpu_offload() -> None:
    nvme, cpu = OffloadOptimizer(device="nvme", nvme_path="/nvme"), OffloadOptimizer(device="cpu")
    left, right = ZeroConfig(stage=2, offload_optimizer=nvme), ZeroConfig(stage=2, offload_optimizer=cpu)
    assert _same(Space(NVME), left, right)
    assert not _same(Space(NVME), replace(left, stage=3), replace(right, stage=3))


def test_contiguous_gradients_is_forced_by_offload_at_stage_2() -> None:
    cpu = OffloadOptimizer(device="cpu")
    left = ZeroConfig(stage=2, offload_optimizer=cpu)
    assert _same(Space(PROBLEM), left, replace(left, contiguous_gradients=False))
    assert not _same(Space(PROBLEM), ZeroConfig(stage=2), ZeroConfig(stage=2, contiguous_gradients=False))


def test_overlap_comm_needs_a_gpu_and_gradients_that_leave_it() -> None:
    on, off = ZeroConfig(stage=2, overlap_comm=True), ZeroConfig(stage=2, overlap_comm=False)
    assert not _same(Space(PROBLEM), on, off)
    assert _same(Space(PROBLEM), on, off, world_size=1)
    assert _same(Space(CPU), on, off)
    cpu = OffloadOptimizer(device="cpu")
    copied, waited = replace(on, offload_optimizer=cpu), replace(off, offload_optimizer=cpu)
    assert not _same(Space(PROBLEM), copied, waited, world_size=1)


def test_pin_memory_does_nothing_on_cpu_ranks() -> None:
    def pinned(pin: bool) -> ZeroConfig:
        return ZeroConfig(stage=2, offload_optimizer=OffloadOptimizer(device="cpu", pin_memory=pin))

    assert _same(Space(CPU), pinned(True), pinned(False))
    assert not _same(Space(PROBLEM), pinned(True), pinned(False))


def test_the_default_of_overlap_comm_is_spelt_one_way() -> None:
    assert _same(Space(PROBLEM), ZeroConfig(stage=3), ZeroConfig(stage=3, overlap_comm=True))


def test_nvme_is_offered_only_where_there_is_one() -> None:
    assert "nvme" not in _values(Space(PROBLEM), "offload_optimizer.device")
    assert "nvme" in _values(Space(NVME), "offload_optimizer.device")


def _values(space: Space, name: str) -> tuple[object, ...]:
    found = next(knob.range for knob in space.knobs if knob.name == name)
    assert isinstance(found, Options)
    return found.values


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), problem=st.sampled_from([PROBLEM, NVME, CPU]))
def test_a_suggestion_is_canonical_inside_and_keeps_the_global_batch(seed: int, problem: Problem) -> None:
    space = Space(problem)
    choice = space.suggest(Rolls(random.Random(seed)))
    assert space.canonical(choice) == choice
    assert space.contains(choice)
    assert choice.batch.train_batch_size == TOY_RECIPE.train_batch_size
    assert space.choice(space.draft(choice)) == choice


def test_a_fixed_knob_stays_fixed() -> None:
    space = Space(PROBLEM, {"stage": Options((2,)), "reduce_bucket_size": Elements(5, 5)})
    rng = random.Random(0)
    assert {space.suggest(Rolls(rng)).zero.reduce_bucket_size for _ in range(20)} == {5}


def test_a_setting_that_is_no_knob_is_in_every_choice() -> None:
    space = Space(PROBLEM, base=ZeroConfig(zero_hpz_partition_size=2))
    assert space.suggest(Rolls(random.Random(0))).zero.zero_hpz_partition_size == 2


def test_an_unknown_knob_is_named() -> None:
    with pytest.raises(ConfigError, match="bucket: not a knob"):
        Space(PROBLEM, {"bucket": Options((1,))})


@pytest.mark.parametrize(("wanted", "got"), [(1, 1), (5, 4), (7, 6), (12, 12), (100, 12)])
def test_a_micro_batch_divides_the_share_of_a_rank(wanted: int, got: int) -> None:
    recipe = Recipe(model="toy", train_batch_size=48)
    assert nearest_micro_batch(recipe, 4, wanted) == got  # 48 / 4 = 12 sequences per rank


def test_fewer_gpus_are_tried_whole_nodes_or_a_part_of_one() -> None:
    cluster = replace(toy_cluster(gpus=4), nodes=2)
    assert world_sizes(TOY_RECIPE, cluster) == (1, 2, 4, 8)
    assert world_sizes(Recipe(model="toy", train_batch_size=6), cluster) == (1, 2)


def test_a_choice_outside_the_users_ranges_moves_to_the_nearest_one_inside() -> None:
    narrowing: dict[str, Range] = {
        "world_size": Options((1, 2)), "reduce_bucket_size": Elements(1_000_000, 2_000_000), "stage": Options((2, 3)),
    }  # fmt: skip
    space = Space(PROBLEM, narrowing)
    outside = Choice(
        zero=ZeroConfig(stage=1, reduce_bucket_size=500_000_000),
        batch=batch_sizes(TOY_RECIPE, micro_batch=1, world_size=4),
    )
    inside = space.nearest(outside)
    assert not space.contains(outside)
    assert space.contains(inside)
    assert (inside.batch.world_size, inside.zero.stage, inside.zero.reduce_bucket_size) == (2, 2, 2_000_000)


def test_offloading_that_is_asked_for_is_not_lost_to_a_stage_that_has_none() -> None:
    space = Space(PROBLEM, {"offload_optimizer.device": Options(("cpu",))})
    batch = batch_sizes(TOY_RECIPE, micro_batch=1, world_size=4)
    assert not space.contains(Choice(zero=ZeroConfig(stage=0), batch=batch))
    assert space.contains(space.nearest(Choice(zero=ZeroConfig(stage=2), batch=batch)))
