"""The whole estimate: hand-worked numbers, and what must hold for every configuration."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.shapes import llama_like
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import course_of, estimate_memory, largest_of_engine
from zplan.memory.instances import instances
from zplan.memory.meter import Kind
from zplan.memory.replay import replay_of
from zplan.memory.terms import MemoryEstimate
from zplan.memory.trainable import int8_bytes, layout
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

GIB = 1 << 30
SHAPE = llama_like(hidden_size=256, num_hidden_layers=3, vocab_size=1000)
STATE_NAMES = {"parameters", "master weights", "optimizer states", "gradient partitions"}


def cluster(num_gpus: int = 8, *, free_bytes: int = 80 * GIB, kind: Any = "cuda") -> Cluster:
    return Cluster(
        gpu=Gpu(name="a card", kind=kind, total_bytes=80 * GIB, free_bytes=free_bytes),
        host=Host(total_bytes=1024 * GIB, available_bytes=1000 * GIB),
        gpus_per_node=num_gpus,
    )


def estimate(
    zero: ZeroConfig, *, world_size: int = 8, micro_batch: int = 1, accumulation: int = 1,
    gradient_checkpointing: bool = True, free_bytes: int = 80 * GIB, bucket_rule: Any = "engine", **recipe: Any,
) -> MemoryEstimate:  # fmt: skip
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=micro_batch, gradient_accumulation_steps=accumulation, world_size=world_size
    )
    return estimate_memory(
        SHAPE,
        Recipe(model="llama-like", train_batch_size=batch.train_batch_size, **{"max_length": 128, **recipe}),
        Choice(zero=zero, batch=batch, gradient_checkpointing=gradient_checkpointing),
        cluster(world_size, free_bytes=free_bytes),
        bucket_rule=bucket_rule,
    )


def term_bytes(found: MemoryEstimate, name: str, phase: str) -> int:
    return sum(term.bytes for term in found.gpu.terms if term.name == name and phase in term.phases)


def test_zero_2_keeps_two_bytes_a_parameter_and_twelve_a_partition() -> None:
    found = estimate(ZeroConfig(stage=2, reduce_bucket_size=1000))
    weights, norms = SHAPE.num_parameters - 7 * 256, 7 * 256
    partition = -(-weights // 16) * 2 + -(-norms // 16) * 2  # each group is padded to a multiple of 2 x 8
    assert term_bytes(found, "parameters", "step") == 2 * 8 * partition
    assert term_bytes(found, "master weights", "step") == 4 * partition
    assert term_bytes(found, "optimizer states", "step") == 8 * partition + 2 * 4  # and a step counter per group


def test_zero_3_partitions_every_parameter() -> None:
    found = estimate(ZeroConfig(stage=3))
    elements = sum(-(-parameter.numel // 8) for _, parameter in SHAPE.parameters())
    assert term_bytes(found, "parameters", "step") == 2 * elements
    assert term_bytes(found, "master weights", "step") == 4 * elements


def test_one_reduce_bucket_and_a_second_under_overlap_comm() -> None:
    one = estimate(ZeroConfig(stage=2, reduce_bucket_size=500_000_000))
    two = estimate(ZeroConfig(stage=2, reduce_bucket_size=500_000_000, overlap_comm=True))
    assert term_bytes(one, "reduce buckets", "backward") == 500_000_000 * 2
    assert term_bytes(two, "reduce buckets", "backward") == 500_000_000 * 2 * 2


def test_lora_trains_r_times_in_plus_out_of_every_linear_layer_but_the_head() -> None:
    laid = layout(SHAPE, Recipe(model="llama-like", method="lora", lora_r=8))
    # four 256 x 256 attention matrices and three 512 x 256 of the MLP, three layers
    assert laid.trainable_numel == 3 * 8 * (4 * (256 + 256) + 3 * (512 + 256))


def test_the_optimizer_leaves_the_gpu_when_it_is_offloaded() -> None:
    found = estimate(ZeroConfig(stage=2, offload_optimizer=OffloadOptimizer(device="cpu")))
    assert term_bytes(found, "optimizer states", "step") == 0
    assert found.host.pinned_bytes > 0


def test_fits_is_said_only_when_the_upper_bound_fits() -> None:
    needed = estimate(ZeroConfig(stage=2)).gpu.used
    assert estimate(ZeroConfig(stage=2), free_bytes=needed.high).gpu.verdict == "fits"
    assert estimate(ZeroConfig(stage=2), free_bytes=needed.high - 1).gpu.verdict == "tight"
    refused = estimate(ZeroConfig(stage=2), free_bytes=needed.expected - 1).gpu
    assert refused.verdict == "does_not_fit"
    assert refused.short_bytes == needed.high - needed.expected + 1


def test_the_documented_rule_can_judge() -> None:
    zero = ZeroConfig(stage=2, overlap_comm=True)
    by_engine, by_docs = estimate(zero).gpu, estimate(zero, bucket_rule="documented").gpu
    assert by_docs.allocated.expected - by_engine.allocated.expected == pytest.approx(9e9 - 2e9, rel=0.1)


def test_the_formula_needs_no_torch() -> None:
    code = "import sys, zplan.memory.estimate; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ZEROS = st.builds(
    ZeroConfig,
    stage=st.sampled_from([0, 1, 2, 3]),
    contiguous_gradients=st.booleans(),
    overlap_comm=st.sampled_from([None, True, False]),
    reduce_bucket_size=st.sampled_from([1000, 100_000, 5_000_000]),
    stage3_prefetch_bucket_size=st.sampled_from([0, 10_000, 1_000_000]),
    stage3_max_live_parameters=st.sampled_from([0, 100_000, 10**9]),
    stage3_max_reuse_distance=st.sampled_from([0, 100_000, 10**9]),
    stage3_param_persistence_threshold=st.sampled_from([0, 1000, 10**6]),
    sub_group_size=st.sampled_from([10_000, 10**9]),
    round_robin_gradients=st.booleans(),
    zero_hpz_partition_size=st.sampled_from([1, 2]),
    offload_optimizer=st.builds(OffloadOptimizer, device=st.sampled_from(["none", "cpu", "nvme"])),
    offload_param=st.builds(OffloadParam, device=st.sampled_from(["none", "cpu", "nvme"])),
)
RECIPES = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["full", "lora", "qlora"]),
        "dtype": st.sampled_from(["bf16", "fp16", "fp32"]),
        "loss": st.sampled_from(["nll", "chunked_nll", "liger", "full"]),
        "attention": st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
        "optimizer": st.sampled_from(["adamw", "adafactor", "sgd", "adamw_8bit", "lion", "muon"]),
        "packing": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(zero=ZEROS, recipe=RECIPES, checkpointing=st.booleans(), accumulation=st.sampled_from([1, 4]))
def test_terms_add_up_and_none_is_negative(
    zero: ZeroConfig, recipe: dict[str, Any], checkpointing: bool, accumulation: int
) -> None:
    found = estimate(zero, gradient_checkpointing=checkpointing, accumulation=accumulation, **recipe)
    assert all(term.bytes > 0 for term in (*found.gpu.terms, *found.host.terms))
    for part in (found.gpu, found.host):
        for phase, peak in part.phases.items():
            assert peak == sum(term.bytes for term in part.terms if phase in term.phases)
    assert found.gpu.allocated.low <= found.gpu.allocated.expected <= found.gpu.allocated.high
    assert found.gpu.used.high >= found.gpu.reserved.high >= found.gpu.allocated.high


@pytest.mark.parametrize(
    ("stage", "ranks", "num_bytes"),
    [(0, 1, 4 * 256_000), (1, 1, 8 * 256_000), (2, 1, 8 * 256_000), (2, 8, 4 * 256_000), (3, 1, 8 * 256_000),
     (3, 2, 4 * 256_000)],
)  # fmt: skip
def test_the_largest_tensor_that_comes_and_goes_is_a_gradient_in_fp64(stage: Any, ranks: int, num_bytes: int) -> None:
    """Of what a rank has of the embedding, 1000 x 256; of several ranks the whole of it in fp32."""
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=ranks)
    recipe = Recipe(model="llama-like", train_batch_size=ranks)
    laid = layout(llama_like(hidden_size=256, num_hidden_layers=1, vocab_size=1000, intermediate_size=8), recipe)
    for states in (OffloadOptimizer(), OffloadOptimizer(device="cpu")):
        zero = ZeroConfig(stage=stage, reduce_bucket_size=1, offload_optimizer=states)
        assert largest_of_engine(laid, recipe, Choice(zero=zero, batch=batch)) == num_bytes


@settings(max_examples=30, deadline=None)
@given(zero=ZEROS, recipe=RECIPES, checkpointing=st.booleans())
def test_a_longer_sequence_never_lowers_a_peak(zero: ZeroConfig, recipe: dict[str, Any], checkpointing: bool) -> None:
    short = estimate(zero, gradient_checkpointing=checkpointing, **recipe, max_length=128)
    longer = estimate(zero, gradient_checkpointing=checkpointing, **recipe, max_length=192)
    for phase, peak in short.gpu.phases.items():
        assert longer.gpu.phases[phase] >= peak, phase
        assert longer.host.phases[phase] >= short.host.phases[phase], phase


def edges_of_muon(zero: ZeroConfig, recipe: dict[str, Any]) -> int:
    """ZeRO-1 and 2 keep a matrix's momentum whole, twice, where the partition begins and ends within one."""
    largest = max(parameter.numel for _, parameter in SHAPE.parameters())
    itemsize = 4 if recipe["dtype"] == "fp32" else 2
    return 2 * 2 * itemsize * largest if recipe["optimizer"] == "muon" and zero.stage in (1, 2) else 0


@settings(max_examples=30, deadline=None)
@given(zero=ZEROS, ranks=st.integers(1, 16), recipe=RECIPES)
@example(zero=ZeroConfig(stage=1, reduce_bucket_size=1000), ranks=15, recipe={"dtype": "bf16", "optimizer": "muon"})
def test_more_ranks_never_raise_model_states_beyond_padding(
    zero: ZeroConfig, ranks: int, recipe: dict[str, Any]
) -> None:
    def states(world_size: int) -> int:
        found = estimate(zero, world_size=world_size, **recipe)
        return sum(term.bytes for term in found.gpu.terms if "step" in term.phases and term.name in STATE_NAMES)

    num_tensors = sum(1 for _ in SHAPE.parameters()) * 3
    padding = 16 * 2 * (ranks + 1) * 2 + 16 * num_tensors
    assert states(ranks + 1) <= states(ranks) + padding + edges_of_muon(zero, recipe)


def most_held(zero: ZeroConfig, kind: Kind) -> int:
    """At any call of a step."""
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=8)
    choice, recipe = Choice(zero=zero, batch=batch), Recipe(model="llama-like", max_length=128)
    laid = layout(SHAPE, recipe)
    script = course_of(SHAPE, recipe, laid, choice, on_cpu=False).script
    return max(kinds[kind] for kinds in replay_of(script, instances(laid), 2, None).held(choice).kinds)


@settings(max_examples=30, deadline=None)
@given(zero=ZEROS, factor=st.integers(2, 50))
def test_a_smaller_bucket_never_raises_the_bucket_terms(zero: ZeroConfig, factor: int) -> None:
    """At any call; the peak can move to where buckets are, see below."""

    def buckets(config: ZeroConfig) -> int:
        return most_held(config, Kind.BUCKETS) + term_bytes(estimate(config), "reduce bucket", "step")

    assert buckets(replace(zero, reduce_bucket_size=zero.reduce_bucket_size // factor)) <= buckets(zero)


def test_a_bucket_smaller_than_a_matrix_raises_the_gradients_of_zero_1() -> None:
    """What fits in the bucket is copied there and freed; what does not is kept until backward is over."""
    large, small = (
        most_held(ZeroConfig(stage=1, overlap_comm=True, reduce_bucket_size=size), Kind.GRADIENTS)
        for size in (1_000_000, 1_000)
    )
    matrices = [parameter.numel for _, parameter in SHAPE.parameters() if parameter.numel > 1_000]
    assert small >= 2 * sum(matrices) > large


def test_eight_bit_weights_are_a_byte_each_and_a_scale_per_row() -> None:
    assert int8_bytes((300, 200)) == 300 * 200 + 4 * 300
    whole, eight, four = (
        layout(SHAPE, Recipe(model="llama-like", method=method, lora_r=8, load_in_8bit=in_8bit)).frozen_bytes
        for method, in_8bit in (("lora", False), ("qlora", True), ("qlora", False))
    )
    assert four < eight < whole
