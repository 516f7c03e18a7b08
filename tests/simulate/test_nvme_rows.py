"""A row of the table with parameters on NVMe, run by the installed engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.estimate_speed import CLUSTER
from benchmarks.formula_case import cut_layers
from zplan.backends.simulated import simulate
from zplan.catalog.find import find_model
from zplan.model_shape import ModelShape
from zplan.planner import Fixed, rank_candidates
from zplan.recipe import Recipe
from zplan.simulate.report import SimulationError
from zplan.zero_config import OffloadParam


def test_a_row_runs_with_its_buffers_and_stops_with_deepspeed_s_own_count() -> None:
    found = find_model("llama-3.2-1b")
    assert isinstance(found, ModelShape)
    shape = cut_layers(found, 2)
    recipe = Recipe(model="llama-3.2-1b", train_batch_size=2, max_length=128, method="lora")
    cluster = replace(CLUSTER, gpus_per_node=2)
    fixed = Fixed(offload_optimizer="nvme", offload_param="nvme", world_size=2, gradient_checkpointing=True)
    (row,) = rank_candidates(shape, recipe, cluster, fixed=fixed)
    assert simulate(shape, recipe, row.choice, cluster, steps=2).gpu_allocated_bytes
    few = replace(row.choice.zero.offload_param, buffer_count=OffloadParam().buffer_count)
    stops = replace(row.choice, zero=replace(row.choice.zero, offload_param=few))
    with pytest.raises(SimulationError, match="Not enough buffers"):
        simulate(shape, recipe, stops, cluster, steps=2)
