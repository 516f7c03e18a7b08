"""What is whole on a GPU while a ZeRO-3 model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.shapes import described_cluster
from zplan.catalog.find import find_model
from zplan.memory.estimate import estimate_memory
from zplan.memory.loading import beside_adapters_bytes, gathered, uncut_adapters_bytes, whole_bytes
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig

MISTRAL = find_model("mistral-7b")
EMBEDDING, PROJECTION = 32000 * 4096, 4096 * 14336
TIED = find_model("llama-3.2-1b")
TIED_EMBEDDING = 128256 * 2048


def of(shape: ModelShape = MISTRAL, **recipe: Any) -> Layout:
    return layout(shape, Recipe(model=shape.name, **recipe))


def test_an_mlp_is_whole_at_once_a_head_alone() -> None:
    sets = gathered(of())
    assert sets.together == 3 * PROJECTION
    assert sets.alone == EMBEDDING
    assert sets.head == 0


def test_embeddings_are_gathered_with_the_final_norm() -> None:
    """Children of one module; more than the MLP of a small model."""
    assert gathered(of(TIED)).together == TIED_EMBEDDING + 2048


def test_experts_of_a_layer_are_whole_together_with_their_router() -> None:
    up, down = 8 * 28672 * 4096, 8 * 4096 * 14336
    sets = gathered(of(find_model("mixtral-8x7b")))
    assert sets.together == up + down + 8 * 4096
    assert sets.made == up


@pytest.mark.parametrize(("offloads", "expected"), [(False, 3 * PROJECTION), (True, 3 * PROJECTION * 3 // 2)])
def test_a_partition_of_the_host_comes_to_the_gpu_too(offloads: bool, expected: int) -> None:
    assert whole_bytes(of(), 2, 2, offloads_param=offloads) == 2 * expected


def test_a_head_is_cut_before_it_is_tied() -> None:
    tied = whole_bytes(of(TIED), 2, 8, offloads_param=False)
    assert tied == 2 * (TIED_EMBEDDING + 2048 + TIED_EMBEDDING // 8)
    in_hpz = whole_bytes(of(TIED), 2, 8, offloads_param=False, secondary_ranks=4)
    assert in_hpz - tied == 2 * TIED_EMBEDDING // 4


def test_one_rank_copies_only_a_parameter_that_is_gathered_alone() -> None:
    assert whole_bytes(of(), 2, 1, offloads_param=False) == 2 * EMBEDDING
    assert whole_bytes(of(), 2, 1, offloads_param=True) == 2 * max(3 * PROJECTION, 2 * EMBEDDING)


def test_adapters_are_whole_and_a_module_to_save_is_gathered_while_it_is_copied() -> None:
    recipe = Recipe(model="mistral-7b", method="lora")
    plain, saved = of(method="lora"), of(method="lora", modules_to_save=("lm_head",))
    assert uncut_adapters_bytes(plain, recipe, 0, offloads_param=True) == 2 * plain.trainable_numel
    assert uncut_adapters_bytes(plain, recipe, 100, offloads_param=False) == 2 * (plain.trainable_numel - 100)
    assert saved.trainable_numel - plain.trainable_numel == EMBEDDING
    assert (beside_adapters_bytes(plain, recipe), beside_adapters_bytes(saved, recipe)) == (0, 2 * EMBEDDING)


def test_dora_takes_the_norm_of_a_gathered_weight() -> None:
    recipe = Recipe(model="mistral-7b", method="lora", use_dora=True)
    assert beside_adapters_bytes(of(method="lora", use_dora=True), recipe) == 2 * 4 * PROJECTION


@pytest.mark.parametrize("more", [{"modules_to_save": ("lm_head",)}, {"use_dora": True}])
def test_what_is_gathered_for_adapters_is_gone_when_the_engine_is_built(more: dict[str, Any]) -> None:
    recipe = Recipe(model="mistral-7b", method="lora", train_batch_size=8, **more)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=8)
    zero = ZeroConfig(stage=3, reduce_bucket_size=1, offload_optimizer=OffloadOptimizer(device="cpu"))
    phases = estimate_memory(MISTRAL, recipe, Choice(zero=zero, batch=batch), described_cluster()).gpu.phases
    assert phases["load"] - phases["init"] >= 2 * EMBEDDING // 2
