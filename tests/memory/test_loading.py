"""What is whole on a GPU while a ZeRO-3 model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from zplan.catalog.find import find_model
from zplan.memory.loading import gathered, uncut_adapters_bytes, whole_bytes
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe

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


def test_a_module_to_save_is_gathered_while_it_is_copied() -> None:
    plain, saved = of(method="lora"), of(method="lora", modules_to_save=("lm_head",))
    one, two = (
        uncut_adapters_bytes(laid, Recipe(model="mistral-7b", method="lora"), 0, offloads_param=True)
        for laid in (plain, saved)
    )
    assert one == 2 * plain.trainable_numel
    assert two - one == 2 * 2 * EMBEDDING


def test_dora_takes_the_norm_of_a_gathered_weight() -> None:
    recipe = Recipe(model="mistral-7b", method="lora", use_dora=True)
    laid = of(method="lora", use_dora=True)
    assert uncut_adapters_bytes(laid, recipe, 0, offloads_param=True) == 2 * (laid.trainable_numel + 4 * PROJECTION)
