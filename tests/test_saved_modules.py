"""modules_to_save: what PEFT copies trains, and what it copied stays."""

from __future__ import annotations

import pytest

from tests.shapes import llama_like
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.speed.work import work_of

H, VOCABULARY, LAYERS = 64, 512, 2
TABLE = VOCABULARY * H


def laid(shape: ModelShape, *names: str) -> Layout:
    return layout(shape, recipe(*names))


def recipe(*names: str) -> Recipe:
    return Recipe(model="llama-like", method="lora", modules_to_save=names)


@pytest.mark.parametrize(
    ("tied", "names", "copies"),
    [
        (False, ("lm_head",), TABLE),
        (False, ("embed_tokens",), TABLE),
        (False, ("embed_tokens", "lm_head"), 2 * TABLE),
        (True, ("lm_head",), TABLE),
        (True, ("embed_tokens",), TABLE),
        (True, ("embed_tokens", "lm_head"), 2 * TABLE),
        (False, ("norm",), (2 * LAYERS + 1) * H),  # input_layernorm and post_attention_layernorm end in it, too
        (False, ("mlp.norm",), 0),
    ],
)
def test_a_saved_module_trains_as_a_copy_beside_the_frozen_one(tied: bool, names: tuple[str, ...], copies: int) -> None:
    shape = llama_like(tie_word_embeddings=tied)
    without, found = laid(shape), laid(shape, *names)
    assert found.trainable_numel - without.trainable_numel == copies
    assert found.frozen_bytes == without.frozen_bytes
    assert work_of(shape, recipe(*names)).trainable_numel == found.trainable_numel


def test_adapters_leave_out_what_is_saved() -> None:
    shape = llama_like()
    mlp = 3 * 2 * H * H
    adapters = LAYERS * 3 * 16 * 3 * H
    assert laid(shape, "mlp").trainable_numel - laid(shape).trainable_numel == LAYERS * mlp - adapters
    assert laid(shape, "mlp").frozen_bytes == laid(shape).frozen_bytes


@pytest.mark.parametrize(("name", "head_trains"), [("lm_head", True), ("embed_tokens", False)])
def test_a_copy_of_a_tied_module_unties_it(name: str, head_trains: bool) -> None:
    found = laid(llama_like(tie_word_embeddings=True), name)
    trains = {block.block.role: block.weights[0].trainable for block in found.blocks if block.weights[0].numel == TABLE}
    assert trains == {"embedding": not head_trains, "head": head_trains}
