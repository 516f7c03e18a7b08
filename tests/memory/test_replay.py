"""Three tables, added, are one engine: what each of them leaves out does not change the others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.choices import BATCH, FULL_ON_SMOLLM, LORA_ON_SMOLLM, SMOLLM, choices
from zplan.memory.coordinator import Act, Coordinator
from zplan.memory.course import course
from zplan.memory.exchange import PLAIN, Exchange
from zplan.memory.fetch_limits import Limits
from zplan.memory.gather import Gathering
from zplan.memory.instances import instances
from zplan.memory.memo import Memo
from zplan.memory.meter import Kind, Meter
from zplan.memory.replay import Gradients, Replay, replay_of
from zplan.memory.script import STEP_PHASES, Course, Op
from zplan.memory.shards import shard
from zplan.memory.stage3 import Stage3Engine
from zplan.memory.sub_groups import swapped_parameters
from zplan.memory.timeline import record
from zplan.memory.trainable import layout
from zplan.recipe import Recipe
from zplan.zero_config import Choice, OffloadDevice, OffloadOptimizer, ZeroConfig


def whole_engine_peaks(walked: Course, recipe: Recipe, choice: Choice) -> dict[str, int]:
    """One ZeRO-3 engine that follows every call of a step, its bytes counted together with those outside it."""
    items, ranks, script = instances(layout(SMOLLM, recipe)), choice.batch.world_size, walked.script
    shards, meter = shard(items, choice.zero, ranks), Meter()
    coordinator = Coordinator(
        script.fetches, Limits.of(choice.zero), persistent=shards.persistent, external=script.external,
        trainable=items.trainable,
    )  # fmt: skip
    hooks = {
        Op.PRE_MODULE: coordinator.pre_module,
        Op.POST_MODULE: coordinator.post_module,
        Op.KEPT_MODULE: coordinator.kept_module,
        Op.RECOMPUTED_MODULE: coordinator.recomputed_module,
        Op.END_RECOMPUTED: lambda _: coordinator.end_recomputed(),
    }
    exchange = Exchange.of(recipe).for_batch(choice.batch, recipe.weight_bytes)
    engine = Stage3Engine(
        meter, items, shards, choice.zero, num_ranks=ranks, itemsize=recipe.weight_bytes, exchange=exchange,
        swapped=swapped_parameters(items, choice.zero, ranks),
    )  # fmt: skip
    act = {
        Op.NOTHING: lambda _: None,
        Op.BEGIN: lambda _: engine.begin_micro_step(),
        Op.READ_HEAD: lambda _: None,  # of the first step alone
        Op.GRADIENT: engine.gradient,
        Op.STEP: lambda _: engine.step(),
        Op.END_STEP: lambda _: engine.follow([(Act.UPDATE, ())]),
    }
    if choice.batch.gradient_accumulation_steps > 1:
        engine.cut_all_again()
    peaks = dict.fromkeys(STEP_PHASES, 0)
    firsts = (*script.phases, len(script.calls))
    for number, (op, argument) in enumerate(script.calls):
        phase = STEP_PHASES[next(index for index in range(3) if firsts[index] <= number < firsts[index + 1])]
        meter.mark()
        before = meter.peak_bytes
        if op in hooks:
            engine.follow(hooks[op](argument))
        elif op == Op.END_BACKWARD:
            engine.end_backward()
            engine.follow([(Act.GIVE_BACK, ())])
        else:
            if op == Op.GRADIENT:
                engine.follow([(Act.DROP, (argument,))])
            act[op](argument)
        moments = (walked.moments[2 * number] + before, walked.moments[2 * number + 1] + meter.peak_bytes)
        peaks[phase] = max(peaks[phase], *moments)
    return peaks


@pytest.mark.parametrize("recipe", [FULL_ON_SMOLLM, LORA_ON_SMOLLM], ids=["full", "lora"])
@settings(max_examples=15, deadline=None)
@given(choice=choices())
def test_gathered_parameters_and_gradients_followed_apart_add_up_to_one_engine(recipe: Recipe, choice: Choice) -> None:
    choice = replace(choice, zero=replace(choice.zero, stage=3))
    recording = record(
        SMOLLM, recipe, layout(SMOLLM, recipe), micro_batch=choice.batch.train_micro_batch_size_per_gpu, on_cpu=False,
        sequence_parallel_size=choice.batch.sequence_parallel_size,
    )  # fmt: skip
    walked = course(recording, checkpointing=choice.gradient_checkpointing, fetches=True)
    replay = Replay(walked.script, recording.items, recipe.weight_bytes, None)
    gathering = Gathering(walked.script, recording.items, recipe.weight_bytes)
    replay.gathered = lambda choice: ((gathering.steps_of(choice)[0][0], 0),)
    apart = replay.peaks(walked, choice)
    whole = whole_engine_peaks(walked, recipe, choice)
    assert {phase: sum(kinds) for phase, kinds in apart.items()} == whole


@dataclass(frozen=True)
class Question:
    stage: int
    bucket: int
    zero: ZeroConfig = field(default_factory=ZeroConfig)


def test_a_memo_asks_again_only_when_a_value_that_was_read_has_changed() -> None:
    asked: list[int] = []

    def formula(question: Question) -> int:
        asked.append(question.stage)
        return question.bucket if question.stage else question.zero.offload_param.buffer_count

    memo = Memo(formula, most_kept=8)
    assert [memo(Question(0, bucket)) for bucket in (1, 2, 3)] == [5, 5, 5]
    assert asked == [0], "the bucket is not read at stage 0"
    assert [memo(Question(1, bucket)) for bucket in (1, 2, 1)] == [1, 2, 1]
    assert asked == [0, 1, 1]


def test_a_memo_bears_a_formula_that_remembers_something_itself() -> None:
    """Its second answer reads less, or reads the same in another order."""
    known: dict[int, int] = {}

    def formula(question: Question) -> int:
        if question.stage not in known:
            known[question.stage] = question.zero.sub_group_size
        return known[question.stage] + question.bucket

    memo = Memo(formula, most_kept=8)
    size = ZeroConfig().sub_group_size
    assert [memo(Question(2, bucket)) for bucket in (1, 2, 1, 2, 3)] == [size + n for n in (1, 2, 1, 2, 3)]


@settings(max_examples=200, deadline=None)
@given(questions=st.lists(st.tuples(*[st.integers(0, 2)] * 4), max_size=30), start=st.integers(0, 3))
def test_a_memo_is_its_formula_and_asks_once_for_what_is_read(
    questions: list[tuple[int, int, int, int]], start: int
) -> None:
    """Which attribute is read next depends on the last one's value, until one is read twice."""

    @dataclass(frozen=True)
    class Four:
        a: int
        b: int
        c: int
        d: int

    def follow(question: Four) -> tuple[tuple[str, int], ...]:
        reads: dict[str, int] = {}
        name = "abcd"[start]
        while name not in reads:
            reads[name] = getattr(question, name)
            name = "abcd"["abcd".index(name) - reads[name]]
        return tuple(reads.items())

    asked: list[tuple[tuple[str, int], ...]] = []

    def formula(question: Four) -> tuple[tuple[str, int], ...]:
        asked.append(follow(question))
        return asked[-1]

    memo = Memo(formula, most_kept=1000)
    asks = [Four(*values) for values in questions]
    assert [memo(question) for question in asks] == [follow(question) for question in asks]
    assert len(asked) == len(set(asked))


def test_a_memo_forgets_everything_when_it_is_full() -> None:
    memo = Memo(lambda question: question.bucket, most_kept=2)
    assert [memo(Question(1, bucket)) for bucket in (1, 2, 3, 1)] == [1, 2, 3, 1]


def test_peaks_name_what_they_are_made_of() -> None:
    choice = Choice(zero=ZeroConfig(stage=3), batch=replace(BATCH, world_size=4))
    recording = record(SMOLLM, FULL_ON_SMOLLM, layout(SMOLLM, FULL_ON_SMOLLM), micro_batch=1, on_cpu=False)
    walked = course(recording, checkpointing=True, fetches=True)
    peaks = replay_of(walked.script, recording.items, 2, None).peaks(walked, choice)
    assert peaks["forward"][Kind.GATHERED_PARAMETERS] > 0
    assert peaks["backward"][Kind.LOSS] > 0, "the loss is the largest moment of so short a model"
    assert peaks["step"][Kind.TEMPORARIES] > 0
    assert peaks["step"][Kind.LOSS] == peaks["step"][Kind.GATHERED_PARAMETERS] == 0


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_zero_1_keeps_every_gradient_until_the_last_micro_step(accumulation: int) -> None:
    """Under overlap_comm the last one gives back what its hooks reduce, into two buckets that are large enough."""
    bucket, laid = 200_000_000, layout(SMOLLM, FULL_ON_SMOLLM)
    zero = ZeroConfig(stage=1, overlap_comm=True, reduce_bucket_size=bucket)
    choice = Choice(zero=zero, batch=replace(BATCH, gradient_accumulation_steps=accumulation))
    recording = record(SMOLLM, FULL_ON_SMOLLM, laid, micro_batch=1, on_cpu=False)
    reduction = course(recording, checkpointing=True, fetches=False).script.reduction
    held = Gradients(reduction, instances(laid), 2, 0, PLAIN).held(choice)
    end = reduction.calls.index((Op.END_BACKWARD, 0))
    last = 2 * instances(laid).numel[reduction.calls[end - 1][1]]
    buckets, every = 2 * 2 * bucket, 2 * SMOLLM.num_parameters
    at_last, before_epilogue = held.moments[2 * end - 1], held.moments[2 * end]
    if accumulation == 1:
        assert (at_last, before_epilogue) == (buckets + last, buckets)
    else:
        added = last if accumulation > 2 else 0  # beside the gradient of the micro-steps before
        assert (at_last, before_epilogue) == (buckets + every + added, buckets + every)


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_a_backward_of_zero_3_is_shared_by_sub_groups_that_swap_the_same(
    device: OffloadDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked together or each alone, every size of sub-groups has its own update."""
    laid = layout(SMOLLM, FULL_ON_SMOLLM)
    recording = record(SMOLLM, FULL_ON_SMOLLM, laid, micro_batch=1, on_cpu=False)
    script = course(recording, checkpointing=True, fetches=True).script
    reductions: list[int] = []
    reduce = Stage3Engine.end_backward
    monkeypatch.setattr(Stage3Engine, "end_backward", lambda engine: reductions.append(1) or reduce(engine))
    sizes = (1, 30_000_000, 1_000_000_000)
    zeros = [ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device=device), sub_group_size=n) for n in sizes]
    asked = [Choice(zero=zero, batch=BATCH) for zero in zeros]
    together = Gradients(script.reduction, instances(laid), 2, None, PLAIN)
    held = [together.held(choice) for choice in asked]
    swaps = {swapped_parameters(instances(laid), zero, BATCH.world_size) for zero in zeros}
    assert len(reductions) == len(swaps) == (2 if device == "nvme" else 1)
    alone = [Gradients(script.reduction, instances(laid), 2, None, PLAIN).held(choice) for choice in asked]
    assert [(one.moments, one.kinds) for one in held] == [(one.moments, one.kinds) for one in alone]
    assert all(len(one.moments) == 2 * len(script.reduction.calls) for one in held)
    assert len({one.moments for one in held}) == {"none": 3, "cpu": 1, "nvme": 2}[device]
