"""Ranks that hold one copy of a model together (AutoTP): worked numbers of their parts, and what is not modelled."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest

from tests.memory.choices import shape_of
from tests.memory.test_estimate import cluster
from zplan.autotp import PLANNED, cut_shape, refuse_uncut_loss
from zplan.errors import ConfigError
from zplan.memory.estimate import estimate_memory
from zplan.memory.least import cannot_fit
from zplan.memory.terms import MemoryEstimate
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig

MISTRAL, QWEN = shape_of("mistral-7b"), shape_of("qwen2.5-7b")
HIDDEN, MIDDLE, KV, VOCABULARY, LAYERS = 4096, 14336, 1024, 32000, 32
MATRICES = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * MIDDLE * HIDDEN) + VOCABULARY * HIDDEN
WHOLE = VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
"""Embedding and norms."""
FULL = Recipe(model="mistral-7b", train_batch_size=8, max_length=1024, loss="full")


def estimate(zero: ZeroConfig, autotp_size: int, *, world_size: int = 8, shape: Any = MISTRAL, **recipe: Any) -> Any:
    choice = chosen(zero, autotp_size, world_size)
    made = replace(FULL, train_batch_size=choice.batch.train_batch_size, **recipe)
    return estimate_memory(shape, made, choice, cluster(world_size), rank=0)


def chosen(zero: ZeroConfig, autotp_size: int, world_size: int) -> Choice:
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=world_size, autotp_size=autotp_size
    )
    return Choice(zero=zero, batch=batch)


def term(found: MemoryEstimate, name: str, phase: str) -> int:
    return sum(item.bytes for item in found.gpu.terms if item.name == name and phase in item.phases)


@pytest.mark.parametrize("autotp_size", [2, 4, 8])
def test_a_rank_holds_its_part_of_the_matrices_and_the_head_and_all_of_the_rest(autotp_size: int) -> None:
    assert cut_shape(MISTRAL, autotp_size).num_parameters == MATRICES // autotp_size + WHOLE


def test_biases_of_rows_are_cut_and_those_of_columns_are_whole() -> None:
    cut = {name: parameter.shape for name, parameter in cut_shape(QWEN, 4).parameters()}
    assert cut["model.layers.0.self_attn.q_proj.bias"] == (3584 // 4,)
    assert cut["model.layers.0.self_attn.k_proj.weight"] == (512 // 4, 3584)
    assert cut["model.layers.0.mlp.down_proj.weight"] == (3584, 18944 // 4)
    assert cut["model.embed_tokens.weight"] == (152064, 3584)


def test_zero_cuts_the_part_over_the_ranks_that_are_left() -> None:
    numel = MATRICES // 4 + WHOLE
    found = estimate(ZeroConfig(stage=1), 4)
    groups = [numel - (2 * LAYERS + 1) * HIDDEN, (2 * LAYERS + 1) * HIDDEN]  # decayed, and norms
    partition = sum(ceil(group / (2 * 2)) * 2 for group in groups)
    assert term(found, "master weights", "step") == 4 * partition
    assert term(estimate(ZeroConfig(stage=0), 4), "optimizer states", "step") == 8 * numel + 4  # and Adam's step


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_more_ranks_to_a_copy_never_cost_activations(stage: int) -> None:
    zero = ZeroConfig(stage=stage)  # type: ignore[arg-type]
    kept = [term(estimate(zero, n), "activations", "forward") for n in (1, 2, 4, 8)]
    assert kept == sorted(kept, reverse=True)


def test_offloaded_states_of_a_node_are_those_of_all_its_ranks() -> None:
    zero = ZeroConfig(stage=2, offload_optimizer=OffloadOptimizer(device="cpu", pin_memory=False))

    def on_host(autotp_size: int) -> int:
        terms = estimate(zero, autotp_size).host.terms
        return sum(item.bytes for item in terms if item.name == "offloaded optimizer")

    masters_gradients_and_copies = 4 + 4 + 2
    assert on_host(2) - on_host(1) == masters_gradients_and_copies * WHOLE  # which each rank of a copy has for itself


def test_what_is_not_modelled_is_said_and_never_fits() -> None:
    tiny = ZeroConfig(stage=2, reduce_bucket_size=1000)
    for found in (
        estimate(ZeroConfig(stage=3), 2),
        estimate(tiny, 2, method="lora"),
        estimate(tiny, 2, shape=shape_of("phi-3-mini")),
        estimate(tiny, 2, shape=shape_of("gpt2")),
    ):
        assert any(note.startswith("not modelled: AutoTP") for note in found.notes)
        assert found.gpu.verdict != "fits"
    assert not any("AutoTP" in note for note in estimate(tiny, 2).notes)
    assert "phi3" not in PLANNED
    tied = replace(shape_of("granite-3-2b"), vocab_size=49155)  # odd, but such a head is whole
    assert not any("AutoTP" in note for note in estimate(tiny, 2, shape=tied).notes)
    untied = replace(MISTRAL, vocab_size=32001)
    assert any("uneven parts" in note for note in estimate(tiny, 2, shape=untied).notes)


def test_what_cannot_fit_is_asked_of_the_part() -> None:
    choice, roomy = chosen(ZeroConfig(stage=0), 8, 8), cluster(8)
    recipe = replace(FULL, train_batch_size=1)
    assert not cannot_fit(MISTRAL, recipe, choice, roomy)
    assert cannot_fit(MISTRAL, replace(FULL, train_batch_size=8), chosen(ZeroConfig(stage=0), 1, 8), roomy)


def test_a_loss_that_reads_a_cut_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="scores no other words") as caught:
        refuse_uncut_loss(MISTRAL, replace(FULL, loss="nll"), 2)
    assert caught.value.fix == "--loss full"
    refuse_uncut_loss(MISTRAL, FULL, 2)
    refuse_uncut_loss(shape_of("llama-3.2-1b"), replace(FULL, loss="nll"), 2)  # tied: the head is whole
    refuse_uncut_loss(MISTRAL, replace(FULL, loss="nll"), 1)
