"""Every option that the tool promises to explain, in words and in bytes."""

from __future__ import annotations

import pytest

from tests.shapes import described_cluster, llama_like
from zplan.autotp import cut_shape
from zplan.errors import ConfigError
from zplan.explain import TOPICS, Explanation, explain
from zplan.planner import Fixed, make_choice
from zplan.recipe import Recipe

SHAPE = llama_like(hidden_size=512, num_hidden_layers=4, vocab_size=8000)
RECIPE = Recipe(model="m", max_length=512, train_batch_size=16)
CLUSTER = described_cluster(gpus_per_node=4, nvme=True)
PROMISED = (
    "overlap_comm", "allgather_bucket_size", "reduce_bucket_size", "round_robin_gradients", "offload_optimizer",
    "offload_param", "pin_memory", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "contiguous_gradients", "gradient_checkpointing", "sliding_window",
    "tensor_parallel", "sequence_parallel_size", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_gradients",
)  # fmt: skip


def ask(key: str, stage: int = 2) -> Explanation:
    choice = make_choice(SHAPE, RECIPE, CLUSTER, fixed=Fixed(stage=stage))
    return explain(key, SHAPE, RECIPE, choice, CLUSTER)


@pytest.mark.parametrize("key", PROMISED)
def test_each_option_has_two_or_three_sentences_and_its_effects(key: str) -> None:
    explanation = ask(key)
    assert 2 <= len(explanation.text.split(". ")) <= 3 or "(stage 3 only" in explanation.text
    assert explanation.effects


def test_nothing_is_explained_that_was_not_promised() -> None:
    assert set(TOPICS) == set(PROMISED)


def test_recomputation_saves_activations_and_costs_speed() -> None:
    (row,) = ask("gradient_checkpointing").rows
    assert row.phase_bytes < 0
    assert row.tokens_per_second is not None
    assert row.tokens_per_second < 1


def test_a_stage_3_option_says_that_it_is_shown_at_stage_3() -> None:
    assert ask("sub_group_size", stage=2).effects[0].startswith("at stage 3: ")
    assert not ask("sub_group_size", stage=3).effects[0].startswith("at stage")


def test_the_documented_rule_is_named_for_the_buckets() -> None:
    for stage in (1, 2, 3):
        explanation = ask("allgather_bucket_size", stage=stage)
        assert explanation.documented_bound_bytes == (500_000_000 + SHAPE.hidden_size**2) * 2 * 9 // 2
        assert "documented 4.5x bound" in explanation.effects[-1]


def test_an_unprefixed_or_hyphenated_name_is_understood() -> None:
    assert ask("max_live_parameters").key == "stage3_max_live_parameters"
    assert ask("--offload-param").key == "offload_param"
    assert ask("offload_optimizer.pin_memory").key == "pin_memory"


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("sparse attention", "sliding_window"), ("ulysses", "sequence_parallel_size"),
        ("tensor-parallelism", "tensor_parallel"),
        ("activation_checkpointing", "gradient_checkpointing"), ("offload_param.device", "offload_param"),
    ],
)  # fmt: skip
def test_other_words_for_an_option_are_understood(typed: str, key: str) -> None:
    assert ask(typed).key == key


def test_tensor_parallelism_halves_the_matrices_and_the_head_and_nothing_else() -> None:
    cut = cut_shape(SHAPE, 2)
    parts = ("_proj", "lm_head")
    matrices = sum(p.numel for _, p in SHAPE.parameters() if any(part in p.name for part in parts))
    assert SHAPE.num_parameters - cut.num_parameters == matrices // 2
    (row,) = ask("tensor_parallel").rows
    assert row.change == "with loss full, autotp_size=1 -> 2"
    assert row.gpu_bytes < 0
    tied = llama_like(hidden_size=512, num_hidden_layers=4, vocab_size=8000, tie_word_embeddings=True)
    choice = make_choice(tied, RECIPE, CLUSTER, fixed=Fixed(stage=2))
    (row,) = explain("tensor_parallel", tied, RECIPE, choice, CLUSTER).rows
    assert row.change == "autotp_size=1 -> 2"
    odd = llama_like(hidden_size=512, num_hidden_layers=4, vocab_size=8001)
    assert not explain("tensor_parallel", odd, RECIPE, choice, CLUSTER).rows


def test_stored_scores_are_what_sdpa_saves() -> None:
    (row,) = ask("sliding_window").rows  # this model has no window
    assert row.change == "attention=eager -> sdpa"
    assert row.phase_bytes < 0


def test_gathering_to_save_costs_the_host_one_model_where_states_are_there_already() -> None:
    plain, offloaded = ask("stage3_gather_16bit_weights_on_model_save").rows
    assert offloaded.host_phase == "save"
    assert offloaded.host_phase_bytes == 2 * SHAPE.num_parameters
    assert plain.host_phase_bytes <= offloaded.host_phase_bytes


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        ask("overlap_com")
    assert caught.value.fix == "--explain overlap_comm"
