"""The order of a layer's modules, and what the update takes beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.memory.choices import FULL_ON_SMOLLM, SMOLLM, shape_of
from tests.shapes import described_cluster
from zplan.catalog.find import find_model
from zplan.memory.blocks import is_parallel
from zplan.memory.estimate import estimate_memory, largest_of_model
from zplan.memory.instances import instances
from zplan.memory.states import step_temporary_bytes
from zplan.memory.sub_groups import unswapped_bytes
from zplan.memory.trainable import layout
from zplan.model_shape import ModelShape
from zplan.recipe import Optimizer, Recipe
from zplan.zero_config import BatchSizes, Choice, ZeroConfig

RANKS = 2
NOTHING_STAYS = {
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "parallel"), [("phi-3-mini", False), ("phi-4", False), ("gpt-j-6b", True), ("falcon-7b", True)]
)
def test_an_mlp_runs_beside_the_attention_in_families_that_say_so(model: str, parallel: bool) -> None:
    """Phi-3 is named after Phi and is no such family (transformers 5.23.0, modeling_phi3.py, Phi3DecoderLayer)."""
    assert is_parallel(shape_of(model)) is parallel


def test_sgd_adds_gradients_in_place() -> None:
    assert step_temporary_bytes("sgd", 1000) == 0


def test_an_optimizer_without_states_leaves_the_first_forward_the_largest_under_hpz() -> None:
    """The first step has second copies of all weights from loading on, and no states yet."""

    def forward_bytes(optimizer: Optimizer, group: int) -> int:
        recipe = replace(FULL_ON_SMOLLM, optimizer=optimizer, train_batch_size=RANKS)
        batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=RANKS)
        zero = ZeroConfig(stage=3, zero_hpz_partition_size=group, **NOTHING_STAYS)  # type: ignore[arg-type]
        choice = Choice(zero=zero, batch=batch)
        return estimate_memory(SMOLLM, recipe, choice, described_cluster(gpus_per_node=RANKS)).gpu.phases["forward"]

    copies, states = 2 * SMOLLM.num_parameters // RANKS, 8 * SMOLLM.num_parameters // RANKS
    assert forward_bytes("sgd", 2) - forward_bytes("sgd", 1) >= copies
    assert states > copies  # so that a first step with AdamW's states taken off would be none to look at


def test_scores_of_the_math_kernel_count_among_the_largest_tensors() -> None:
    """Grouped queries in fp32 under sdpa: B H S^2 in fp32 come and go, and the allocator may need room for two."""
    shape = replace(SMOLLM, num_attention_heads=9, num_key_value_heads=3)
    batch = BatchSizes(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1, world_size=1)
    choice = Choice(zero=ZeroConfig(), batch=batch)
    grouped = replace(FULL_ON_SMOLLM, dtype="fp32")
    scores = 4 * 2 * 9 * 512**2

    def largest(shape: ModelShape, recipe: Recipe) -> int:
        return largest_of_model(shape, layout(shape, recipe), recipe, choice)

    assert largest(shape, grouped) - largest(replace(shape, num_key_value_heads=9), grouped) == scores
    assert largest(shape, replace(grouped, attention="eager")) == largest(shape, grouped)


def test_experts_with_their_adapter_folded_in_count_among_the_largest_tensors() -> None:
    """PEFT makes all experts' weights anew with the adapter in them: 128 x 1536 x 2048 of them in bf16."""
    shape = find_model("qwen3-30b-a3b")
    assert isinstance(shape, ModelShape)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=1)
    choice = Choice(zero=ZeroConfig(), batch=batch)

    def largest(target: str) -> int:
        recipe = Recipe(model="qwen3-30b-a3b", train_batch_size=1, max_length=512, method="lora", lora_target=(target,))
        return largest_of_model(shape, layout(shape, recipe), recipe, choice)

    assert largest("all-linear") - largest("q_proj") == 2 * 128 * 1536 * 2048


@pytest.mark.parametrize(("ranks", "kept_numel"), [(3, 0), (5, 5_662_311), (8, 0)])
def test_a_gradient_whose_end_is_not_written_to_the_nvme_stays_whole(ranks: int, kept_numel: int) -> None:
    """DeepSpeed keeps the end, less than 256 elements, as a view of all."""
    items = instances(layout(SMOLLM, FULL_ON_SMOLLM))
    table = 49_152 * 576
    assert items.numel[0] == table
    assert -(-table // 5) == 5_662_311
    assert unswapped_bytes(items, (0,), ranks) == 4 * kept_numel
