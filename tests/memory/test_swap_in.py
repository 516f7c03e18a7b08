"""Buffers of offload_param on NVMe: refused where DeepSpeed's swapper runs out of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.formula_case import cut_layers
from zplan.catalog.find import find_model
from zplan.errors import ConfigError
from zplan.memory.swap_in import refuse_swapping
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadParam, ZeroConfig


def refusal(model: str, recipe: dict[str, Any], world_size: int = 2, **zero: Any) -> str:
    """Of two layers of a model; empty if DeepSpeed runs."""
    shape = find_model(model)
    assert isinstance(shape, ModelShape)
    of_param = {"buffer_count": 5, "buffer_size": 300_000_000, "max_in_cpu": 10**9} | zero.pop("param", {})
    param = OffloadParam(device="nvme", nvme_path="/nvme", **of_param)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=world_size)
    choice = Choice(zero=ZeroConfig(stage=3, offload_param=param, **zero), batch=batch)
    asked = Recipe(model="any", train_batch_size=world_size, max_length=128, **recipe)
    try:
        refuse_swapping(cut_layers(shape, 2), asked, choice, on_cpu=False)
    except ConfigError as error:
        return str(error)
    return ""


def test_initialising_weights_reads_an_attention_s_four_projections_at_once() -> None:
    line = refusal("llama-3.2-1b", {}, param={"buffer_count": 3})
    assert "4 parameters are read at once where 3 buffers are free" in line
    assert refusal("llama-3.2-1b", {}, param={"buffer_count": 4}) == ""


def test_trained_parameters_within_max_in_cpu_take_no_buffers() -> None:
    assert refusal("llama-3.2-1b", {}) == ""
    line = refusal("llama-3.2-1b", {}, param={"max_in_cpu": 0})
    assert "1 parameters are read at once where 0 buffers are free" in line


def test_what_is_used_again_soon_keeps_its_buffer() -> None:
    """Frozen weights are never moved to the host; two layers and the embedding have 15 large ones."""
    line = refusal("llama-3.2-1b", {"method": "lora"})
    assert line.endswith("--set offload_param.buffer_count=15")
    assert refusal("llama-3.2-1b", {"method": "lora"}, param={"buffer_count": 15}) == ""


def test_all_persistent_parameters_are_read_at_once_behind_an_update() -> None:
    """Two layers of Qwen 2.5 0.5B on one rank: q, o, gate, up, down of each, at most 896 x 4864 elements."""
    of = {"stage3_param_persistence_threshold": 5_000_000, "stage3_max_reuse_distance": 30_000_000}
    line = refusal("qwen2.5-0.5b", {"method": "lora"}, 1, param={"buffer_count": 4}, **of)
    assert "10 parameters are read at once where 4 buffers are free" in line


@pytest.mark.parametrize(("size", "refused"), [(131_334_143, True), (131_334_144, False)])
def test_a_buffer_holds_a_rank_s_part_of_the_largest_parameter(size: int, refused: bool) -> None:
    """128256 x 2048 elements of the embedding over two ranks."""
    found = refusal("llama-3.2-1b", {}, param={"buffer_size": size})
    assert found.endswith("--set offload_param.buffer_size=131334144") is refused
    assert bool(found) is refused
