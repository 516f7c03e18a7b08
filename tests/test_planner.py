"""Candidates: which strategies are tried, how they are ranked, what a change does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.shapes import described_cluster, llama_like
from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.planner import (
    Fixed,
    evaluate,
    make_choice,
    quantify_fixes,
    rank_candidates,
    smallest_change_that_fits,
)
from zplan.recipe import Recipe
from zplan.settings import apply_settings, hf_auto_zero
from zplan.zero_config import ZeroConfig, deepspeed_config

SHAPE = llama_like(hidden_size=512, num_hidden_layers=4, vocab_size=8000)
RECIPE = Recipe(model="m", max_length=512, train_batch_size=16)
ROOMY = described_cluster(gpus_per_node=4)
GIB = 1 << 30


def test_every_stage_is_a_candidate_and_the_fastest_comes_first() -> None:
    candidates = rank_candidates(SHAPE, RECIPE, ROOMY)
    assert {candidate.choice.zero.stage for candidate in candidates} == {0, 1, 2, 3}
    speeds = [candidate.speed.tokens_per_second or 0.0 for candidate in candidates if candidate.tier == 0]
    assert speeds == sorted(speeds, reverse=True)
    assert {candidate.choice.batch.world_size for candidate in candidates} == {4, 2, 1}


def test_stages_1_and_2_overlap_what_leaves_a_gpu_unless_the_user_says_otherwise() -> None:
    def overlaps(cluster: Cluster, **decided: Any) -> set[tuple[bool, bool]]:
        choices = [item.choice for item in rank_candidates(SHAPE, RECIPE, cluster, fixed=Fixed(**decided))]
        return {(choice.zero.offloads_optimizer, choice.zero.overlaps_comm) for choice in choices}

    on_all = {"settings": ("world_size=4",)}
    assert overlaps(ROOMY, stage=2, **on_all) == {(False, True), (True, True)}
    assert overlaps(ROOMY, stage=2, settings=("world_size=4", "overlap_comm=false")) == {(False, False), (True, False)}
    assert overlaps(ROOMY, stage=0, **on_all) == {(False, False)}
    assert overlaps(described_cluster(gpus_per_node=1), stage=1) == {(False, False), (True, True)}
    ranks = described_cluster(gpus_per_node=4, kind="cpu")
    assert overlaps(ranks, stage=2, **on_all) == {(False, False), (True, False)}


def test_with_much_accumulation_stage_1_is_faster_than_stage_3() -> None:
    """It reduces once a step, and stage 3 gathers and reduces in every micro-batch."""
    shape = llama_like(hidden_size=4096, intermediate_size=14336, vocab_size=32000, num_hidden_layers=4)
    recipe = replace(RECIPE, max_length=1024, train_batch_size=256)
    one, three = (
        max(
            item.speed.tokens_per_second or 0.0
            for item in rank_candidates(shape, recipe, described_cluster(), fixed=Fixed(stage=stage, micro_batch=1))
        )
        for stage in (1, 3)
    )
    assert one > three


def test_a_change_that_only_makes_it_faster_is_a_fix() -> None:
    choice = make_choice(SHAPE, RECIPE, ROOMY, fixed=Fixed(stage=2))
    (overlap,) = [item for item in quantify_fixes(SHAPE, RECIPE, choice, ROOMY) if "overlap_comm" in item.change]
    assert overlap.tokens_per_second is not None
    assert overlap.tokens_per_second > 1
    assert overlap.gpu_bytes == 0, "the second bucket is gone when the peak, the update, is reached"


def test_ranks_that_share_sequences_train_the_same_batch_in_more_steps() -> None:
    fixed = Fixed(settings=("sequence_parallel_size=2",))
    choices = [candidate.choice for candidate in rank_candidates(SHAPE, RECIPE, ROOMY, fixed=fixed)]
    assert {choice.batch.train_batch_size for choice in choices} == {16}
    assert {choice.batch.sequence_parallel_size for choice in choices} == {2}
    assert {choice.batch.world_size for choice in choices} == {4, 2}
    one = make_choice(SHAPE, RECIPE, ROOMY, fixed=replace(fixed, stage=2, micro_batch=4))
    assert one.batch.gradient_accumulation_steps == 16 // (4 * (4 // 2))


def test_ranks_that_hold_one_copy_together_train_its_sequences_once() -> None:
    fixed = Fixed(stage=2, micro_batch=2, settings=("autotp_size=2",))
    (choice, *_) = [candidate.choice for candidate in rank_candidates(SHAPE, RECIPE, ROOMY, fixed=fixed)]
    assert (
        choice.batch.train_batch_size
        == 16
        == 2 * choice.batch.gradient_accumulation_steps * (choice.batch.world_size // 2)
    )
    config = deepspeed_config(RECIPE, choice, cpu_adam=False)
    assert config["tensor_parallel"]["autotp_size"] == 2
    assert config["train_batch_size"] == 2 * 16, "DeepSpeed counts every rank (runtime/config.py:471)"


def test_sequences_are_not_shared_by_ranks_that_hold_one_copy_together() -> None:
    with pytest.raises(ConfigError, match="together"):
        make_choice(SHAPE, RECIPE, ROOMY, fixed=Fixed(stage=2, sequence_parallel_size=2, autotp_size=2))


def test_sequences_cannot_be_shared_by_ranks_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="does not divide 4 ranks"):
        make_choice(SHAPE, RECIPE, ROOMY, fixed=Fixed(stage=2, sequence_parallel_size=3))


def test_every_candidate_trains_the_global_batch_of_the_recipe() -> None:
    assert {c.choice.batch.train_batch_size for c in rank_candidates(SHAPE, RECIPE, ROOMY)} == {16}


@pytest.mark.parametrize("gpu_bytes", [GIB // 4, GIB // 2, GIB])
def test_on_fewer_gpus_where_nothing_fits_the_least_short_of_all_is_shown(gpu_bytes: int) -> None:
    """Bounds spare estimates, and change no answer: ranked alone, all on two GPUs are candidates."""
    cluster = described_cluster(gpus_per_node=4, gpu_bytes=gpu_bytes)
    shown = [c for c in rank_candidates(SHAPE, RECIPE, cluster) if c.choice.batch.world_size == 2]
    every = rank_candidates(SHAPE, RECIPE, cluster, fixed=Fixed(world_size=2))
    assert every[0].tier > 0
    assert [c.choice for c in shown] == [every[0].choice]


def test_what_does_not_fit_comes_last_with_the_least_missing_first() -> None:
    candidates = rank_candidates(SHAPE, RECIPE, described_cluster(gpus_per_node=4, gpu_bytes=GIB))
    tiers = [candidate.tier for candidate in candidates]
    assert tiers == sorted(tiers)
    short = [candidate.short_bytes for candidate in candidates if candidate.tier == 2]
    assert short == sorted(short)


def test_the_users_decisions_are_kept() -> None:
    fixed = Fixed(stage=2, micro_batch=2, gradient_checkpointing=True, settings=("overlap_comm=true",))
    candidates = rank_candidates(SHAPE, RECIPE, ROOMY, fixed=fixed)
    for candidate in candidates:
        choice = candidate.choice
        assert (choice.zero.stage, choice.batch.train_micro_batch_size_per_gpu) == (2, 2)
        assert choice.gradient_checkpointing
        assert choice.zero.overlap_comm is True


def test_settings_may_name_parts_of_the_choice() -> None:
    fixed = Fixed(settings=("stage=3", "world_size=2", "offload_param.device=cpu", "max_live_parameters=1e8"))
    for candidate in rank_candidates(SHAPE, RECIPE, ROOMY, fixed=fixed):
        assert candidate.choice.batch.world_size == 2
        assert candidate.choice.zero.offload_param.device == "cpu"
        assert candidate.choice.zero.stage3_max_live_parameters == 10**8


def test_nvme_is_tried_only_where_there_is_one() -> None:
    def devices(nvme: bool) -> set[str]:
        found = rank_candidates(SHAPE, RECIPE, described_cluster(gpus_per_node=1, nvme=nvme))
        return {candidate.choice.zero.offload_optimizer.device for candidate in found}

    assert devices(nvme=False) == {"none", "cpu"}
    assert devices(nvme=True) == {"none", "cpu", "nvme"}


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    fixed = Fixed(stage=0, gradient_checkpointing=False)
    roomy = described_cluster(gpus_per_node=1)
    four = make_choice(SHAPE, RECIPE, roomy, fixed=replace(fixed, micro_batch=4))
    enough = described_cluster(
        gpus_per_node=1, gpu_bytes=evaluate(SHAPE, RECIPE, four, roomy).memory.gpu.used.high + GIB // 8
    )
    sizes = {
        size: evaluate(
            SHAPE, RECIPE, make_choice(SHAPE, RECIPE, enough, fixed=replace(fixed, micro_batch=size)), enough
        ).tier
        for size in (1, 2, 4, 8, 16)
    }
    largest = max(size for size, tier in sizes.items() if tier == 0)
    best = rank_candidates(SHAPE, RECIPE, enough, fixed=fixed)[0]
    assert best.choice.batch.train_micro_batch_size_per_gpu == largest < 16


def test_ranks_that_do_not_divide_the_batch_are_refused_with_the_mend() -> None:
    with pytest.raises(ConfigError, match="does not divide it") as caught:
        rank_candidates(SHAPE, replace(RECIPE, train_batch_size=6), ROOMY)
    assert caught.value.fix == "--train-batch-size 4"


def test_offload_that_the_engine_would_ignore_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no effect at stage 2"):
        make_choice(SHAPE, RECIPE, ROOMY, fixed=Fixed(stage=2, offload_param="cpu"))
    with pytest.raises(ConfigError, match="has no effect at stage 0"):
        rank_candidates(SHAPE, RECIPE, ROOMY, fixed=Fixed(stage=0, offload_optimizer="cpu"))


def test_a_choice_from_flags_is_cautious_where_nothing_is_said() -> None:
    choice = make_choice(SHAPE, RECIPE, ROOMY, fixed=Fixed(stage=3, settings=("sub_group_size=1e8",)))
    assert choice.batch.train_micro_batch_size_per_gpu == 1
    assert choice.gradient_checkpointing
    assert choice.zero.reduce_bucket_size == 512 * 512
    assert choice.zero.sub_group_size == 10**8


def test_auto_sizes_are_those_of_transformers() -> None:
    zero = hf_auto_zero(3, SHAPE.hidden_size)
    assert zero.reduce_bucket_size == 512 * 512
    assert zero.stage3_prefetch_bucket_size == int(0.9 * 512 * 512)
    assert zero.stage3_param_persistence_threshold == 10 * 512
    assert hf_auto_zero(2, SHAPE.hidden_size).stage3_prefetch_bucket_size == ZeroConfig().stage3_prefetch_bucket_size


def test_all_settings_that_cannot_be_read_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_settings(ZeroConfig(), ["sub_grop_size=1", "stage=7", "offload_param.device=disk", "overlap_comm"])
    assert len(caught.value.problems) == 4
    assert "sub_group_size" in caught.value.problems[0]


def test_recomputation_is_a_fix_with_its_price() -> None:
    choice = make_choice(SHAPE, RECIPE, ROOMY, fixed=Fixed(stage=2, micro_batch=4, gradient_checkpointing=False))
    fixes = {fix.change: fix for fix in quantify_fixes(SHAPE, RECIPE, choice, ROOMY)}
    fix = fixes["--gradient-checkpointing"]
    after = evaluate(SHAPE, RECIPE, replace(choice, gradient_checkpointing=True), ROOMY)
    before = evaluate(SHAPE, RECIPE, choice, ROOMY)
    assert fix.gpu_bytes == after.memory.gpu.used.expected - before.memory.gpu.used.expected < 0
    assert fix.tokens_per_second is not None
    assert 0.6 < fix.tokens_per_second < 1
    assert list(fixes) == [fix.change for fix in sorted(fixes.values(), key=lambda fix: fix.gpu_bytes)]


def test_when_nothing_fits_each_offered_change_makes_something_fit() -> None:
    shape = llama_like(hidden_size=4096, intermediate_size=16384, num_hidden_layers=4, vocab_size=32000)
    recipe = replace(RECIPE, max_length=2048)
    one = rank_candidates(shape, recipe, described_cluster(gpus_per_node=1), fixed=Fixed(micro_batch=1))
    least = min(candidate.memory.gpu.used.low for candidate in one)
    small = described_cluster(gpus_per_node=1, gpu_bytes=least)
    assert all(candidate.tier > 0 for candidate in rank_candidates(shape, recipe, small))
    changes = smallest_change_that_fits(shape, recipe, small)
    assert changes
    assert all(change.fits for change in changes)


def test_a_node_that_lacks_host_memory_is_offered_more_of_it() -> None:
    shape = llama_like(hidden_size=2048, num_hidden_layers=4, vocab_size=32000)
    recipe = replace(RECIPE, train_batch_size=1, max_length=256)
    one = described_cluster(gpus_per_node=1, gpu_bytes=4 * GIB, host_bytes=8 * GIB)
    offers = {fix.change: fix for fix in smallest_change_that_fits(shape, recipe, one)}
    assert "--host-ram 16GiB" in offers
    enough = replace(one, host=replace(one.host, total_bytes=16 * GIB, available_bytes=16 * GIB))
    assert rank_candidates(shape, recipe, enough)[0].tier == 0
    assert rank_candidates(shape, recipe, one)[0].tier > 0
