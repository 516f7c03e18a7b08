"""Any choice that the engine takes, and the models that they are asked about."""

from __future__ import annotations

from hypothesis import strategies as st

from zplan.catalog import find_model
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig


def shape_of(name: str) -> ModelShape:
    shape = find_model(name)
    assert isinstance(shape, ModelShape)
    return shape


SMOLLM, GPT2 = shape_of("smollm2-135m"), shape_of("gpt2")
FULL_ON_SMOLLM = Recipe(model="smollm2-135m", train_batch_size=64, max_length=512)
LORA_ON_SMOLLM = Recipe(model="smollm2-135m", train_batch_size=64, max_length=512, method="lora", lora_r=8)
BATCH = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, world_size=4)

_ELEMENTS = st.integers(1, 30).map(lambda power: 2**power - 1)
_DEVICES = st.sampled_from(("none", "cpu", "nvme"))


def zero_configs() -> st.SearchStrategy[ZeroConfig]:
    """Every key that changes bytes, over its whole range."""
    optimizer = st.builds(
        OffloadOptimizer, device=_DEVICES, buffer_count=st.integers(1, 8), pin_memory=st.booleans(),
        ratio=st.sampled_from((0.3, 1.0)), super_offload=st.booleans(),
    )  # fmt: skip
    param = st.builds(
        OffloadParam, device=_DEVICES, buffer_count=st.integers(1, 8), buffer_size=_ELEMENTS, max_in_cpu=_ELEMENTS,
        pin_memory=st.booleans(),
    )  # fmt: skip
    return st.builds(
        ZeroConfig, stage=st.sampled_from((0, 1, 2, 3)), contiguous_gradients=st.booleans(),
        reduce_scatter=st.booleans(), reduce_bucket_size=_ELEMENTS, allgather_bucket_size=_ELEMENTS,
        overlap_comm=st.sampled_from((None, True, False)), round_robin_gradients=st.booleans(),
        offload_optimizer=optimizer, offload_param=param, sub_group_size=_ELEMENTS,
        stage3_prefetch_bucket_size=st.just(0) | _ELEMENTS, stage3_param_persistence_threshold=_ELEMENTS,
        stage3_model_persistence_threshold=st.just(2**40) | _ELEMENTS, stage3_max_live_parameters=_ELEMENTS,
        stage3_max_reuse_distance=_ELEMENTS, stage3_allgather_sequential=st.booleans(),
        zero_hpz_partition_size=st.sampled_from((1, 2)), zero_quantized_weights=st.booleans(),
    )  # fmt: skip


def choices() -> st.SearchStrategy[Choice]:
    """Every way to fill in the choice, sizes that do not divide included."""

    def batch(micro_batch: int, accumulation: int, groups: int, shared: int) -> BatchSizes:
        return BatchSizes(
            train_micro_batch_size_per_gpu=micro_batch, gradient_accumulation_steps=accumulation,
            world_size=groups * shared, sequence_parallel_size=shared,
        )  # fmt: skip

    batches = st.builds(batch, st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.sampled_from((1, 1, 3)))
    return st.builds(Choice, zero=zero_configs(), batch=batches, gradient_checkpointing=st.booleans())
