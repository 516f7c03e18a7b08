"""What a GPU holds outside its allocator."""

from __future__ import annotations

from typing import Any

import pytest

from tests.memory.test_estimate import cluster
from zplan.memory.outside import num_communicators, outside_allocator
from zplan.memory.runtime import CUDA_CONTEXT, NCCL_COMMUNICATOR
from zplan.zero_config import BatchSizes, Choice, ZeroConfig


def choice(stage: int, world_size: int = 8, *, parallel: dict[str, int] | None = None, **zero: Any) -> Choice:
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=world_size, **(parallel or {})
    )
    return Choice(zero=ZeroConfig(stage=stage, **zero), batch=batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        (choice(2, 1), 0),
        (choice(2), 1 + 1),  # all ranks, and ZeRO's clone of the group
        (choice(3), 1),
        (choice(3, zero_hpz_partition_size=8), 1 + 1),
        (choice(2, zero_hpz_partition_size=8), 1 + 1),  # hpZ does nothing below stage 3
        (choice(3, zero_quantized_gradients=True), 1),  # within a node
        (choice(3, 16, zero_quantized_gradients=True), 1 + 2),
        (choice(1, parallel={"sequence_parallel_size": 2}), 1 + 1 + 1),
        (choice(3, parallel={"sequence_parallel_size": 2}), 1 + 1),
        (choice(2, parallel={"autotp_size": 2}), 1 + 1 + 1),
        (choice(2, parallel={"autotp_size": 8}), 1 + 1),  # nobody holds the same part
    ],
)
def test_every_group_that_exchanges_has_a_communicator(asked: Choice, count: int) -> None:
    assert num_communicators(asked, gpus_per_node=8) == count
    outside = outside_allocator(asked, cluster(8))
    assert outside.expected - CUDA_CONTEXT.expected == count * NCCL_COMMUNICATOR.expected
    assert outside.high - CUDA_CONTEXT.high == count * NCCL_COMMUNICATOR.high


def test_cpu_ranks_have_neither() -> None:
    assert outside_allocator(choice(2), cluster(8, kind="cpu")).high == 0
