"""ZeRO-1 and 2 on a GPU that has no room for two copies of the weights: DeepSpeed flattens them on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.formula_case import cut_layers
from zplan.catalog.find import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import estimate_memory
from zplan.memory.outside import outside_allocator
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.simulate.client import WorkerClient
from zplan.simulate.request import SimulationRequest
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig

GIB = 1 << 30
RANKS = 2


def question(card_bytes: int, *, stage: int, offload: str) -> tuple[ModelShape, SimulationRequest]:
    """Two layers of Mistral 7B; DeepSpeed's two groups are the matrices and the norms."""
    found = find_model("mistral-7b")
    assert isinstance(found, ModelShape)
    shape = cut_layers(found, 2)
    states: Any = OffloadOptimizer(device=offload)  # type: ignore[arg-type]
    zero = ZeroConfig(stage=stage, offload_optimizer=states, reduce_bucket_size=5_000_000)  # type: ignore[arg-type]
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=RANKS)
    choice = Choice(zero=zero, batch=batch, gradient_checkpointing=True)
    cluster = Cluster(
        gpu=Gpu(name="card", total_bytes=card_bytes, free_bytes=card_bytes),
        host=Host(total_bytes=64 * GIB, available_bytes=64 * GIB), gpus_per_node=RANKS,
    )  # fmt: skip
    recipe = Recipe(model="any", train_batch_size=RANKS, max_length=128)
    return shape, SimulationRequest(config=shape.config, recipe=recipe, choice=choice, cluster=cluster, steps=2)


@pytest.mark.parametrize(("stage", "offload"), [(1, "cpu"), (2, "cpu"), (2, "none")])
def test_the_formula_says_what_deepspeed_does(worker: WorkerClient, stage: int, offload: str) -> None:
    shape, large = question(80 * GIB, stage=stage, offload=offload)
    weights = 2 * shape.num_parameters
    small = replace(large.cluster.gpu, total_bytes=int(1.6 * weights) + GIB, free_bytes=int(1.6 * weights) + GIB)
    peaks = {}
    for request in (large, replace(large, cluster=replace(large.cluster, gpu=small))):
        simulated = worker.ask(request)
        said = estimate_memory(shape, request.recipe, request.choice, request.cluster, rank=0)
        for phase in ("init", "forward", "backward", "step"):
            assert said.gpu.phases[phase] == pytest.approx(simulated.allocated_phases[phase], rel=0.005), phase  # type: ignore[index]
        peaks[request.cluster.gpu.total_bytes] = simulated
    on_large, on_small = peaks.values()
    assert (on_large.allocated_phases["init"] > on_small.allocated_phases["init"]) == (offload == "cpu")
    assert on_small.host_phases["init"] == pytest.approx(2 * weights, rel=0.001)
    assert said.host.phases["init"] >= RANKS * 2 * weights


def test_it_is_flattened_on_the_gpu_as_long_as_that_has_room() -> None:
    shape, request = question(80 * GIB, stage=2, offload="cpu")
    outside = outside_allocator(request.choice, request.cluster).expected

    def init(free_bytes: int) -> int:
        gpu = replace(request.cluster.gpu, free_bytes=free_bytes)
        return estimate_memory(shape, request.recipe, request.choice, replace(request.cluster, gpu=gpu)).gpu.phases[
            "init"
        ]

    numel = shape.num_parameters - 5 * 4096  # of the matrices
    enough = outside + 2 * shape.num_parameters + 2 * numel
    assert init(enough) - init(enough - 1) == 2 * numel - 2 * numel // RANKS
