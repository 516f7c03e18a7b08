"""Host memory of NVMe offload, worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.memory.test_estimate import SHAPE, cluster, estimate
from zplan.memory.estimate import estimate_memory
from zplan.memory.instances import instances
from zplan.memory.sub_groups import swapped_parameters, unswapped_bytes
from zplan.memory.terms import MemoryEstimate
from zplan.memory.trainable import layout
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

MATRICES = sum(parameter.numel for _, parameter in SHAPE.parameters() if parameter.kind != "norm")
"""The group with weight decay: one sub-group unless it is cut."""


def host_term(found: MemoryEstimate, name: str) -> int:
    return sum(term.bytes for term in found.host.terms if term.name == name)


def offloaded(device: str, sub_group_size: int = 1_000_000_000, stage: int = 3) -> MemoryEstimate:
    states = OffloadOptimizer(device=device, nvme_path="/nvme")  # type: ignore[arg-type]
    zero = ZeroConfig(stage=stage, offload_optimizer=states, sub_group_size=sub_group_size)  # type: ignore[arg-type]
    return estimate(zero, world_size=1)


def test_nvme_buffers_hold_the_largest_sub_group_four_times() -> None:
    whole, cut = offloaded("nvme"), offloaded("nvme", sub_group_size=100_000)
    assert host_term(whole, "NVMe swap buffers") == 4 * 4 * MATRICES
    layer = [parameter.numel for block, parameter in SHAPE.parameters() if parameter.kind != "norm"]
    assert max(layer) > 100_000  # a sub-group ends with the parameter that reaches its size
    assert host_term(cut, "NVMe swap buffers") >= 4 * 4 * max(layer)


def test_small_sub_groups_stay_in_host_memory_and_small_gradients_of_the_others_on_the_gpu() -> None:
    """Each parameter is less than 1 MiB in fp32; the norms are so together, the matrices' sub-group is not."""
    found, norms = offloaded("nvme"), SHAPE.num_parameters - MATRICES
    assert 4 * norms < 1 << 20
    assert host_term(found, "offloaded gradients") == 2 * SHAPE.num_parameters
    assert host_term(found, "small sub-groups") == (4 + 4) * norms
    assert host_term(found, "states of small sub-groups") == 8 * norms + 4
    items = instances(layout(SHAPE, Recipe(model="m", train_batch_size=1, max_length=128)))
    zero = ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device="nvme", nvme_path="/nvme"))
    swapped = swapped_parameters(items, zero, 1)
    assert sum(items.numel[number] for number in swapped) == MATRICES
    assert unswapped_bytes(items, swapped, 1) == 4 * MATRICES
    assert not swapped_parameters(items, replace(zero, offload_optimizer=OffloadOptimizer(device="cpu")), 1)


def test_states_are_counted_once_where_every_sub_group_is_small() -> None:
    """An adapter's are: their states are made where they stay, and none is swapped out."""
    zero = ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device="nvme", nvme_path="/nvme"))
    small, large = estimate(zero, world_size=1, method="lora", lora_r=1), offloaded("nvme")
    assert host_term(small, "states of small sub-groups") > 0
    assert host_term(small, "states before they are swapped out") == 0
    assert host_term(large, "states before they are swapped out") == 8 * MATRICES + 4


def test_nvme_below_stage_3_is_the_cpu() -> None:
    assert offloaded("nvme", stage=2).host.phases == offloaded("cpu", stage=2).host.phases


def saved(stage: int, world_size: int = 2, **recipe: object) -> int:
    return host_term(estimate(ZeroConfig(stage=stage), world_size=world_size, **recipe), "copies while saving")  # type: ignore[arg-type]


def test_saving_copies_one_flat_state_of_every_rank_or_the_weights_on_rank_0() -> None:
    assert saved(2) == 2 * 4 * SHAPE.num_parameters // 2  # two ranks, fp32, half of the elements each
    assert saved(3) == 2 * 4 * MATRICES // 2  # the larger of its two groups
    offloading = ZeroConfig(stage=2, offload_optimizer=OffloadOptimizer(device="cpu"))
    assert host_term(estimate(offloading, world_size=2), "copies while saving") == 2 * SHAPE.num_parameters


def test_frozen_weights_are_not_copied_to_be_saved() -> None:
    assert saved(3, method="lora", lora_r=1) < saved(3)


def test_stage_2_accumulates_whole_parameters_on_every_rank_that_they_touch() -> None:
    """Two ranks: their halves meet within one parameter, which both keep whole."""
    zero = ZeroConfig(stage=2, offload_optimizer=OffloadOptimizer(device="cpu"))
    one, two = (estimate(zero, world_size=ranks, accumulation=2) for ranks in (1, 2))
    assert host_term(one, "offloaded gradient accumulation") == 2 * SHAPE.num_parameters
    shared = host_term(two, "offloaded gradient accumulation") // 2 - SHAPE.num_parameters
    assert shared in {parameter.numel for _, parameter in SHAPE.parameters()} | {
        a.numel + b.numel for _, a in SHAPE.parameters() for _, b in SHAPE.parameters()
    }
    assert host_term(estimate(zero, world_size=2), "offloaded gradient accumulation") == 0


def test_zero_3_pins_gradients_and_not_masters_and_holds_zeros_of_its_largest_sub_group_at_initialize() -> None:
    found, numel = offloaded("cpu"), SHAPE.num_parameters
    assert found.host.pinned_bytes == (4 + 2) * numel
    zeros = "offloaded gradients of zeros at initialize"
    assert host_term(found, zeros) == 2 * 4 * MATRICES - 2 * numel  # a buffer and what is pinned, before the flat ones
    assert host_term(offloaded("cpu", sub_group_size=1), zeros) == 2 * numel  # a small buffer: the flat ones are more


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_cpu_rank_flattens_before_it_makes_what_it_offloads(stage: Any) -> None:
    """So initialize holds what stays, the flat weights' staging copy or zeros of the largest sub-group, and no more."""
    states = OffloadOptimizer(device="cpu")
    zero = ZeroConfig(stage=stage, offload_optimizer=states, reduce_bucket_size=1, stage3_param_persistence_threshold=0)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=1)
    recipe = Recipe(model="m", train_batch_size=1, max_length=128)
    found = estimate_memory(SHAPE, recipe, Choice(zero=zero, batch=batch), cluster(1, kind="cpu"))
    weights, largest = 2 * SHAPE.num_parameters, max(parameter.numel for _, parameter in SHAPE.parameters())
    states_and_gradients = 10 * SHAPE.num_parameters
    more = 4 * MATRICES - weights if stage == 3 else 2 * 2 * largest
    assert found.gpu.phases["init"] == weights + states_and_gradients + more


def test_offloaded_parameters_are_flattened_in_pinned_memory_beside_themselves_and_are_there_from_loading_on() -> None:
    """The buffer and what is pinned into it, less what comes later: masters and gradients of the optimizer."""
    zero = ZeroConfig(stage=3, offload_param=OffloadParam(device="cpu", pin_memory=False))
    alone = estimate(zero, world_size=1)
    both = estimate(replace(zero, offload_optimizer=OffloadOptimizer(device="cpu")), world_size=1)
    weights = 2 * SHAPE.num_parameters
    assert host_term(alone, "copies while parameters are flattened") == 2 * weights
    assert host_term(both, "copies while parameters are flattened") == 0
    assert alone.host.pinned_bytes == weights
    assert {"load", "save"} <= {p for t in alone.host.terms if t.name == "offloaded parameters" for p in t.phases}


def test_second_copies_of_offloaded_parameters_lie_in_host_memory() -> None:
    """hpZ over pairs of eight ranks: half of every parameter on each rank, padded to a multiple of eight."""
    zero = ZeroConfig(stage=3, zero_hpz_partition_size=2, offload_param=OffloadParam(device="cpu"))
    found, name = estimate(zero, world_size=8), "secondary partitions (hpZ)"
    copy = 2 * sum(-(-parameter.numel // 8) * 8 // 2 for _, parameter in SHAPE.parameters())
    assert host_term(found, name) == 8 * copy
    assert not any(term.name == name for term in found.gpu.terms)
    assert found.gpu.verdict == "fits"
    on_nvme = replace(zero, offload_param=OffloadParam(device="nvme", nvme_path="/nvme"))
    refused = estimate(on_nvme, world_size=8)
    assert refused.gpu.verdict == "tight"
    assert any(
        note.startswith("not modelled: zero_hpz_partition_size with offload_param on NVMe") for note in refused.notes
    )
