"""A warm worker that all simulation tests share, and questions small enough for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from zplan.hardware import Cluster, DeviceKind, Gpu, Host
from zplan.recipe import Recipe
from zplan.simulate.client import WorkerClient
from zplan.simulate.request import SimulationRequest
from zplan.zero_config import BatchSizes, Choice, ZeroConfig

GIB = 1 << 30
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY_NUMEL = 2 * 512 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64
"""Embedding and head, two layers (q, o; k, v; three MLP matrices; two norms), the last norm."""


@pytest.fixture(scope="session")
def worker() -> Iterator[WorkerClient]:
    with WorkerClient() as client:
        yield client


def question(
    stage: int, *, world_size: int = 4, kind: DeviceKind = "cuda", card_bytes: int = 80 * GIB, accumulation: int = 1,
    shared: int = 1, cut: int = 1, zero: dict[str, Any] | None = None, config: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None, **more: Any,
) -> SimulationRequest:  # fmt: skip
    """One question about a model of 0.1 M parameters, with buckets to match."""
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=accumulation, world_size=world_size,
        sequence_parallel_size=shared, autotp_size=cut,
    )  # fmt: skip
    sizes = {"reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000, **(zero or {})}
    return SimulationRequest(
        config=config or TINY_LLAMA,
        recipe=Recipe(model="tiny", max_length=64, train_batch_size=batch.train_batch_size, **(recipe or {})),
        choice=Choice(zero=ZeroConfig(stage=stage, **sizes), batch=batch),  # type: ignore[arg-type]
        cluster=Cluster(
            gpu=Gpu(name="card", kind=kind, total_bytes=card_bytes, free_bytes=card_bytes),
            host=Host(total_bytes=64 * GIB, available_bytes=64 * GIB),
            gpus_per_node=world_size,
        ),
        **more,
    )
