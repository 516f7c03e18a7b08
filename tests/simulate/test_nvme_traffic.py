"""What a step moves to and from the NVMe, and what it keeps in host memory for that: the formulas and the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.formula_case import cut_layers
from zplan.catalog.find import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import estimate_memory
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.simulate.client import WorkerClient
from zplan.simulate.report import SimulationReport
from zplan.simulate.request import SimulationRequest
from zplan.speed.offload import nvme_bytes
from zplan.speed.work import work_of
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

GIB = 1 << 30
ON_DRIVE = {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 20, "buffer_size": 300_000_000}


@pytest.mark.parametrize(
    ("recipe", "states", "param"),
    [
        ({}, "nvme", None),
        ({}, "nvme", {"max_in_cpu": 0}),
        ({}, "cpu", {"max_in_cpu": 128_256 * 2048 // 2}),
        ({"method": "lora"}, "none", {"max_in_cpu": 10**9}),
    ],
    ids=["optimizer", "nothing kept", "the embedding kept", "frozen weights"],
)
def test_a_step_s_traffic_and_host_memory(
    worker: WorkerClient, recipe: dict[str, Any], states: Any, param: dict[str, Any] | None
) -> None:
    found = find_model("llama-3.2-1b")
    assert isinstance(found, ModelShape)
    shape = cut_layers(found, 2)
    zero = ZeroConfig(
        stage=3, sub_group_size=10_000_000, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0,
        offload_optimizer=OffloadOptimizer(device=states, nvme_path="/nvme"),
        offload_param=OffloadParam() if param is None else OffloadParam(**ON_DRIVE, **param),  # type: ignore[arg-type]
    )  # fmt: skip
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, world_size=2)
    request = SimulationRequest(
        config=shape.config, recipe=Recipe(model="any", train_batch_size=4, max_length=128, **recipe),
        choice=Choice(zero=zero, batch=batch, gradient_checkpointing=False),
        cluster=Cluster(
            gpu=Gpu(name="card", total_bytes=80 * GIB, free_bytes=80 * GIB),
            host=Host(total_bytes=1024 * GIB, available_bytes=1024 * GIB), gpus_per_node=2,
        ),
        steps=2,
    )  # fmt: skip
    two, three = worker.ask(request), worker.ask(replace(request, steps=3))
    expected = nvme_bytes(work_of(shape, request.recipe), request.recipe, request.choice)
    assert moved(three) - moved(two) == pytest.approx(expected, rel=0.02)
    estimate = estimate_memory(shape, request.recipe, request.choice, request.cluster)
    held = 2 * (two.host_phases["forward"] + two.pinned_phases["forward"])
    steady = sum(t.bytes for t in estimate.host.terms if "forward" in t.phases and t.name != "processes")
    assert steady == pytest.approx(held, rel=1e-3)


def moved(report: SimulationReport) -> int:
    return report.nvme_read_bytes + report.nvme_written_bytes
