"""Gathered parameters of a ZeRO-3 step: the micro-step after the first, and weights that autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.choices import BATCH, FULL_ON_SMOLLM, LORA_ON_SMOLLM, SMOLLM, shape_of
from zplan.memory.coordinator import Act, Action, Coordinator, Fetches
from zplan.memory.course import course
from zplan.memory.fetch_limits import Limits
from zplan.memory.gather import Gathered, Gathering, Steps, one_by_one
from zplan.memory.instances import Instances
from zplan.memory.meter import Kind, Meter
from zplan.memory.owners import module_parameters, unread_numbers, viewed_numbers
from zplan.memory.script import UPDATED, Op
from zplan.memory.shards import shard
from zplan.memory.stage3 import Stage3Engine
from zplan.memory.timeline import Recording, module_bases, record
from zplan.memory.trainable import layout
from zplan.recipe import Recipe
from zplan.zero_config import Choice, OffloadOptimizer, OffloadParam, ZeroConfig

SMALL = ZeroConfig(stage=3, stage3_param_persistence_threshold=4)
TWO = Instances(numel=(100, 4), itemsize=(2, 2), trainable=(True, True), group=(0, 0), base=(0,), groups=((0, 1),))


def two_modules(*missing: int) -> Coordinator:
    """The model (2), an embedding of 100 elements (0) and a norm of 4 that persists (1)."""
    return Coordinator(
        Fetches.of([2, 0, 1, 0], {0: (0,), 1: (1,)}, TWO.numel), Limits(prefetch=1000, live=1000, reuse=0),
        persistent=frozenset({1}), external=(), trainable=TWO.trainable, missing=frozenset(missing),
    )  # fmt: skip


def moments(gathered: Gathered) -> list[int]:
    """One by one, with the update."""
    found = one_by_one(gathered.parts)
    found[UPDATED] = gathered.update_bytes
    return found


def most_of(steps: Steps) -> list[int]:
    """The most that any of the steps holds, moment by moment."""
    there = [[held - absent for held in moments(gathered)] for gathered, absent in steps]
    return [max(held) for held in zip(*there, strict=True)]


def test_a_persistent_parameter_is_gathered_with_the_others_only_after_a_step_without_trace() -> None:
    assert two_modules().pre_module(2) == ((Act.GATHER, (0,)),)
    assert two_modules(1).pre_module(2) == ((Act.GATHER, (0, 1)),)


def test_a_flat_buffer_stays_until_the_last_of_its_parameters_is_needed() -> None:
    coordinator, meter = two_modules(1), Meter()
    engine = Stage3Engine(meter, TWO, shard(TWO, SMALL, 2), SMALL, num_ranks=2, itemsize=2)
    held = []
    for module in (2, 0, 1):
        engine.follow(coordinator.pre_module(module))
        held.append(meter.by_kind[Kind.GATHERED_PARAMETERS])
        engine.follow(coordinator.post_module(module))
    flat = copies = 2 * (100 + 4)
    assert held == [flat, flat + copies, copies]  # the embedding stays: its next use was skipped by the prefetch


def test_what_persists_is_never_released() -> None:
    coordinator = two_modules(1)
    released: list[Action] = []
    for module in (2, 0, 1, 0):
        coordinator.pre_module(module)
        released += coordinator.post_module(module)
    assert all(1 not in numbers for act, numbers in released if act == Act.RELEASE)


@pytest.mark.parametrize("prefetch", [0, 1_000_000, 100_000_000])
@pytest.mark.parametrize("reuse", [0, 1_000_000_000])
def test_more_micro_steps_never_gather_less(prefetch: int, reuse: int) -> None:
    zero = ZeroConfig(stage=3, stage3_prefetch_bucket_size=prefetch, stage3_max_reuse_distance=reuse)
    recipe = LORA_ON_SMOLLM
    recording = record(SMOLLM, recipe, layout(SMOLLM, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    walked = course(recording, checkpointing=True, fetches=True)
    gathering = Gathering(walked.script, recording.items, recipe.weight_bytes)
    one, two, three = (
        most_of(gathering.steps_of(Choice(zero=zero, batch=replace(BATCH, gradient_accumulation_steps=steps))))
        for steps in (1, 2, 3)
    )
    assert all(more >= less for more, less in zip(two, one, strict=True))
    assert two == three


def test_frozen_parameters_that_persist_stay_with_a_reentrant_recomputation() -> None:
    recipe = LORA_ON_SMOLLM
    recording = record(SMOLLM, recipe, layout(SMOLLM, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    again, once = (
        Gathering(course(recording, checkpointing=on, fetches=True).script, recording.items, recipe.weight_bytes)
        for on in (True, False)
    )
    assert once.never_released == frozenset()
    # each of 30 layers: two norms, four projections of its attention, three of its MLP
    assert len(again.never_released) == 30 * (2 + 4 + 3)


def test_an_offloaded_embedding_is_still_gathered_while_its_gradient_is_reduced() -> None:
    """It is larger than the bucket, so its gradient is reduced when backward is over."""
    recipe = Recipe(model="smollm2-135m", train_batch_size=8, max_length=16)
    zero = ZeroConfig(
        stage=3, reduce_bucket_size=5_000_000, overlap_comm=False, stage3_prefetch_bucket_size=0,
        stage3_max_reuse_distance=0, offload_optimizer=OffloadOptimizer(device="cpu"),
    )  # fmt: skip
    choice = Choice(zero=zero, batch=replace(BATCH, gradient_accumulation_steps=1, world_size=8))
    recording = record(SMOLLM, recipe, layout(SMOLLM, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    walked = course(recording, checkpointing=True, fetches=True)
    gathered = most_of(Gathering(walked.script, recording.items, recipe.weight_bytes).steps_of(choice))
    last = next(number for number, (op, _) in enumerate(walked.script.calls) if op == Op.END_BACKWARD)
    assert gathered[2 * last] >= 2 * 49152 * 576
    assert gathered[2 * last + 2] == 0


@pytest.mark.parametrize(("ranks", "copied"), [(1, 0), (2, 2 * (100 + 4))])
def test_without_reduce_scatter_the_reduced_bucket_is_multiplied_into_a_copy(ranks: int, copied: int) -> None:
    zero = replace(SMALL, reduce_scatter=False)
    meter = Meter()
    engine = Stage3Engine(meter, TWO, shard(TWO, zero, ranks), zero, num_ranks=ranks, itemsize=2)
    engine.gradient(1)
    engine.gradient(0)
    meter.mark()
    engine.end_backward()
    assert meter.peak_bytes == copied


def falcon(method: str) -> Recording:
    shape = shape_of("falcon-7b")
    recipe = Recipe(model="falcon-7b", method=method, train_batch_size=1, max_length=64)  # type: ignore[arg-type]
    return record(shape, recipe, layout(shape, recipe), micro_batch=1, on_cpu=False, partitioned=True)


def test_autograd_keeps_a_view_of_each_of_falcon_s_four_matrices() -> None:
    full = falcon("full")
    viewed = viewed_numbers(full, checkpointing=False)
    assert len(viewed) == 4 * 32
    assert sum(full.items.numel[number] for number in viewed) == 32 * 4544 * (4672 + 4544 + 2 * 18176)


def test_adapters_are_no_falcon_matrices_and_the_first_layer_s_inputs_need_no_gradient() -> None:
    adapted = falcon("lora")
    viewed = viewed_numbers(adapted, checkpointing=False)
    assert len(viewed) == 4 * 32 - 2  # query_key_value and dense_h_to_4h of the first layer
    assert not any(adapted.items.trainable[number] for number in viewed)
    assert len(viewed_numbers(adapted, checkpointing=True)) == 4 * 32, "recomputed inputs need one"
    calls = course(adapted, checkpointing=False, fetches=True).script.calls
    assert sum(op == Op.VIEWED_MODULE for op, _ in calls) == 4 * 32 - 2


@pytest.mark.parametrize(("method", "checkpointing", "is_fetched"), [
    ("lora", False, False), ("lora", True, True), ("full", False, True),
])  # fmt: skip
def test_a_weight_whose_input_needs_no_gradient_is_not_fetched_in_backward(
    method: str, checkpointing: bool, is_fetched: bool
) -> None:
    recording = falcon(method)
    index = next(i for i, block in enumerate(recording.blocks) if block.laid.block.role == "layer")
    names, base = recording.blocks[index].modules.numbers, module_bases(recording)[index]
    script = course(recording, checkpointing=checkpointing, fetches=True).script
    backward = [number for op, number in script.calls[script.phases[1] :] if op == Op.PRE_MODULE]
    base_layer = ".base_layer" if method == "lora" else ""
    for weight in ("self_attention.query_key_value", "mlp.dense_h_to_4h"):
        number = names[weight + base_layer]
        assert (base + number in backward) == is_fetched
        assert base + len(names) + number in backward, "the second layer's is"
    assert (0 in backward) == is_fetched, "nor is the frozen embedding"


def test_other_families_linear_layers_keep_nothing() -> None:
    recipe = LORA_ON_SMOLLM
    recording = record(SMOLLM, recipe, layout(SMOLLM, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    assert viewed_numbers(recording, checkpointing=False) == frozenset()


def test_second_copies_of_two_and_of_four_ranks_are_not_taken_for_each_other() -> None:
    """hpZ over four ranks is cut over two where there are only two; the weights are the same for any even cut."""
    zero = ZeroConfig(stage=3, zero_hpz_partition_size=4)
    recording = record(
        SMOLLM, FULL_ON_SMOLLM, layout(SMOLLM, FULL_ON_SMOLLM), micro_batch=1, on_cpu=False, partitioned=True
    )
    script = course(recording, checkpointing=True, fetches=True).script
    few, many = (Choice(zero=zero, batch=replace(BATCH, world_size=ranks)) for ranks in (2, 8))
    asked_before = Gathering(script, recording.items, 2)
    asked_before.steps_of(few)[0][0]
    alone = Gathering(script, recording.items, 2)
    assert moments(asked_before.steps_of(many)[0][0]) == moments(alone.steps_of(many)[0][0])


def test_an_update_on_the_nvme_is_not_taken_for_one_on_the_host() -> None:
    """Small gradients of swapped sub-groups lie on the GPU until the update."""
    recording = record(
        SMOLLM, FULL_ON_SMOLLM, layout(SMOLLM, FULL_ON_SMOLLM), micro_batch=1, on_cpu=False, partitioned=True
    )
    script = course(recording, checkpointing=True, fetches=True).script
    on_host, on_nvme = (
        Choice(zero=ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device=device)), batch=BATCH)
        for device in ("cpu", "nvme")
    )
    asked_before = Gathering(script, recording.items, 2)
    host = moments(asked_before.steps_of(on_host)[0][0])
    nvme = moments(asked_before.steps_of(on_nvme)[0][0])
    assert nvme == moments(Gathering(script, recording.items, 2).steps_of(on_nvme)[0][0])
    assert nvme[UPDATED] > host[UPDATED]


@pytest.mark.parametrize("model", ["smollm2-135m", "falcon-7b", "mixtral-8x7b"])
@pytest.mark.parametrize(("method", "checkpointing"), [("full", True), ("lora", True), ("lora", False)])
@pytest.mark.parametrize("live", [10_000_000, 700_000_000, 10**12])
@pytest.mark.parametrize("reuse", [0, 300_000_000])
def test_laps_that_are_skipped_bring_what_following_them_brings(
    model: str, method: str, checkpointing: bool, live: int, reuse: int
) -> None:
    shape = shape_of(model)
    recipe = Recipe(model=model, method=method, train_batch_size=1, max_length=64)  # type: ignore[arg-type]
    recording = record(shape, recipe, layout(shape, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    script = course(recording, checkpointing=checkpointing, fetches=True).script
    zero = ZeroConfig(
        stage=3, stage3_max_live_parameters=live, stage3_max_reuse_distance=reuse, zero_hpz_partition_size=2
    )
    choice = Choice(zero=zero, batch=BATCH)
    skipping = Gathering(script, recording.items, 2)
    following = Gathering(replace(script, laps=()), recording.items, 2)
    assert most_of(skipping.steps_of(choice)) == most_of(following.steps_of(choice))


ELEMENTS = st.integers(0, 9).map(lambda digits: 10**digits) | st.integers(0, 200_000_000)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("recipe", [FULL_ON_SMOLLM, LORA_ON_SMOLLM], ids=["full", "lora"])
@settings(max_examples=25, deadline=None)
@given(prefetch=ELEMENTS, live=ELEMENTS, reuse=ELEMENTS, small=st.integers(0, 9), steps=st.integers(1, 2))
def test_whatever_the_limits_are_skipped_laps_bring_what_following_them_brings(
    recipe: Recipe, checkpointing: bool, prefetch: int, live: int, reuse: int, small: int, steps: int
) -> None:
    recording = record(SMOLLM, recipe, layout(SMOLLM, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    script = course(recording, checkpointing=checkpointing, fetches=True).script
    zero = ZeroConfig(
        stage=3, stage3_prefetch_bucket_size=prefetch, stage3_max_live_parameters=live, stage3_max_reuse_distance=reuse,
        stage3_param_persistence_threshold=10**small,
    )  # fmt: skip
    choice = Choice(zero=zero, batch=replace(BATCH, gradient_accumulation_steps=steps))
    skipping = Gathering(script, recording.items, 2)
    following = Gathering(replace(script, laps=()), recording.items, 2)
    assert most_of(skipping.steps_of(choice)) == most_of(following.steps_of(choice))


@pytest.mark.parametrize("recipe", [FULL_ON_SMOLLM, LORA_ON_SMOLLM], ids=["full", "lora"])
def test_where_every_parameter_persists_one_layer_is_followed_each_way(recipe: Recipe) -> None:
    recording = record(SMOLLM, recipe, layout(SMOLLM, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    script = course(recording, checkpointing=True, fetches=True).script
    limits = Limits(prefetch=1_000_000, live=1_000_000_000, reuse=0)
    runs = Gathering(script, recording.items, 2).schedule(limits, frozenset(range(len(recording.items.numel))))
    assert sum(run.times for run in runs if run.laps) == 2 * 30
    assert sum(run.laps is not None for run in runs) <= 2 * 2


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("recipe", [FULL_ON_SMOLLM, LORA_ON_SMOLLM], ids=["full", "lora"])
def test_with_room_for_two_layers_most_of_thirty_are_skipped(recipe: Recipe, checkpointing: bool) -> None:
    recording = record(SMOLLM, recipe, layout(SMOLLM, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    script = course(recording, checkpointing=checkpointing, fetches=True).script
    limits = Limits(prefetch=1_000_000, live=7_000_000, reuse=0)
    runs = Gathering(script, recording.items, 2).schedule(limits, frozenset())
    apart = recipe is LORA_ON_SMOLLM and not checkpointing
    assert sum(run.times for run in runs if run.laps) == 2 * (30 - apart)
    assert sum(run.laps is not None for run in runs) < 2 * 10


def test_a_view_goes_with_the_node_that_used_it_before_the_gradient_is_reduced() -> None:
    meter = Meter()
    engine = Stage3Engine(meter, TWO, shard(TWO, SMALL, 2), SMALL, num_ranks=2, itemsize=2)
    engine.follow([(Act.GATHER, (0,)), (Act.ARRIVE, (0,)), (Act.KEEP, (0,))])
    assert meter.by_kind[Kind.GATHERED_PARAMETERS] == 2 * 100
    engine.follow([(Act.DROP, (0,))])
    assert meter.by_kind[Kind.GATHERED_PARAMETERS] == 0
    assert meter.peak_bytes == 0, "what the gradient's hook needs comes after it"


def test_adapted_modules_gather_their_lora_a_and_prefetch_at_its_dropout() -> None:
    recording = record(SMOLLM, LORA_ON_SMOLLM, layout(SMOLLM, LORA_ON_SMOLLM), micro_batch=1, on_cpu=False)
    index = next(i for i, block in enumerate(recording.blocks) if block.laid.block.role == "layer")
    names, base = recording.blocks[index].modules.numbers, recording.items.base[index]
    owned, first = module_parameters(recording), module_bases(recording)[index]
    weights = recording.blocks[index].laid.weights
    lora_a = base + next(i for i, weight in enumerate(weights) if weight.module == "self_attn.q_proj.lora_A.default")
    assert owned[first + names["self_attn.q_proj"]] == (lora_a,)
    assert lora_a in owned[first + names["self_attn.q_proj.lora_A.default"]]
    assert first + names["self_attn.q_proj.lora_dropout.default"] not in owned


def test_the_wrapper_of_each_stacked_weight_gathers_it_with_its_adapter() -> None:
    shape = shape_of("deepseek-v2-lite")
    recipe = Recipe(model="deepseek-v2-lite", method="lora", train_batch_size=1, max_length=64)
    recording = record(shape, recipe, layout(shape, recipe), micro_batch=1, on_cpu=False, partitioned=True)
    index = next(i for i, block in enumerate(recording.blocks) if "mlp.experts" in block.modules.numbers)
    block, first = recording.blocks[index], module_bases(recording)[index]
    owned, base = module_parameters(recording), recording.items.base[index]
    for module, weight in (("mlp.experts", "down_proj"), ("mlp.experts.base_layer", "gate_up_proj")):
        numbers = owned[first + block.modules.numbers[module]]
        names = [block.laid.weights[number - base].name for number in numbers]
        stacked = f"mlp.experts.{weight}"
        assert names == [stacked, f"{stacked}.expert_lora_A", f"{stacked}.expert_lora_B"]
    assert first + block.modules.numbers["mlp.experts.base_layer.base_layer"] not in owned
    assert len(unread_numbers(recording)) == 6 * block.laid.repeat


def test_what_a_module_reads_without_owning_it_is_gathered_alone_once_even_on_one_rank() -> None:
    coordinator = Coordinator(
        Fetches.of([0, 0], {0: (0, 1)}, TWO.numel), Limits(prefetch=0, live=0, reuse=0), persistent=frozenset(),
        external=(), trainable=TWO.trainable, unread=frozenset({0, 1}), num_unread=1,
    )  # fmt: skip
    meter = Meter()
    engine = Stage3Engine(meter, TWO, shard(TWO, SMALL, 1), SMALL, num_ranks=1, itemsize=2)
    held = []
    for _ in range(2):
        engine.follow(coordinator.pre_module(0))
        held.append(meter.by_kind[Kind.GATHERED_PARAMETERS])
        engine.follow(coordinator.post_module(0))
    assert held == [2 * (100 + 4), 0]


def test_the_loss_gathers_the_head_where_it_reads_it_in_the_first_step_only() -> None:
    later, limits = two_modules(), Limits(prefetch=0, live=0, reuse=0)
    first = Coordinator(
        later.fetches, limits, persistent=frozenset(), external=(), trainable=TWO.trainable, num_unread=3
    )
    assert first.read_head((0,)) == ((Act.FETCH, (0,)),)
    assert first.read_head((0,)) == ((Act.RELEASE, (0,)),)
    assert later.read_head((0,)) == ()


@pytest.mark.parametrize(("ranks", "staged"), [(1, 0), (2, 2 * 50)])
def test_a_single_rank_copies_an_offloaded_parameter_once(ranks: int, staged: int) -> None:
    zero, meter = replace(SMALL, offload_param=OffloadParam(device="cpu")), Meter()
    engine = Stage3Engine(meter, TWO, shard(TWO, zero, ranks), zero, num_ranks=ranks, itemsize=2)
    engine.follow([(Act.GATHER, (0,))])
    assert meter.peak_bytes == 2 * 100 + staged


@pytest.mark.parametrize(("ranks", "staged"), [(1, 0), (2, 2 * 2)])  # the partition of one of two ranks
def test_offloaded_persistent_parameters_are_copied_before_they_are_gathered_again(ranks: int, staged: int) -> None:
    zero = replace(SMALL, offload_param=OffloadParam(device="cpu"))
    meter = Meter()
    Stage3Engine(meter, TWO, shard(TWO, zero, ranks), zero, num_ranks=ranks, itemsize=2).follow([(Act.UPDATE, ())])
    assert meter.peak_bytes == 2 * 4 + staged
