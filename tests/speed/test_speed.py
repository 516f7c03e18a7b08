"""Step time: hand-worked parts, and properties that hold for any configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shapes import described_cluster, llama_like
from zplan.catalog.find import find_model
from zplan.memory.trainable import layout
from zplan.model_shape import Block, ModelShape, ParameterShape
from zplan.recipe import Recipe
from zplan.speed.communication import (
    COLLECTIVE_SECONDS,
    LINK_SHARE,
    gradient_bytes,
    link_bytes_per_second,
    ring_bytes_per_second,
    traffic,
)
from zplan.speed.compute import ACHIEVABLE_SHARE, OVERLAP_SLOWDOWN, backward_flops, flops_per_token, forward_flops
from zplan.speed.estimate import estimate_speed
from zplan.speed.exchange import exchange_seconds, sum_seconds
from zplan.speed.offload import (
    CPU_ADAM_ELEMENTS_PER_SECOND,
    PAGEABLE_SHARE,
    cpu_adam_seconds,
    nvme_seconds,
    parameter_link_seconds,
    state_copies,
)
from zplan.speed.work import attention_flops, work_of
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

H, F, V, L = 1024, 4096, 32000, 16
SHAPE = llama_like(hidden_size=H, intermediate_size=F, vocab_size=V, num_hidden_layers=L, num_attention_heads=8)
LAYERS = L * (4 * H * H + 3 * H * F)
RECIPE = Recipe(model="m", max_length=2048, train_batch_size=64)
ATTENTION = L * 4 * (2048 / 2) * H
"""Forward, per token: scores and values over half the sequence on average."""


def choice(*, micro: int = 2, steps: int = 4, world: int = 8, checkpointing: bool = True, **zero: Any) -> Choice:
    batch = BatchSizes(train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=steps, world_size=world)
    return Choice(zero=ZeroConfig(**zero), batch=batch, gradient_checkpointing=checkpointing)


def test_full_training_takes_six_flops_per_weight_and_token() -> None:
    work = work_of(SHAPE, RECIPE)
    assert work.layer_numel == LAYERS
    assert work.head_numel == V * H
    flops = flops_per_token(work, RECIPE, gradient_checkpointing=False)
    assert flops == pytest.approx(6 * (LAYERS + V * H) + 3.5 * ATTENTION)


def test_recomputation_is_one_more_forward_of_the_layers_only() -> None:
    work = work_of(SHAPE, RECIPE)
    with_it = flops_per_token(work, RECIPE, gradient_checkpointing=True)
    without = flops_per_token(work, RECIPE, gradient_checkpointing=False)
    assert with_it - without == pytest.approx(2 * LAYERS + ATTENTION)


def test_lora_needs_no_gradient_of_frozen_weights() -> None:
    recipe = replace(RECIPE, method="lora", lora_r=8)
    work = work_of(SHAPE, recipe)
    adapters = L * 8 * (4 * (H + H) + 3 * (H + F))
    assert work.adapter_numel == work.trainable_numel == adapters
    both = forward_flops(work, recipe) + backward_flops(work, recipe)
    assert both == pytest.approx(4 * (LAYERS + V * H) + 6 * adapters + 3.5 * ATTENTION)


def test_a_tied_head_still_multiplies() -> None:
    tied = llama_like(hidden_size=H, intermediate_size=F, vocab_size=V, num_hidden_layers=L, tie_word_embeddings=True)
    assert work_of(tied, RECIPE).head_numel == V * H


def test_a_token_visits_only_some_experts() -> None:
    experts = ParameterShape(name="mlp.experts.gate_up_proj", shape=(8, H, F), kind="experts")
    block = Block(role="layer", path="model.layers.{}", parameters=(experts,), repeat=2)
    shape = replace(SHAPE, blocks=(block,), num_local_experts=8, num_experts_per_tok=2)
    assert work_of(shape, RECIPE).layer_numel == 2 * 2 * H * F


def test_a_window_shortens_attention() -> None:
    window = replace(SHAPE, sliding_window=512)
    assert attention_flops(SHAPE, 2048, masked=True) == L * 4 * 2048 * 1024 * H
    assert attention_flops(window, 2048, masked=True) == L * 4 * 2048 * (512 - 512 * 512 / (2 * 2048)) * H
    assert attention_flops(SHAPE, 2048, masked=False) == L * 4 * 2048 * 2048 * H
    half = replace(window, layer_types=("sliding_attention", "full_attention") * (L // 2))
    assert (
        attention_flops(half, 2048, masked=True)
        == (attention_flops(SHAPE, 2048, masked=True) + attention_flops(window, 2048, masked=True)) / 2
    )


def test_compute_is_flops_over_the_achievable_share() -> None:
    speed = estimate_speed(SHAPE, RECIPE, choice(world=1, micro=16), described_cluster(gpus_per_node=1))
    tokens = 16 * 4 * 2048
    flops = flops_per_token(work_of(SHAPE, RECIPE), RECIPE, gradient_checkpointing=True)
    assert speed.parts["compute"] == pytest.approx(tokens * flops / (1e15 * ACHIEVABLE_SHARE))
    assert speed.bound_by == "compute"


def test_each_stage_moves_its_own_volume() -> None:
    num_bytes, ring, link = 2 * SHAPE.num_parameters, 7 / 8, 400e9 * LINK_SHARE
    cluster = described_cluster()
    seconds = {}
    for stage in (0, 1, 2, 3):
        zero = choice(stage=stage, reduce_bucket_size=10**12, stage3_prefetch_bucket_size=10**12)
        moved = traffic(work_of(SHAPE, RECIPE), RECIPE, zero, cluster)
        assert moved is not None
        seconds[stage] = moved
    all_reduce, gather = 2 * ring * num_bytes / link, ring * num_bytes / link
    assert seconds[0].total == pytest.approx(all_reduce + COLLECTIVE_SECONDS)
    assert seconds[1].total == pytest.approx(all_reduce + gather + 2 * COLLECTIVE_SECONDS)
    assert seconds[2].gradients == pytest.approx(4 * (all_reduce + COLLECTIVE_SECONDS))
    assert seconds[3].gradients == pytest.approx(4 * (gather + COLLECTIVE_SECONDS))
    assert seconds[3].parameters == pytest.approx(4 * (2 * gather + 2 * COLLECTIVE_SECONDS))


def test_one_gpu_moves_nothing_and_an_unknown_link_gives_no_seconds() -> None:
    work = work_of(SHAPE, RECIPE)
    alone = traffic(work, RECIPE, choice(world=1), described_cluster(link=None))
    assert alone is not None
    assert alone.total == 0
    unknown = estimate_speed(SHAPE, RECIPE, choice(), described_cluster(link=None))
    assert unknown.step_seconds is None
    assert unknown.tokens_per_second is None
    assert "compute" in unknown.parts


def test_an_unknown_gpu_has_no_speed() -> None:
    assert estimate_speed(SHAPE, RECIPE, choice(world=1), described_cluster(dense_flops=None)).step_seconds is None


def test_gradients_are_quantised_between_nodes_only() -> None:
    for nodes, is_less in ((1, False), (2, True)):
        plain, quantised = (
            gradient_bytes(work_of(SHAPE, RECIPE), RECIPE, choice(world=8 * nodes, stage=3, **more), num_nodes=nodes)
            for more in ({}, {"zero_quantized_gradients": True})
        )
        assert quantised == (plain / 4 if is_less else plain)


def test_the_ports_of_a_node_add_up_for_a_ring_and_not_for_one_gpu() -> None:
    cluster = described_cluster(gpus_per_node=4, nodes=2)
    for world_size, ring, alone in ((4, 400e9, 400e9), (8, 4 * 50e9, 50e9)):
        assert ring_bytes_per_second(cluster, world_size) == ring * LINK_SHARE
        assert link_bytes_per_second(cluster, world_size) == alone * LINK_SHARE
    single = described_cluster(gpus_per_node=1, nodes=8)
    assert ring_bytes_per_second(single, 8) == 50e9 * LINK_SHARE
    slow_inside = described_cluster(gpus_per_node=8, nodes=2, link=32e9)
    assert ring_bytes_per_second(slow_inside, 16) == 32e9 * LINK_SHARE


def test_gathers_and_reductions_share_what_hides_them() -> None:
    """Where all collectives together take longer than the arithmetic, the rest is seen, and what is hidden slows it."""
    cluster = described_cluster(link=10e9)
    speed = estimate_speed(SHAPE, RECIPE, choice(stage=3), cluster)
    parts = speed.parts
    moved = traffic(work_of(SHAPE, RECIPE), RECIPE, choice(stage=3), cluster)
    assert moved is not None
    assert moved.gradients + moved.parameters == parts["communication"]
    assert parts["communication"] > parts["compute"]
    assert speed.step_seconds == pytest.approx(
        parts["communication"] + OVERLAP_SLOWDOWN * parts["compute"] + parts["memory_bandwidth"]
    )


@pytest.mark.parametrize(
    ("stage", "steps", "copies"), [(1, 1, 0), (1, 4, 2), (2, 1, 0), (2, 4, 4 + 3), (3, 1, 2), (3, 4, 2 * 4)]
)
def test_offloaded_sums_of_gradients_come_back_for_each_micro_batch(stage: int, steps: int, copies: int) -> None:
    work, cluster = work_of(SHAPE, RECIPE), described_cluster()
    pinned = choice(stage=stage, steps=steps, offload_optimizer=OffloadOptimizer(device="cpu"))
    share, link = SHAPE.num_parameters / 8, 50e9 * LINK_SHARE
    moved = state_copies(work, RECIPE, pinned, cluster)
    assert moved is not None
    assert moved.during_backward == pytest.approx(share * (copies * 2 + 4) / link)
    assert moved.after_update == pytest.approx(share * 2 / link)
    pageable = choice(stage=stage, steps=steps, offload_optimizer=OffloadOptimizer(device="cpu", pin_memory=False))
    slow = state_copies(work, RECIPE, pageable, cluster)
    assert slow is not None
    assert slow.total == pytest.approx(moved.total / PAGEABLE_SHARE)
    none = state_copies(work, RECIPE, choice(stage=0, offload_optimizer=OffloadOptimizer(device="cpu")), cluster)
    assert none is not None
    assert none.total == 0


def test_parameter_offload_brings_each_partition_up_twice_a_micro_batch() -> None:
    offloaded = choice(stage=3, offload_param=OffloadParam(device="cpu"))
    seconds = parameter_link_seconds(work_of(SHAPE, RECIPE), RECIPE, offloaded, described_cluster())
    assert seconds == pytest.approx(2 * 4 * SHAPE.num_parameters / 8 * 2 / (50e9 * LINK_SHARE))


def test_the_cpu_updates_all_partitions_of_its_node() -> None:
    offloaded = choice(stage=2, offload_optimizer=OffloadOptimizer(device="cpu"))
    work = work_of(SHAPE, RECIPE)
    all_cores = cpu_adam_seconds(work, RECIPE, offloaded, described_cluster())
    assert all_cores == pytest.approx(SHAPE.num_parameters / CPU_ADAM_ELEMENTS_PER_SECOND)
    half = cpu_adam_seconds(work, RECIPE, offloaded, described_cluster(described=False, num_cpus=24))
    assert half == pytest.approx(2 * all_cores)
    two_nodes = replace(offloaded, batch=replace(offloaded.batch, world_size=16))
    assert cpu_adam_seconds(work, RECIPE, two_nodes, described_cluster(nodes=2)) == pytest.approx(all_cores / 2)


def test_partial_offload_updates_only_its_ratio_on_the_cpu() -> None:
    work, cluster = work_of(SHAPE, RECIPE), described_cluster()
    whole = choice(stage=3, offload_optimizer=OffloadOptimizer(device="cpu"))
    part = choice(stage=3, offload_optimizer=OffloadOptimizer(device="cpu", ratio=0.25))
    assert cpu_adam_seconds(work, RECIPE, part, cluster) == cpu_adam_seconds(work, RECIPE, whole, cluster) / 4


def test_nvme_reads_and_writes_weights_gradients_and_two_states_in_fp32() -> None:
    swapped = choice(stage=3, offload_optimizer=OffloadOptimizer(device="nvme", nvme_path="/nvme"))
    seconds = nvme_seconds(work_of(SHAPE, RECIPE), RECIPE, swapped, described_cluster(nvme=True))
    assert seconds == pytest.approx(2 * 4 * 4 * SHAPE.num_parameters / 5e9)
    assert nvme_seconds(work_of(SHAPE, RECIPE), RECIPE, swapped, described_cluster()) is None


CHOICES = st.builds(
    choice,
    micro=st.sampled_from([1, 2, 4]),
    steps=st.sampled_from([1, 4]),
    world=st.sampled_from([1, 2, 8]),
    checkpointing=st.booleans(),
    stage=st.sampled_from([0, 1, 2, 3]),
    overlap_comm=st.sampled_from([None, True, False]),
    offload_optimizer=st.sampled_from([OffloadOptimizer(), OffloadOptimizer(device="cpu")]),
    offload_param=st.sampled_from([OffloadParam(), OffloadParam(device="cpu")]),
)


@given(CHOICES)
@settings(max_examples=100, deadline=None)
def test_a_step_is_never_faster_than_its_arithmetic(chosen: Choice) -> None:
    speed = estimate_speed(SHAPE, RECIPE, chosen, described_cluster())
    assert speed.step_seconds is not None
    assert speed.tokens_per_second is not None
    assert speed.step_seconds >= speed.parts["compute"]
    assert speed.step_seconds <= sum(speed.parts.values()) * (1 + 1e-9)
    assert speed.tokens_per_second == pytest.approx(chosen.batch.train_batch_size * 2048 / speed.step_seconds)
    assert all(seconds >= 0 for seconds in speed.parts.values())


@given(CHOICES)
@settings(max_examples=100, deadline=None)
def test_a_faster_link_never_slows_a_step(chosen: Choice) -> None:
    slow = estimate_speed(SHAPE, RECIPE, chosen, described_cluster(link=50e9)).step_seconds
    fast = estimate_speed(SHAPE, RECIPE, chosen, described_cluster(link=500e9)).step_seconds
    assert slow is not None
    assert fast is not None
    assert fast <= slow * (1 + 1e-9)


@given(CHOICES)
@settings(max_examples=100, deadline=None)
def test_overlap_never_slows_a_step(chosen: Choice) -> None:
    hidden = replace(chosen, zero=replace(chosen.zero, overlap_comm=True))
    shown = replace(chosen, zero=replace(chosen.zero, overlap_comm=False))
    cluster = described_cluster()
    fast, slow = (estimate_speed(SHAPE, RECIPE, item, cluster).step_seconds for item in (hidden, shown))
    assert fast is not None
    assert slow is not None
    assert fast <= slow * (1 + 1e-9)


def test_shared_sequences_are_exchanged_around_every_attention() -> None:
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=3, world_size=4, sequence_parallel_size=2
    )
    cluster = described_cluster(gpus_per_node=4)
    shared = Choice(zero=ZeroConfig(stage=1), batch=batch)
    sent = 2 * 2048 // 2 * 4 * H * 2 / 2  # tokens of a rank, q, k, v and the result, bf16, half of it leaves
    each = sent / (cluster.intra_node_bytes_per_second or 0) / LINK_SHARE + 4 * COLLECTIVE_SECONDS
    assert exchange_seconds(SHAPE, RECIPE, shared, cluster) == pytest.approx(L * 3 * 3 * each)
    alone = replace(shared, batch=replace(batch, sequence_parallel_size=1))
    assert exchange_seconds(SHAPE, RECIPE, alone, cluster) == 0


def test_cut_matrices_are_added_up_behind_every_pair() -> None:
    batch = BatchSizes(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=3, world_size=4, autotp_size=2)
    cluster = described_cluster(gpus_per_node=4)
    cut = Choice(zero=ZeroConfig(stage=1), batch=batch)
    each = 2 * (2 * 2048 * H * 2) / 2 / (cluster.intra_node_bytes_per_second or 0) / LINK_SHARE + COLLECTIVE_SECONDS
    assert sum_seconds(SHAPE, RECIPE, cut, cluster) == pytest.approx(L * 3 * (2 + 5 + 2) * each)
    speed = estimate_speed(SHAPE, RECIPE, cut, cluster)
    alone = estimate_speed(SHAPE, RECIPE, replace(cut, batch=replace(batch, autotp_size=1)), cluster)
    assert speed.parts["compute"] == pytest.approx(alone.parts["compute"] / 2)


def test_adapters_on_experts_alone_have_a_speed() -> None:
    shape = find_model("mixtral-8x7b")
    assert isinstance(shape, ModelShape)
    recipe = Recipe(model="any", method="lora", lora_target=("w1", "w2"), train_batch_size=2)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=2)
    choice = Choice(zero=ZeroConfig(stage=2), batch=batch)
    assert estimate_speed(shape, recipe, choice, described_cluster(gpus_per_node=2)).tokens_per_second


@pytest.mark.parametrize("model", ["mistral-7b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt2"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_as_many_elements_train_as_memory_counts(model: str, method: Any) -> None:
    """Adapters of stacked experts among them, which the step's time once left out."""
    shape, recipe = find_model(model), Recipe(model=model, method=method)
    assert work_of(shape, recipe).trainable_numel == layout(shape, recipe).trainable_numel


def test_adapters_of_experts_alone_have_a_step_time_and_make_the_experts_gradients() -> None:
    shape = find_model("mixtral-8x7b")
    alone = Recipe(model="mixtral-8x7b", method="lora", lora_target=("w1", "w3"))
    none = work_of(shape, replace(alone, lora_target=("q_proj",)))
    work = work_of(shape, alone)
    assert work.folded_numel == 32 * 2 * 28672 * 4096  # two of eight experts, gate and up
    assert work.adapter_numel == none.folded_numel == 0
    more = backward_flops(work, alone) - backward_flops(replace(work, folded_numel=0), alone)
    assert more == 2 * work.folded_numel
