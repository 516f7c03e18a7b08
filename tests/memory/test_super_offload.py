"""SuperOffload: worked numbers of what its processes hold, what goes to shared memory, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.memory.test_estimate import SHAPE, cluster
from zplan.hardware import Cluster
from zplan.memory.estimate import estimate_memory
from zplan.memory.host import PROCESS_CUDA
from zplan.memory.runtime import CUDA_CONTEXT
from zplan.memory.terms import MemoryEstimate
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig

RANKS = 2
PARTS = [-(-parameter.numel // RANKS) for _, parameter in SHAPE.parameters()]


MATRICES = sum(-(-parameter.numel // RANKS) for _, parameter in SHAPE.parameters() if parameter.kind != "norm")
"""The group with weight decay, one sub-group unless it is cut."""


def estimate(
    on: Cluster | None = None, optimizer: Any = "adamw", sub_groups: int = 10**9, **states: Any
) -> MemoryEstimate:
    offload = OffloadOptimizer(**{"device": "cpu", "super_offload": True, "nvme_path": "/nvme", **states})
    zero = ZeroConfig(stage=3, offload_optimizer=offload, sub_group_size=sub_groups)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=RANKS)
    recipe = Recipe(model="m", train_batch_size=RANKS, max_length=128, optimizer=optimizer)
    return estimate_memory(SHAPE, recipe, Choice(zero=zero, batch=batch), on or cluster(RANKS))


def test_the_process_holds_a_copy_of_the_largest_sub_group_s_gradient_and_the_libraries() -> None:
    without = estimate(super_offload=False, pin_memory=False)
    for sub_groups, largest in ((10**9, MATRICES), (1, max(PARTS))):
        found = estimate(sub_groups=sub_groups, pin_memory=False)
        more = found.host.phases["step"] - without.host.phases["step"]
        assert more == RANKS * (PROCESS_CUDA + 4 * largest)
        assert found.gpu.phases == estimate(super_offload=False, sub_groups=sub_groups).gpu.phases


def test_pinned_gradients_leave_a_block_that_is_never_given_back() -> None:
    pinned, plain = estimate(), estimate(pin_memory=False)
    init, step = (pinned.host.phases[phase] - plain.host.phases[phase] for phase in ("init", "step"))
    assert step == RANKS * 4 * sum(PARTS)
    more = pinned.host.pinned_bytes - estimate(super_offload=False).host.pinned_bytes
    assert more == RANKS * 4 * (MATRICES + sum(PARTS))
    usual = estimate(super_offload=False), estimate(super_offload=False, pin_memory=False)
    assert init == usual[0].host.phases["init"] - usual[1].host.phases["init"]


def test_masters_and_gradients_lie_in_shared_memory_which_has_to_hold_them() -> None:
    needed = RANKS * 8 * sum(PARTS)
    one = cluster(RANKS)
    short = estimate(replace(one, host=replace(one.host, shm_bytes=needed - 1)))
    assert short.host.verdict == "does_not_fit"
    assert any("/dev/shm allows" in note and "docker run --shm-size" in note for note in short.notes)
    assert estimate(replace(one, host=replace(one.host, shm_bytes=2 * needed + (1 << 30)))).host.verdict == "fits"
    assert estimate(replace(one, host=replace(one.host, shm_bytes=1)), super_offload=False).host.verdict == "tight"


def test_every_process_that_pins_has_a_context_on_the_first_gpu() -> None:
    pinned, plain = estimate(), estimate(pin_memory=False)
    assert pinned.gpu.used.expected - plain.gpu.used.expected == RANKS * CUDA_CONTEXT.expected
    assert pinned.gpu.used.low == plain.gpu.used.low
    assert pinned.gpu.phases == plain.gpu.phases


def test_super_offload_is_modelled_and_fits() -> None:
    found = estimate()
    assert not [note for note in found.notes if "super_offload" in note]
    assert found.gpu.verdict == "fits"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"on": cluster(RANKS, kind="cpu")}, "NVIDIA GPUs"),
        ({"optimizer": "sgd"}, "DeepSpeedCPUAdam"),
        ({"optimizer": "muon"}, "DeepSpeedCPUAdam"),
        ({"device": "nvme"}, "no swapping"),
    ],
)
def test_where_the_engine_fails_it_never_fits(options: dict[str, Any], why: str) -> None:
    found = estimate(**options)
    assert any("super_offload" in note and why in note for note in found.notes)
    assert found.gpu.verdict != "fits"
