"""Ranks that share sequences (Ulysses): worked numbers of the exchange, of what it shrinks, of the fp32 reduction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.memory.choices import shape_of
from tests.memory.test_estimate import cluster
from zplan.memory.estimate import estimate_memory
from zplan.memory.events import Event
from zplan.memory.instances import Instances, instances
from zplan.memory.meter import Kind, Meter
from zplan.memory.muon import BF16
from zplan.memory.operations import Sizes
from zplan.memory.shards import shard
from zplan.memory.stage0 import Stage0Engine
from zplan.memory.stage3 import Stage3Engine
from zplan.memory.stage12 import Stage12Engine, partition
from zplan.memory.tape import Tape
from zplan.memory.terms import MemoryEstimate
from zplan.memory.trainable import layout
from zplan.memory.ulysses import shared_attention
from zplan.recipe import Recipe
from zplan.zero_config import BatchSizes, Choice, ZeroConfig

LLAMA = shape_of("llama-3.2-1b")
HEADS, KV_HEADS, WIDTH, LENGTH = 32, 8, 64, 4096
FULL = Recipe(model="llama-3.2-1b", train_batch_size=8, max_length=LENGTH)
SMALL = ZeroConfig(stage=2, reduce_bucket_size=5_000_000)


def estimate(zero: ZeroConfig, shared: int, *, world_size: int = 32, **recipe: Any) -> MemoryEstimate:
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=world_size,
        sequence_parallel_size=shared,
    )  # fmt: skip
    made = replace(FULL, train_batch_size=batch.train_batch_size, **recipe)
    return estimate_memory(LLAMA, made, Choice(zero=zero, batch=batch), cluster(world_size), rank=0)


def attention_bytes(shared: int, *, micro_batch: int = 1) -> tuple[int, int]:
    """(kept for backward, peak above the start) of the forward; q, k and v lie outside."""
    sizes = Sizes(
        micro_batch=micro_batch, length=LENGTH // shared, itemsize=2, attention="sdpa", on_cpu=False,
        sequence_parallel_size=shared,
    )  # fmt: skip
    tape = Tape()
    values = [tape.new(sizes.bytes(width)) for width in (HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH)]
    tape.flush()
    tape.steps.clear()
    shared_attention(tape, sizes, *values, HEADS, HEADS * WIDTH, KV_HEADS * WIDTH)
    tape.flush()
    ((event, kept, peak),) = tape.steps
    assert event == Event.BYTES
    return kept, peak


def test_forward_keeps_the_exchanged_heads_and_the_result_twice() -> None:
    q, k = 2 * LENGTH // 4 * HEADS * WIDTH, 2 * LENGTH // 4 * KV_HEADS * WIDTH  # a quarter of the positions, all heads
    logsumexp = 4 * LENGTH * HEADS // 4
    kept, peak = attention_bytes(4)
    assert kept == (q + 2 * k) + q + logsumexp + q  # attention keeps q, k, v and its output; the last is the value
    positions = 2 * 8 * LENGTH
    context, arrived, joined = q, q, q
    assert peak == positions + (q + 2 * k) + q + logsumexp + context + arrived + joined


def test_fewer_heads_of_keys_than_ranks_are_repeated_to_one_each() -> None:
    ranks = 16
    q, k = 2 * LENGTH // ranks * HEADS * WIDTH, 2 * LENGTH // ranks * ranks * WIDTH
    kept, _ = attention_bytes(ranks)
    assert kept == (q + 2 * k) + q + 4 * LENGTH * HEADS // ranks + q


def test_several_sequences_are_laid_out_once_more() -> None:
    _, one = attention_bytes(4)
    _, two = attention_bytes(4, micro_batch=2)
    q = 2 * 2 * LENGTH // 4 * HEADS * WIDTH
    assert two == 2 * one + q  # the copy to send


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_ranks_to_a_sequence_never_cost_activations(stage: int) -> None:
    zero = ZeroConfig(stage=stage, reduce_bucket_size=1000)  # type: ignore[arg-type]
    forward = [estimate(zero, shared).gpu.phases["forward"] for shared in (2, 4, 8, 16, 32)]
    assert forward == sorted(forward, reverse=True)
    assert estimate(zero, 2).gpu.phases["forward"] < estimate(zero, 1).gpu.phases["forward"]


def test_states_are_cut_over_all_ranks_however_they_share_sequences() -> None:
    def states(shared: int) -> set[tuple[str, int]]:
        terms = estimate(SMALL, shared).gpu.terms
        return {(term.name, term.bytes) for term in terms if "init" in term.phases}

    assert states(1) == states(4)


def test_the_bucket_of_stage_3_is_in_fp32() -> None:
    def bucket(shared: int) -> int:
        found = estimate(ZeroConfig(stage=3, reduce_bucket_size=10_000_000), shared)
        return sum(term.bytes for term in found.gpu.terms if term.name == "reduce bucket")

    assert bucket(1) == 2 * 10_000_000
    assert bucket(2) == 4 * 10_000_000


def reduced_peak(engine: Stage0Engine | Stage12Engine | Stage3Engine, meter: Meter, numbers: tuple[int, ...]) -> int:
    """Temporaries of the engine at most, while these gradients are reduced."""
    for number in numbers:
        engine.gradient(number)
    meter.mark()
    engine.end_backward()
    return meter.peak_by_kind[Kind.TEMPORARIES]


def items() -> Instances:
    return instances(layout(LLAMA, FULL))


def test_stage_0_casts_the_flat_gradients() -> None:
    meter = Meter()
    engine = Stage0Engine(meter, items(), itemsize=2, reduced=4, partial=False, of_muon=BF16)
    engine.end_backward()
    flat = [number for group in items().groups for number in group]
    filled = largest = 0
    for number in flat:
        filled += items().numel[number]
        largest = max(largest, filled)
        filled = 0 if filled > 500_000_000 else filled
    assert meter.peak_by_kind[Kind.TEMPORARIES] == (2 + 4) * largest


@pytest.mark.parametrize("reduce_scatter", [True, False])
def test_stage_2_casts_the_bucket(reduce_scatter: bool) -> None:
    """One parameter that lies in another rank's partition: its slice is a view, the cast is not."""
    meter, number = Meter(), items().groups[0][1]
    cut = partition(items(), 4, 3)
    assert [owner for owner, _ in cut.pieces[number]] == [0]
    zero = ZeroConfig(stage=2, reduce_scatter=reduce_scatter)
    engine = Stage12Engine(meter, items(), cut, zero, itemsize=2, reduced=4, partial=False, num_ranks=4, of_muon=BF16)
    assert reduced_peak(engine, meter, (number,)) == 4 * items().numel[number]


def test_stage_3_casts_what_lies_outside_the_bucket_and_every_part_back() -> None:
    ranks, number = 4, items().groups[0][1]
    numel = items().numel[number]
    for contiguous, outside in ((True, 0), (False, numel)):
        meter = Meter()
        zero = ZeroConfig(stage=3, contiguous_gradients=contiguous)
        engine = Stage3Engine(
            meter, items(), shard(items(), zero, ranks), zero, num_ranks=ranks, itemsize=2, reduced=4
        )  # one parameter that divides is reduced where it lies
        assert reduced_peak(engine, meter, (number,)) == 4 * outside + 2 * numel // ranks
