"""Families: adapters counted as PEFT makes them, layers that are not known named and never called `fits`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.shapes import described_cluster
from zplan.errors import ConfigError
from zplan.job import make_job
from zplan.memory.blocks import is_parallel
from zplan.memory.estimate import estimate_memory
from zplan.memory.experts import clamped_gate
from zplan.memory.families import CHECKED_FAMILIES, WITHOUT_FUSED, WITHOUT_SDPA, leaf_refused
from zplan.memory.layer_modules import LayerModules
from zplan.memory.operations import Modules, Sizes
from zplan.memory.sinks import sink_attention
from zplan.memory.tape import Tape
from zplan.memory.terms import MemoryEstimate
from zplan.memory.trainable import layout
from zplan.model_probe import build_on_meta, shape_of_config
from zplan.model_shape import ModelShape
from zplan.options import Flags
from zplan.recipe import Recipe
from zplan.sanity import refuse_adapters_of_experts
from zplan.zero_config import BatchSizes, Choice, ZeroConfig

TINY: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 128,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "pad_token_id": None,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MIXED = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {
        **EXPERTS, "shared_expert_intermediate_size": 48, "head_dim": 16, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_hidden_layers": 4,
    },
    "glm4_moe": ROUTED,
    "glm4_moe_lite": {**ROUTED, **LATENT},
    "deepseek_v3": {**ROUTED, **LATENT},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def tiny(model_type: str, **more: Any) -> ModelShape:
    return shape_of_config({"model_type": model_type, **TINY, **more}, name=model_type)


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("targets", [("all-linear",), PROJECTIONS])
def test_adapters_of_a_mixture_of_experts_are_those_that_peft_makes(family: str, targets: tuple[str, ...]) -> None:
    config = {"model_type": family, **TINY, **MIXED[family]}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        asked = targets[0] if targets == ("all-linear",) else list(targets)
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules=asked), autocast_adapter_dtype=False)
    made = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    recipe = Recipe(model="tiny", method="lora", lora_r=16, lora_target=targets)
    assert layout(shape_of_config(config, name=family), recipe).trainable_numel == made


@pytest.mark.parametrize("wrapper", ["gemma3", "llama4", "mistral3"])
def test_a_wrapper_is_described_by_what_builds_its_text_tower(wrapper: str) -> None:
    text = {**TINY, "head_dim": 16, **({"num_local_experts": 2} if wrapper == "llama4" else {})}
    text |= {"model_type": "mistral"} if wrapper == "mistral3" else {}
    shape = shape_of_config({"model_type": wrapper, "text_config": text}, name=wrapper)
    assert shape.config["hidden_size"] == 64
    assert build_on_meta(shape.config, name=wrapper).num_parameters() == shape.num_parameters


def test_what_config_json_leaves_out_is_transformers_default_where_a_formula_reads_it() -> None:
    assert tiny("deepseek_v3", **ROUTED, num_key_value_heads=4).config["kv_lora_rank"] == 512
    assert tiny("gemma2").config["final_logit_softcapping"] == 30.0


@pytest.mark.parametrize(
    ("family", "config", "picked", "width"),
    [
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": [2, 2], "head_dim": 16}, 2, 96),
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}, 2, 32),
        ("llama4_text", {"num_local_experts": 4, "head_dim": 16}, 1, 96),
    ],
)
def test_experts_are_found_under_every_familys_names(
    family: str, config: dict[str, Any], picked: int, width: int
) -> None:
    shape = tiny(family, **config)
    assert (shape.num_local_experts, shape.num_experts_per_tok, shape.moe_intermediate_size) == (4, picked, width)


def test_a_size_for_each_layer_is_read_and_the_largest_counts() -> None:
    sizes = {"intermediate_size": [96, 128], "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]}
    shape = tiny("gemma3n_text", **sizes, head_dim=16, vocab_size_per_layer_input=128)
    assert shape.intermediate_size == 128
    with pytest.raises(ConfigError, match="intermediate_size"):
        tiny("llama", intermediate_size=[96, -1])


def estimated(shape: ModelShape, **recipe: Any) -> MemoryEstimate:
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=8)
    values = {"model": "any", "train_batch_size": 8, "max_length": 128, **recipe}
    return estimate_memory(shape, Recipe(**values), Choice(zero=ZeroConfig(stage=2), batch=batch), described_cluster())


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        ("qwen3_next", MIXED["qwen3_next"], "linear-attention layers of qwen3_next"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of lfm2"),
        ("mamba2", {"num_heads": 8, "head_dim": 16, "expand": 2}, "layers of mamba2"),
        ("jais2", {}, "layers of jais2: taken for attention and MLP"),
        ("t5", {"d_model": 64, "num_layers": 2, "num_heads": 4}, "t5, an encoder-decoder"),
    ],
)
def test_layers_that_are_not_known_are_named_and_never_fit(family: str, config: dict[str, Any], named: str) -> None:
    found = estimated(tiny(family, **config))
    assert found.gpu.verdict == "tight"
    assert any(note.startswith("not modelled: ") and named in note for note in found.notes)


def test_attention_that_transformers_does_not_have_is_not_asked_for_unless_the_user_does() -> None:
    def asked(**flags: Any) -> Any:
        return make_job(
            Flags(model="gemma-2-2b", gpu="h100-80gb", **flags), probe_shape=_never, probe_cluster=described_cluster
        )

    assert asked().recipe.attention == "eager"
    job = asked(attention="sdpa")
    found = estimated(job.shape, attention=job.recipe.attention)
    assert found.gpu.verdict == "tight"
    assert any("sdpa attention of gemma2: transformers 5.23.0 refuses it" in note for note in found.notes)


def _never(*_: object) -> ModelShape:
    raise AssertionError


@pytest.mark.slow
def test_the_families_without_fused_attention_are_transformers_own() -> None:
    without: dict[str, set[str]] = {"sdpa": set(), "flash": set()}
    for config, found in AutoModelForCausalLM._model_mapping.items():
        for kind in found if isinstance(found, (list, tuple)) else (found,):
            without["sdpa"] |= set() if kind._supports_sdpa else {config.model_type}
            without["flash"] |= set() if kind._supports_flash_attn else {config.model_type}
    assert without["sdpa"] >= WITHOUT_SDPA
    assert not CHECKED_FAMILIES & without["sdpa"] - WITHOUT_SDPA
    assert without["sdpa"] & without["flash"] >= WITHOUT_FUSED
    assert not without["flash"] & (WITHOUT_SDPA - WITHOUT_FUSED)


@pytest.mark.parametrize(("family", "config"), [("phimoe", {"num_local_experts": 4}), ("mamba2", {"num_heads": 8})])
def test_adapters_that_peft_refuses_are_refused_with_other_targets(family: str, config: dict[str, Any]) -> None:
    shape = tiny(family, **{"head_dim": 16, **config})
    with pytest.raises(ConfigError, match=family) as caught:
        refuse_adapters_of_experts(shape, Recipe(model="any", method="lora"), None)
    assert "--lora-target q_proj" in str(caught.value.fix)


def test_the_tiled_loss_of_llama_4_is_named_and_never_fits() -> None:
    shape = tiny("llama4_text", num_local_experts=4, head_dim=16)
    assert any("TRL's tiled loss on llama4_text" in note for note in estimated(shape).notes)
    assert not any("TRL's tiled loss" in note for note in estimated(shape, loss="full").notes)


@pytest.mark.parametrize(
    ("family", "config", "parallel"),
    [
        ("phi", {}, True), ("phi3", {"pad_token_id": None}, False), ("cohere2", {}, True), ("gptj", {}, True),
        ("stablelm", {}, False), ("stablelm", {"use_parallel_residual": True}, True),
        ("gpt_neox", {"use_parallel_residual": False}, False),
    ],
)  # fmt: skip
def test_attention_and_mlp_read_the_same_input_in_the_families_that_do_so(
    family: str, config: dict[str, Any], parallel: bool
) -> None:
    assert is_parallel(tiny(family, **config)) is parallel


def test_attention_with_sinks_keeps_its_weights_a_column_wider_and_where_the_largest_was() -> None:
    """B 2, S 8, H 4 heads of 16, 2 of keys, bf16."""
    shape = tiny("gpt_oss", num_local_experts=4, head_dim=16)
    recipe = Recipe(model="tiny", attention="eager")
    laid = next(laid for laid in layout(shape, recipe).blocks if laid.block.role == "layer")
    sizes = Sizes(micro_batch=2, length=8, itemsize=2, attention="eager", on_cpu=False)
    tape = Tape()
    q, k, v = tape.new(2 * 8 * 64 * 2), tape.new(2 * 8 * 32 * 2), tape.new(2 * 8 * 32 * 2)
    out = sink_attention(
        tape, LayerModules(laid, shape), sizes, Modules.of(laid), q, k, v, num_heads=4, q_width=64, k_width=32,
        v_width=32,
    )  # fmt: skip
    tape.drop(q, k, v, out)
    tape.leave()
    tape.flush()
    kept = sum(step[1] for step in tape.steps)
    wide = 2 * 8 * 64 * 2
    weights = 2 * 4 * 8 * (8 + 1) * 2
    places = 2 * 4 * 8 * 8
    assert kept == 3 * wide + weights + places  # q, keys and values for every head


def test_a_clamped_gate_keeps_what_it_is_made_of() -> None:
    """gate and up as they came (2), gate clamped, its sigmoid, up + 1, gate * sigmoid: 6 times a row's width."""
    tape = Tape()
    both = tape.new(200)
    product = clamped_gate(tape, both, 100)
    tape.drop(both, product)
    tape.flush()
    assert sum(step[1] for step in tape.steps) == 6 * 100


@pytest.mark.parametrize(
    ("wrapper", "named"), [("gemma3", "parameters beside the text tower"), ("mistral3", "knows no such wrapper")]
)
def test_what_the_trainer_loads_beside_a_text_tower_is_named_and_never_fits(wrapper: str, named: str) -> None:
    text = {**TINY, "head_dim": 16, **({"model_type": "mistral"} if wrapper == "mistral3" else {})}
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    data = {"model_type": wrapper, "text_config": text, "vision_config": vision}
    shape = shape_of_config(data, name=wrapper)
    found = estimated(shape)
    assert found.gpu.verdict == "tight"
    assert any(named in note for note in found.notes)
    if wrapper == "gemma3":
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**data))
        assert shape.beside_numel == whole.num_parameters() - shape.num_parameters


def test_llama_4_is_loaded_as_its_text_tower_alone() -> None:
    text = {**TINY, "head_dim": 16, "num_local_experts": 2}
    assert shape_of_config({"model_type": "llama4", "text_config": text}, name="llama4").beside_numel == 0


@pytest.mark.parametrize("family", ["jetmoe", "dbrx"])
def test_what_neither_formula_nor_simulation_can_do_is_sent_to_a_trial(family: str) -> None:
    shape = tiny("llama")
    found = estimated(replace(shape, model_type=family))
    assert found.gpu.verdict == "tight"
    assert any("zplan tune --trials 1" in note for note in found.notes)


def test_heads_of_latent_attention_are_as_wide_as_their_parts() -> None:
    """16 + 8 elements fit flash attention, 15 + 8 do not."""
    shape = tiny("deepseek_v3", **{**ROUTED, **LATENT, "hidden_size": 60})
    assert not any("no multiple of 8" in note for note in estimated(shape).notes)
    narrow = tiny("deepseek_v3", **{**ROUTED, **LATENT, "qk_nope_head_dim": 15})
    assert any("heads of 23 elements" in note for note in estimated(narrow).notes)


@pytest.mark.parametrize(
    ("targets", "saved", "stage", "checkpointing", "stops"),
    [
        (("w1", "w2", "w3"), (), 3, False, True), (("w2",), (), 3, False, True),
        (("w2",), ("lm_head",), 3, False, True),
        (("w2", "q_proj"), (), 3, False, False), (("w2",), ("embed_tokens",), 3, False, False),
        (("w2",), (), 3, True, False), (("w2",), (), 2, False, False),
    ],
)  # fmt: skip
def test_adapters_in_leaf_modules_alone_are_refused_where_deepspeed_stops_in_backward(
    targets: tuple[str, ...], saved: tuple[str, ...], stage: Any, checkpointing: bool, stops: bool
) -> None:
    """As DeepSpeed on real ranks does: tests/simulate/test_leaf_adapters.py."""
    shape = tiny("mixtral", num_local_experts=4)
    recipe = Recipe(model="any", method="lora", lora_target=targets, modules_to_save=saved, train_batch_size=1)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=1)
    choice = Choice(zero=ZeroConfig(stage=stage), batch=batch, gradient_checkpointing=checkpointing)
    refused = leaf_refused(shape, recipe, choice)
    assert bool(refused) is stops
    if stops:
        assert estimate_memory(shape, recipe, choice, described_cluster()).gpu.verdict != "fits"
        with pytest.raises(ConfigError, match="alone at ZeRO-3") as caught:
            refuse_adapters_of_experts(shape, recipe, choice)
        assert caught.value.fix == "--gradient-checkpointing"
