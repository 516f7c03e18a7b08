"""What the model does not model: said in a note, and never called `fits`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.formula_case import cut_layers
from tests.memory.test_estimate import cluster
from tests.shapes import llama_like
from zplan.catalog.find import find_model
from zplan.ds_config import read_ds_config
from zplan.errors import ConfigError
from zplan.memory.estimate import estimate_memory
from zplan.memory.instances import instances
from zplan.memory.shards import shard, update_bytes
from zplan.memory.sub_groups import left_on_gpu
from zplan.memory.terms import MemoryEstimate
from zplan.memory.trainable import layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig

SHAPE = llama_like()


def estimate(
    zero: ZeroConfig, shape: ModelShape = SHAPE, world_size: int = 8, accumulation: int = 1, **recipe: Any
) -> MemoryEstimate:
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=accumulation, world_size=world_size
    )
    values = {"model": "any", "train_batch_size": batch.train_batch_size, "max_length": 128, **recipe}
    return estimate_memory(shape, Recipe(**values), Choice(zero=zero, batch=batch), cluster(world_size))


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantized_communication_is_modelled_and_fits(key: str) -> None:
    found = estimate(replace(ZeroConfig(stage=3), **{key: True}))
    assert found.gpu.verdict == "fits"
    assert not any(note.startswith("not modelled: ") for note in found.notes)


def test_a_part_that_the_quantizer_refuses_is_named_and_never_fits() -> None:
    """576 elements of a norm over 64 ranks are 9."""
    shape = find_model("smollm2-135m")
    assert isinstance(shape, ModelShape)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=64)
    choice = Choice(zero=ZeroConfig(stage=3, zero_quantized_weights=True), batch=batch)
    found = estimate_memory(shape, Recipe(model="any", train_batch_size=64), choice, cluster(64))
    assert found.gpu.verdict == "tight"
    assert any(note.startswith("not modelled: zero_quantized_weights over 64 ranks: 9 ") for note in found.notes)


def test_quantized_gradients_change_nothing_within_a_node_and_read_bf16_as_fp16_between_nodes() -> None:
    zero = ZeroConfig(stage=3, zero_quantized_gradients=True)
    plain, one_node = estimate(ZeroConfig(stage=3)), estimate(zero)
    assert one_node.gpu == plain.gpu
    assert any("no effect within one node" in note for note in one_node.notes)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=8)
    two_nodes = replace(cluster(4), nodes=2)
    for dtype, is_wrong in (("bf16", True), ("fp16", False)):
        recipe = Recipe(model="any", train_batch_size=8, dtype=dtype)  # type: ignore[arg-type]
        notes = estimate_memory(SHAPE, recipe, Choice(zero=zero, batch=batch), two_nodes).notes
        assert any("the sums are wrong" in note for note in notes) is is_wrong


def test_weights_are_never_stored_quantized_because_peft_freezes_them_later() -> None:
    plain = estimate(ZeroConfig(stage=3), method="lora")
    found = estimate(ZeroConfig(stage=3, zero_quantized_nontrainable_weights=True), method="lora")
    assert found.gpu == plain.gpu
    assert any(note.startswith("zero_quantized_nontrainable_weights has no effect") for note in found.notes)


@pytest.mark.parametrize("options", [{"ratio": 0.5, "device": "nvme"}])
def test_states_that_are_offloaded_in_part_or_otherwise_are_named_and_never_fit(options: dict[str, Any]) -> None:
    offloaded = estimate(ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device="cpu")))
    other = estimate(ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(**{"device": "cpu", **options})))
    assert (offloaded.gpu.verdict, other.gpu.verdict) == ("fits", "tight")
    assert any(note.startswith("not modelled: ") and next(iter(options)) in note for note in other.notes)


def test_bloom_has_one_attention_and_others_are_never_called_fitting() -> None:
    shape = find_model("bloom-560m")
    assert isinstance(shape, ModelShape)
    assert estimate(ZeroConfig(stage=3), shape=shape, attention="sdpa").gpu.verdict == "tight"
    assert estimate(ZeroConfig(stage=3), shape=shape, attention="eager").gpu.verdict == "fits"


def test_dora_costs_more_than_lora_and_rslora_as_much() -> None:
    lora = estimate(ZeroConfig(stage=2), method="lora")
    eight = estimate(ZeroConfig(stage=2), method="qlora", load_in_8bit=True)
    assert eight.gpu.verdict == "tight"
    dora = estimate(ZeroConfig(stage=2), method="lora", use_dora=True)
    assert lora.gpu.verdict == "fits"
    assert dora.gpu.verdict == "fits"
    assert all(dora.gpu.phases[phase] > peak for phase, peak in lora.gpu.phases.items() if phase != "load")
    quantised = estimate(ZeroConfig(stage=2), method="qlora", use_dora=True)
    assert quantised.gpu.verdict == "tight"
    assert any(note.startswith("not modelled: DoRA on quantised weights") for note in quantised.notes)
    assert estimate(ZeroConfig(stage=2), method="lora", use_rslora=True) == lora


def test_gradients_of_their_own_dtypes_at_stage_3() -> None:
    """fp32 for half: two more bytes an element of the partitions, and of the bucket."""
    plain, accumulated = estimate(ZeroConfig(stage=3)), estimate(ZeroConfig(stage=3), grad_accum_dtype="fp32")
    reduced = estimate(ZeroConfig(stage=3), communication_data_type="fp32")
    terms = [{term.name: term.bytes for term in found.gpu.terms} for found in (plain, accumulated, reduced)]
    assert terms[1]["gradient partitions"] == 2 * terms[0]["gradient partitions"]
    assert terms[2]["reduce bucket"] == 2 * terms[0]["reduce bucket"]
    assert [found.gpu.verdict for found in (plain, accumulated, reduced)] == ["fits"] * 3
    assert estimate(ZeroConfig(stage=3), grad_accum_dtype="bf16", communication_data_type="bf16").gpu == plain.gpu


def test_stage_2_holds_one_fp32_partition_between_backward_and_step() -> None:
    """Between them four bytes for each element of a rank's partition, whatever parameters it cuts."""
    found = estimate(ZeroConfig(stage=2), grad_accum_dtype="fp32")
    laid = layout(SHAPE, Recipe(model="any"))
    sizes = sum(-(-numel // (2 * 8)) * 2 for numel in laid.group_numel)
    gradients = {term.phases: term.bytes for term in found.gpu.terms if term.name == "gradients"}
    assert gradients[("step",)] == 4 * sizes
    assert found.gpu.verdict == "fits"


def test_offload_keeps_the_fp32_partition_on_the_gpu_and_stage_1_a_bucket_of_what_others_own() -> None:
    """Of two micro-steps. Stage 1 copies every gradient to fp32 buckets, and other ranks' stay views of them."""
    laid = layout(SHAPE, Recipe(model="any"))
    partition = sum(-(-numel // (2 * 8)) * 2 for numel in laid.group_numel)
    offload = OffloadOptimizer(device="cpu")
    for stage, bucket in ((1, 4 * 10**8), (2, 0)):
        zero = ZeroConfig(stage=stage, offload_optimizer=offload, reduce_bucket_size=10**8)  # type: ignore[arg-type]
        found = estimate(zero, accumulation=2, grad_accum_dtype="fp32")
        in_step = {term.name: term.bytes for term in found.gpu.terms if term.phases == ("step",)}
        assert (in_step["gradients"], in_step.get("reduce buckets", 0)) == (4 * partition, bucket)
        assert not any(term.name == "offloaded gradient accumulation" for term in found.host.terms)
        assert found.gpu.verdict == "fits"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_offload_keeps_gradients_larger_than_the_bucket_until_the_end_of_a_micro_step_before_the_last(
    dtype: str,
) -> None:
    """A bucket of one element: they all are. The last micro-step gives each back as it is copied to the host."""
    zero = ZeroConfig(stage=2, offload_optimizer=OffloadOptimizer(device="cpu"), reduce_bucket_size=1)
    shape = find_model("mistral-7b")
    assert isinstance(shape, ModelShape)
    shape, held = cut_layers(shape, 2), []
    for accumulation in (1, 2):
        found = estimate(zero, shape, 1, accumulation, grad_accum_dtype=dtype, max_length=8)
        terms = (term for term in found.gpu.terms if "backward" in term.phases)
        held.append(sum(term.bytes for term in terms if term.name == "gradients"))
    numel = layout(shape, Recipe(model="any")).trainable_numel
    partition = 4 * numel if dtype == "fp32" else 0
    assert held[0] - partition < numel
    assert held[1] - partition >= 2 * numel


def test_gradients_of_a_dtype_that_neither_is_the_models_nor_fp32_are_named() -> None:
    for stage in (1, 2):
        other = estimate(ZeroConfig(stage=stage), grad_accum_dtype="fp16")  # type: ignore[arg-type]
        assert other.gpu.verdict == "tight"
        assert any(note.startswith("not modelled: gradients of bf16 accumulated in fp16") for note in other.notes)


def test_bf16_at_stage_1_holds_fp32_gradients_of_the_whole_model() -> None:
    plain, found = estimate(ZeroConfig(stage=1)), estimate(ZeroConfig(stage=1), grad_accum_dtype="fp32")
    padded = sum(-(-numel // (2 * 8)) * 2 * 8 for numel in layout(SHAPE, Recipe(model="any")).group_numel)
    terms = {term.name: term.bytes for term in found.gpu.terms}
    assert terms["fp32 gradients"] == 4 * padded
    assert (plain.gpu.verdict, found.gpu.verdict) == ("fits", "fits")
    assert not any(term.name == "reduce buckets" for term in found.gpu.terms)
    half = estimate(ZeroConfig(stage=1), grad_accum_dtype="fp32", dtype="fp16")
    assert not any(term.name == "fp32 gradients" for term in half.gpu.terms)  # ZeRO's own engine
    assert half.gpu.verdict == "fits"


def test_qlora_in_fp32_is_named_for_its_adapters_in_bf16() -> None:
    """TRL casts them; in bf16 and fp16 they have the size that the formula counts."""
    named = "not modelled: adapters in bf16 beside fp32"
    notes = {
        dtype: estimate(ZeroConfig(stage=2), method="qlora", dtype=dtype).notes for dtype in ("bf16", "fp16", "fp32")
    }
    assert [dtype for dtype, lines in notes.items() if any(line.startswith(named) for line in lines)] == ["fp32"]
    assert not any(line.startswith(named) for line in estimate(ZeroConfig(stage=2), method="lora", dtype="fp32").notes)


def test_qlora_is_modelled_at_every_stage_of_gpus_and_its_scales_are_whole_at_stage_3() -> None:
    for stage in (0, 1, 2, 3):
        found = estimate(ZeroConfig(stage=stage), method="qlora")  # type: ignore[arg-type]
        assert found.gpu.verdict == "fits"
    terms = {term.name: term.bytes for term in found.gpu.terms}
    laid = layout(SHAPE, Recipe(model="any", method="qlora"))
    packed = [w.numel for block in laid.blocks for w in block.weights * block.repeat if w.packed]
    assert terms["scales of quantised weights"] == sum(numel // 64 + 4 * -(-numel // 64 // 256) for numel in packed)


def test_falcons_linear_layers_are_not_quantised() -> None:
    """transformers replaces nn.Linear itself, no class made of it."""
    shape = find_model("falcon-7b")
    assert isinstance(shape, ModelShape)
    lora, qlora = (layout(shape, Recipe(model="any", method=method)) for method in ("lora", "qlora"))  # type: ignore[arg-type]
    assert lora.stored_bytes == qlora.stored_bytes


def test_hpz_keeps_a_second_copy_of_the_weights_between_their_release_and_the_update() -> None:
    """Eight ranks, groups of two: half of every parameter, padded to a multiple of eight."""
    found = estimate(ZeroConfig(stage=3, zero_hpz_partition_size=2))
    copies = {term.phases: term.bytes for term in found.gpu.terms if term.name == "secondary partitions (hpZ)"}
    copy = 2 * sum(-(-parameter.numel // 8) * 8 // 2 for _, parameter in SHAPE.parameters())
    assert copies == {("load", "init", "step"): copy}
    adapted = estimate(ZeroConfig(stage=3, zero_hpz_partition_size=2), method="lora")
    phases = [set(term.phases) for term in adapted.gpu.terms if term.name == "secondary partitions (hpZ)"]
    assert {"forward", "backward"} <= phases[0]  # the frozen weights' copy stays
    assert estimate(ZeroConfig(stage=3, zero_hpz_partition_size=2)).gpu.verdict == "fits"


def test_what_no_simulation_confirmed_is_a_note_and_may_fit() -> None:
    found = estimate(ZeroConfig(stage=2), optimizer="lion")
    assert any(note.startswith("unchecked: ") and "lion" in note for note in found.notes)
    assert found.gpu.verdict == "fits"


def test_a_file_that_splits_the_model_is_refused() -> None:
    data: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": {"expert_parallel_size": 2}}
    with pytest.raises(ConfigError, match="not modelled"):
        read_ds_config(data, recipe=Recipe(model="any", train_batch_size=8), shape=SHAPE, cluster=cluster(8))


def test_what_a_ratio_leaves_on_the_gpu_is_sixteen_bytes_an_element_that_the_host_does_not_hold() -> None:
    def with_ratio(ratio: float) -> MemoryEstimate:
        states = OffloadOptimizer(device="cpu", ratio=ratio, pin_memory=False)
        return estimate(ZeroConfig(stage=3, sub_group_size=1, offload_optimizer=states))

    whole, half = with_ratio(1.0), with_ratio(0.5)
    parts = [-(-parameter.numel // 8) for _, parameter in SHAPE.parameters()]
    groups = len(parts) // 2  # one parameter a sub-group; matrices come before norms
    kinds = [parameter.kind for _, parameter in SHAPE.parameters()]
    matrices = [part for part, kind in zip(parts, kinds, strict=True) if kind != "norm"]
    left = sum(matrices[:groups])
    assert half.gpu.phases["init"] - whole.gpu.phases["init"] == (4 + 4) * left
    assert half.gpu.phases["backward"] - whole.gpu.phases["backward"] == 16 * left + 4 * groups
    assert whole.host.phases["backward"] - half.host.phases["backward"] == 8 * 16 * left


def test_dora_on_experts_is_refused_by_peft_and_never_fits_unless_only_other_modules_are_adapted() -> None:
    shape = find_model("qwen3-30b-a3b")
    assert isinstance(shape, ModelShape)
    shape = cut_layers(shape, 2)
    experts = estimate(ZeroConfig(stage=3), shape=shape, method="lora", use_dora=True)
    assert any("peft raises" in note for note in experts.notes)
    assert experts.gpu.verdict != "fits"
    others = estimate(ZeroConfig(stage=3), shape=shape, method="lora", use_dora=True, lora_target=("q_proj",))
    assert not any("DoRA" in note for note in others.notes)


def test_persistent_parameters_come_back_when_the_temporaries_of_an_update_on_the_gpu_are_gone() -> None:
    items = instances(layout(SHAPE, Recipe(model="m", train_batch_size=8, max_length=128)))
    persistent = ZeroConfig(stage=3, stage3_param_persistence_threshold=10**9, sub_group_size=1)
    half = replace(persistent, offload_optimizer=OffloadOptimizer(device="cpu", ratio=0.5))
    left = left_on_gpu(items, half, 8)
    gathered = update_bytes(items, shard(items, half, 8), half, num_ranks=8)
    assert left
    assert gathered == shard(items, half, 8).persistent_bytes - 8 * max(left)


def test_heads_that_flash_attention_would_pad_are_named_and_never_fit() -> None:
    shape = replace(SHAPE, head_dim=SHAPE.head_dim + 4)
    for attention, dtype, named in (("sdpa", "bf16", True), ("eager", "bf16", False), ("sdpa", "fp32", False)):
        notes = estimate(ZeroConfig(stage=2), shape=shape, attention=attention, dtype=dtype).notes
        assert any("no multiple of 8" in note for note in notes) is named
    assert estimate(ZeroConfig(stage=2), shape=shape).gpu.verdict == "tight"


def test_leaf_modules_by_granularity_are_named_and_never_fit() -> None:
    """ZeRO-3 with all modules as one leaf is 34 % more than without any (LoRA on smollm2-135m)."""
    leaves = ZeroConfig(stage=3, stage3_module_granularity_threshold=10**12)
    found = estimate(leaves)
    assert found.gpu.verdict == "tight"
    (line,) = (note for note in found.notes if note.startswith("not modelled: "))
    assert line.endswith("; try --set stage3_module_granularity_threshold=0")
    assert "fails in backward" not in line
    below = estimate(replace(leaves, stage=2))
    assert not any(note.startswith("not modelled: ") for note in below.notes)


def test_adapters_in_leaf_modules_are_said_to_fail_without_checkpointing() -> None:
    zero = ZeroConfig(stage=3, stage3_module_granularity_threshold=1)
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=8)
    recipe = Recipe(model="any", train_batch_size=8, max_length=128, method="lora")
    for recomputes in (False, True):
        choice = Choice(zero=zero, batch=batch, gradient_checkpointing=recomputes)
        notes = estimate_memory(SHAPE, recipe, choice, cluster(8)).notes
        assert any("DeepSpeed fails in backward" in note for note in notes) != recomputes
