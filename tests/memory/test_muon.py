"""DeepSpeed's Muon: worked numbers of its states and of its update's temporaries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.memory.choices import shape_of
from tests.memory.test_estimate import cluster
from zplan.memory.estimate import estimate_memory
from zplan.memory.instances import instances
from zplan.memory.muon import (
    BF16,
    MASTER,
    chained_updates_bytes,
    first_updates_bytes,
    is_updated_by_muon,
    precision,
    update_bytes,
    updates_bytes,
)
from zplan.memory.muon3 import MOST_KEPT_BYTES, GatherBuffers, muon_chunks, muon_step_bytes, rounds_bytes
from zplan.memory.muon_offload import (
    Piece,
    batches,
    gathered_numel,
    stage3_update_bytes,
    stage12_update_bytes,
)
from zplan.memory.stage12 import partition
from zplan.memory.sub_groups import muon_bytes, sub_groups
from zplan.memory.terms import MemoryEstimate
from zplan.memory.trainable import layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig

LLAMA = shape_of("llama-3.2-1b")
LAYERS, EMBEDDING, HIDDEN, MIDDLE = 16, 128256 * 2048, 2048, 8192
IN_A_LAYER = 2 * HIDDEN * HIDDEN + 2 * 512 * HIDDEN + 3 * MIDDLE * HIDDEN
MATRICES = LAYERS * IN_A_LAYER
NORMS = (2 * LAYERS + 1) * HIDDEN
FULL = Recipe(model="llama-3.2-1b", train_batch_size=8, max_length=512, optimizer="muon")


def estimate(zero: ZeroConfig, shape: ModelShape = LLAMA, world_size: int = 8, **recipe: Any) -> MemoryEstimate:
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=world_size)
    made = replace(FULL, train_batch_size=world_size, **recipe)
    return estimate_memory(shape, made, Choice(zero=zero, batch=batch), cluster(world_size), rank=0)


def states(found: MemoryEstimate) -> int:
    return sum(term.bytes for term in found.gpu.terms if term.name == "optimizer states" and "step" in term.phases)


@pytest.mark.parametrize(
    ("name", "shape", "muon"),
    [
        ("self_attn.q_proj.weight", (64, 64), True),
        ("mlp.experts.gate_up_proj", (8, 64, 32), True),
        ("q_proj.lora_A.default.weight", (8, 64), True),
        ("transformer.wte.weight", (50257, 768), True),
        ("model.embed_tokens.weight", (100, 64), False),
        ("gpt_neox.embed_in.weight", (100, 64), False),
        ("lm_head.weight", (100, 64), False),
        ("input_layernorm.weight", (64,), False),
    ],
)
def test_matrices_are_muon_s_and_embeddings_heads_and_vectors_adamw_s(
    name: str, shape: tuple[int, ...], muon: bool
) -> None:
    assert is_updated_by_muon(name, shape) is muon


def test_a_square_matrix_holds_six_half_precision_copies() -> None:
    assert update_bytes((100, 100), BF16) == 6 * 2 * 100 * 100
    assert update_bytes((100, 100), MASTER) == 6 * 2 * 100 * 100  # more than lerp and where: 2 * 4


def test_a_wide_matrix_holds_one_copy_and_seven_gram_matrices_or_less() -> None:
    numel, gram = 100 * 200, 100 * 100
    assert update_bytes((100, 200), BF16) == update_bytes((200, 100), BF16) == 2 * (numel + 7 * gram)
    assert update_bytes((10, 4000), BF16) == 5 * 40_000  # isfinite: 2 bytes and three masks; 2 * (2 N + 4 s) is less
    assert update_bytes((10, 4000), MASTER) == 2 * 4 * 40_000
    assert update_bytes((8, 100, 200), BF16) == 8 * update_bytes((100, 200), BF16)


def test_updates_are_kept_at_stages_1_and_2_and_chained_at_stage_0() -> None:
    square, wide = (100, 100), (100, 200)
    assert updates_bytes([square, wide], BF16) == 2 * 10_000 + 2 * (20_000 + 7 * 10_000)
    assert updates_bytes([wide] * 3, BF16) == 2 * 2 * 20_000 + 2 * (20_000 + 7 * 10_000)
    assert chained_updates_bytes([wide] * 3, BF16) == 2 * 20_000 + 2 * (20_000 + 7 * 10_000)
    assert updates_bytes([], BF16) == chained_updates_bytes([], BF16) == 0


def test_the_first_update_has_momentum_so_far_and_no_states_of_adamw() -> None:
    one, two = 12 * 10_000, 2 * (20_000 + 7 * 10_000)
    momentum = 4 * (10_000 + 20_000)
    assert first_updates_bytes([(100, 100), (100, 200)], 0, MASTER) == max(
        4 * 20_000, momentum + 4 * 10_000 + two - momentum
    )
    assert (
        first_updates_bytes([(100, 100), (100, 200)], 10_000_000, MASTER) == 4 * 20_000
    )  # the last update, beside all states
    assert first_updates_bytes([(100, 100)], 1_000, MASTER) == 4 * 10_000 + one - 4 * 10_000 - 8 * 1_000


def test_stage_0_keeps_fp32_momentum_of_matrices_and_two_states_of_the_rest() -> None:
    assert states(estimate(ZeroConfig(stage=0))) == 4 * MATRICES + 8 * (EMBEDDING + NORMS)
    assert states(estimate(ZeroConfig(stage=0), optimizer="adamw")) == 8 * (MATRICES + EMBEDDING + NORMS) + 4


@pytest.mark.parametrize("stage", [1, 2])
def test_a_single_rank_keeps_momentum_twice_in_bf16(stage: Any) -> None:
    found = states(estimate(ZeroConfig(stage=stage), world_size=1))
    assert found == 2 * 2 * MATRICES + 8 * (EMBEDDING + NORMS)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_keeps_momentum_of_whole_matrices_largest_shapes_first(stage: Any) -> None:
    """Rank 0 of 8 has 1/8 of all matrices: of the 32 of (8192, 2048), which come first, seven and a part of one."""
    share, one = MATRICES // 8, MIDDLE * HIDDEN
    touched = -(-share // one)
    assert touched == 8
    adam = 8 * (EMBEDDING + NORMS) // 8
    assert states(estimate(ZeroConfig(stage=stage))) == 2 * 2 * touched * one + adam


def test_muon_sorts_its_matrices_by_shape_below_stage_3_only() -> None:
    items = instances(layout(LLAMA, FULL))
    assert items.groups[0] != tuple(sorted(items.groups[0]))
    assert list(items.muon.values()) == sorted(items.muon.values(), reverse=True)
    assert partition(items, 2).pieces[items.groups[0][1]] == ((0, MIDDLE * HIDDEN),)
    plain = instances(layout(LLAMA, replace(FULL, optimizer="adamw")))
    assert not plain.muon
    assert all(group == tuple(sorted(group)) for group in plain.groups)
    first = sub_groups(items, 1, MIDDLE * HIDDEN).numel[0]
    assert first == 2 * HIDDEN * HIDDEN + 2 * 512 * HIDDEN + MIDDLE * HIDDEN  # q, k, v, o, gate: in the model's order


def test_the_rank_that_holds_most_is_the_one_with_most_matrices_not_most_elements() -> None:
    for ranks in (2, 3, 8):
        cut = partition(instances(layout(LLAMA, FULL)), ranks)
        items = instances(layout(LLAMA, FULL))
        held = []
        for rank in range(ranks):
            mine = partition(items, ranks, rank).mine
            held.append(sum(items.numel[n] * (4 if n in items.muon else 1) for n in mine))
        assert held[cut.rank] == max(held)


def test_stage_3_keeps_momentum_of_its_partitions_once_and_adamw_s_states_of_the_rest() -> None:
    found = estimate(ZeroConfig(stage=3))
    assert states(found) == 8 * (EMBEDDING + NORMS) // 8
    momentum = [term for term in found.gpu.terms if term.name == "Muon's momentum"]
    assert [(term.bytes, term.phases) for term in momentum] == [
        (2 * MATRICES // 8, ("init", "forward", "backward", "step", "save"))
    ]


def test_matrices_are_gathered_in_chunks_of_the_reduce_bucket_one_at_least() -> None:
    group = [(50, (10, 10)), (100, (10, 20)), (50, (10, 10))]
    assert [len(chunk) for chunk in muon_chunks(group, 300)] == [2, 1]
    assert [len(chunk) for chunk in muon_chunks(group, 1)] == [1, 1, 1]
    assert [len(chunk) for chunk in muon_chunks(group, 400)] == [3]


def test_gather_buffers_are_kept_by_size_up_to_256_mib_and_the_least_recent_goes() -> None:
    buffers = GatherBuffers(num_ranks=7, itemsize=2)
    third = MOST_KEPT_BYTES // 3 // 16
    assert buffers.take(third) == buffers.take(third - 1) == buffers.take(third - 2) == 0
    assert buffers.kept_bytes == 8 * 2 * (3 * third - 3)
    assert buffers.take(third) == 0  # again: now the most recent
    assert buffers.take(third - 3) == 0
    assert set(buffers.kept) == {(third - 2, 0), (third, 0), (third - 3, 0)}
    assert buffers.take(MOST_KEPT_BYTES // 16 + 1) == MOST_KEPT_BYTES + 16  # made for one gather, kept by none
    assert set(buffers.kept) == {(third - 2, 0), (third, 0), (third - 3, 0)}
    assert GatherBuffers(num_ranks=1, itemsize=2).take(10**9) == 0  # one rank has nothing to gather


def test_a_round_of_equal_matrices_is_gathered_in_place_and_others_in_padded_copies() -> None:
    square, wide = (100, 100), (100, 200)
    assert rounds_bytes([square, square], num_ranks=2, of=BF16) == update_bytes(square, BF16)
    padded = 2 * 2 * 3 * 20_000  # gradient and momentum: one's own and two ranks', of the larger matrix
    assert rounds_bytes([square, wide], num_ranks=2, of=BF16) == max(update_bytes(square, BF16), 2 * 10_000 + padded)
    again = (
        padded + 2 * 10_000 + update_bytes(square, BF16)
    )  # the copies and the update of the round before are still there
    assert rounds_bytes([square, wide] * 2, num_ranks=2, of=BF16) == again
    replaced = 2 * 10 + 2 * 2 * 3 * 20_000 + 2 * 2 * 20_000  # and one of them when the last of the new ones is made
    assert rounds_bytes([(1, 10), wide] * 2, num_ranks=2, of=BF16) == replaced


def test_a_later_chunk_has_the_whole_gradients_of_the_one_before_beside_it() -> None:
    chunk = [(5_000, (100, 100)), (5_000, (100, 100))]
    whole, clone = 2 * 2 * 10_000, 2 * 10_000
    kept, above = muon_step_bytes([chunk], num_ranks=2, of=BF16)
    assert kept == 3 * 2 * 10_000
    assert above == 2 * whole + clone + update_bytes((100, 100), BF16)
    assert muon_step_bytes([chunk, chunk], num_ranks=2, of=BF16) == (kept, above + whole)
    assert muon_step_bytes([chunk], num_ranks=1, of=BF16)[0] == 0
    assert muon_step_bytes([], num_ranks=2, of=BF16) == (0, 0)


def test_a_smaller_bucket_never_raises_what_muon_s_update_takes_at_stage_3() -> None:
    items = instances(layout(LLAMA, FULL))
    peaks = [
        sum(muon_bytes(items, ZeroConfig(stage=3, reduce_bucket_size=size), 8, BF16))
        for size in (500_000_000, 100_000_000, 20_000_000)
    ]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_where_muon_is_checked_it_fits_and_is_not_called_unchecked(stage: Any, method: Any) -> None:
    found = estimate(ZeroConfig(stage=stage), method=method)
    assert not [note for note in found.notes if "Muon" in note or "muon" in note]
    assert found.gpu.verdict == "fits"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_with_offload_is_modelled_in_every_dtype(stage: Any, dtype: Any) -> None:
    zero = ZeroConfig(stage=stage, offload_optimizer=OffloadOptimizer(device="cpu"))
    found = estimate(zero, method="lora", dtype=dtype)
    assert not [note for note in found.notes if "Muon" in note or "muon" in note]
    assert found.gpu.verdict == "fits"


def test_muon_with_nvme_is_named_and_never_fits() -> None:
    states = OffloadOptimizer(device="nvme", nvme_path="/nvme")
    found = estimate(ZeroConfig(stage=3, offload_optimizer=states), method="lora")
    assert [note for note in found.notes if note.startswith("not modelled: Muon with NVMe")]
    assert found.gpu.verdict != "fits"
    below = estimate(ZeroConfig(stage=2, offload_optimizer=states), method="lora")
    assert not [note for note in below.notes if "Muon" in note]


def test_a_gradient_of_fp16_is_normalised_in_fp32() -> None:
    in_fp16 = precision(2, in_fp16=True)
    assert update_bytes((10, 4000), in_fp16) == (4 + 4 + 2) * 40_000  # the copy, the quotient, its cast
    assert update_bytes((100, 100), in_fp16) == update_bytes((100, 100), BF16)


def test_cpu_ranks_iterate_in_fp32() -> None:
    on_cpu = precision(2, on_cpu=True)
    assert update_bytes((100, 100), on_cpu) == 2 * update_bytes((100, 100), BF16)
    with_cpus = replace(cluster(8), gpu=replace(cluster(8).gpu, kind="cpu"))
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=8)
    choice = Choice(zero=ZeroConfig(stage=2, reduce_bucket_size=1), batch=batch)
    found = estimate_memory(LLAMA, FULL, choice, with_cpus, rank=0)
    assert not [note for note in found.notes if "Muon" in note]


def one_rank(*shapes: tuple[int, int]) -> list[Piece]:
    return [Piece(shape, ((0, shape[0] * shape[1]),), shape[0] * shape[1]) for shape in shapes]


def test_offloaded_matrices_are_gathered_in_batches_of_64_mib_of_gradient_and_momentum() -> None:
    half = (2048, 2048)  # 8 * 2^22 = 32 MiB
    assert [len(batch) for batch in batches(one_rank(half, half, half))] == [2, 1]
    assert [len(batch) for batch in batches(one_rank((8192, 8192), half))] == [1, 1]
    assert batches([]) == []


def test_a_batch_of_one_rank_holds_gradients_momentum_and_one_update_after_the_other() -> None:
    square = (100, 100)
    kept, most = stage12_update_bytes(one_rank(square, square), num_ranks=1, is_scaled=False)
    assert kept == 0
    assert most == 2 * 4 * 20_000 + 4 * 10_000 + update_bytes(square, MASTER)


def test_what_a_rank_sends_is_cut_to_64_mib_with_what_it_receives() -> None:
    pieces = [Piece((300, 100), ((0, 10_000), (1, 20_000)), 10_000)]
    assert gathered_numel(pieces, 2, 1) == 20_000
    assert gathered_numel(pieces, 2, 2) == 40_000
    huge = [Piece((1, 100_000_000), ((0, 50_000_000), (1, 50_000_000)), 50_000_000)]
    assert gathered_numel(huge, 2, 2) == 2 * (64 * 2**20 // (3 * 2 * 4))
    kept, _ = stage12_update_bytes(pieces, num_ranks=2, is_scaled=False)
    assert kept == 3 * 4 * (20_000 + 40_000)  # of the first step, without momentum, and of the later ones


def test_an_offloaded_sub_group_of_zero_3_is_gathered_whole_beside_the_one_before() -> None:
    group = [(5_000, (100, 100)), (5_000, (100, 100))]
    parts, whole = (4 + 2) * 10_000, 2 * 2 * 2 * 10_000
    left = 2 * 10_000 + 2 * 2 * 5_000
    kept, most = stage3_update_bytes([group], num_ranks=2, is_scaled=False, of=BF16)
    assert kept == 3 * 2 * 20_000
    assert most == parts + whole + left + update_bytes((100, 100), BF16)
    small = [(1, (1, 2))]
    _, twice = stage3_update_bytes([group, small], num_ranks=2, is_scaled=False, of=BF16)
    assert twice == most  # the small one's gather, beside 80 kB of whole matrices, is less


def test_the_host_keeps_momentum_of_matrices_in_fp32_or_bf16_and_two_states_of_the_rest() -> None:
    rest = EMBEDDING + NORMS
    for stage, momentum in ((1, 4), (2, 4), (3, 2)):
        zero = ZeroConfig(stage=stage, offload_optimizer=OffloadOptimizer(device="cpu"))  # type: ignore[arg-type]
        found = estimate(zero, world_size=1)
        made = sum(term.bytes for term in found.host.terms if term.name == "offloaded optimizer states")
        assert made == momentum * MATRICES + 8 * rest


def test_a_group_of_one_parameter_without_padding_is_flat_already() -> None:
    """The saved head is all that Muon leaves to AdamW; over 7 ranks it is padded, and copied once more."""
    assert EMBEDDING % 16 == 0
    for ranks, copied in ((8, 0), (7, 14 * -(-EMBEDDING // 14))):
        zero = ZeroConfig(stage=2, reduce_bucket_size=1_000_000)
        found = estimate(zero, world_size=ranks, method="lora", lora_target=("q_proj",), modules_to_save=("lm_head",))
        parts = {term.name: term.bytes for term in found.gpu.terms if "init" in term.phases}
        masters = parts["master weights"]
        beside = parts.get("flattening", 0)
        assert beside == (2 * copied - masters + 4 * partition_of_adapters(ranks) if copied else 0)


def partition_of_adapters(ranks: int) -> int:
    """Master elements of a rank of q_proj's adapters, in Muon's group ahead of the head's."""
    numel = LAYERS * 16 * 2 * HIDDEN
    return 2 * -(-numel // (2 * ranks))
