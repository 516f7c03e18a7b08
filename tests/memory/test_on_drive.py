"""Parameters on the NVMe: what of them is in host memory all the same."""

from __future__ import annotations

from typing import Any

from benchmarks.formula_case import cut_layers
from zplan.catalog.find import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import estimate_memory
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadParam, ZeroConfig

GIB = 1 << 30
EMBEDDING = 128_256 * 2048
RANKS = 2


def host_terms(recipe: dict[str, Any], *, sub_group_size: int = 10**9, max_in_cpu: int = 10**9) -> dict[str, int]:
    """Bytes of a node of two ranks, two layers of Llama 3.2 1B."""
    shape = find_model("llama-3.2-1b")
    assert isinstance(shape, ModelShape)
    param = OffloadParam(
        device="nvme", nvme_path="/nvme", buffer_count=1, buffer_size=1 << 28, max_in_cpu=max_in_cpu
    )  # fmt: skip
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=RANKS)
    cluster = Cluster(
        gpu=Gpu(name="card", total_bytes=80 * GIB, free_bytes=80 * GIB),
        host=Host(total_bytes=512 * GIB, available_bytes=512 * GIB), gpus_per_node=RANKS,
    )  # fmt: skip
    asked = Recipe(model="any", train_batch_size=RANKS, max_length=128, **recipe)
    zero = ZeroConfig(stage=3, offload_param=param, sub_group_size=sub_group_size)
    found = estimate_memory(cut_layers(shape, 2), asked, Choice(zero=zero, batch=batch), cluster)
    return {term.name: term.bytes for term in found.host.terms}


def test_updated_parameters_are_written_from_whole_ones_of_the_largest_sub_group() -> None:
    """DeepSpeed takes ds_numel, not the partition's, for that buffer: no number of ranks makes it smaller."""
    terms = host_terms({}, sub_group_size=10_000_000, max_in_cpu=0)
    assert terms["buffers of updated parameters"] == RANKS * 2 * EMBEDDING
    assert terms["parameter swap buffers"] == RANKS * 2 * (1 << 28)


def test_what_is_kept_on_the_host_is_not_written() -> None:
    terms = host_terms({})
    assert "buffers of updated parameters" not in terms
    assert terms["trained parameters kept on the host"] == 2 * 384_313_344


def test_frozen_parameters_are_never_kept_on_the_host() -> None:
    terms = host_terms({"method": "lora", "lora_r": 16})
    assert terms["trained parameters kept on the host"] == 2 * 2 * 16 * (2 * 4096 + 2 * 2560 + 3 * 10_240)
