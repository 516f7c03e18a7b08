"""Many choices at once are the same bytes as one at a time, over the whole space of choices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.choices import FULL_ON_SMOLLM, GPT2, LORA_ON_SMOLLM, SMOLLM, choices
from tests.shapes import llama_like
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import estimate_memory, standing
from zplan.memory.least import cannot_fit, least_need
from zplan.memory.many import Estimates, Estimator
from zplan.memory.terms import PHASES, VERDICTS, MemoryEstimate
from zplan.memory.trainable import layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.zero_config import Choice

GIB = 1 << 30
HOST = Host(total_bytes=64 * GIB, available_bytes=20 * GIB, nvme_path="/nvme", nvme_free_bytes=3 * GIB)
ON_GPUS = Cluster(
    gpu=Gpu(name="small", kind="cuda", total_bytes=6 * GIB, free_bytes=5 * GIB), host=HOST, gpus_per_node=4
)
ON_CPU_RANKS = Cluster(
    gpu=Gpu(name="cpu", kind="cpu", total_bytes=6 * GIB, free_bytes=5 * GIB), host=HOST, gpus_per_node=4
)
FULL_ON_GPT2 = Recipe(model="gpt2", train_batch_size=64, max_length=300, dtype="fp32", loss="full", attention="eager")
QUESTIONS = {
    "full": (SMOLLM, FULL_ON_SMOLLM, ON_GPUS),
    "lora": (SMOLLM, LORA_ON_SMOLLM, ON_GPUS),
    "qlora": (SMOLLM, replace(LORA_ON_SMOLLM, method="qlora", optimizer="paged_adamw_8bit"), ON_GPUS),
    "CPU ranks": (SMOLLM, FULL_ON_SMOLLM, ON_CPU_RANKS),
    "tied, fp32": (GPT2, FULL_ON_GPT2, ON_GPUS),
}


def row(many: Estimates, index: int) -> dict[str, object]:
    """One choice out of the columns, by the names of a MemoryEstimate."""
    ranges = (many.gpu.allocated, many.gpu.reserved, many.gpu.used)
    return {
        "phases": {phase: many.phases[phase][index] for phase in PHASES},
        "ranges": [(part.low[index], part.expected[index], part.high[index]) for part in ranges],
        "gpu": (VERDICTS[many.gpu_level[index]], many.gpu_short_bytes[index]),
        "host": (
            VERDICTS[many.host_level[index]], many.host_short_bytes[index], many.host_resident_bytes[index],
            many.host_pinned_bytes[index],
        ),
        "nvme": (VERDICTS[many.nvme_level[index]], many.nvme_bytes[index]),
    }  # fmt: skip


def alone(estimate: MemoryEstimate) -> dict[str, object]:
    """The same of one estimate."""
    gpu, host, nvme = estimate.gpu, estimate.host, estimate.nvme
    return {
        "phases": dict(gpu.phases),
        "ranges": [(part.low, part.expected, part.high) for part in (gpu.allocated, gpu.reserved, gpu.used)],
        "gpu": (gpu.verdict, gpu.short_bytes),
        "host": (host.verdict, host.short_bytes, host.resident_bytes, host.pinned_bytes),
        "nvme": (nvme.verdict, nvme.bytes),
    }


@pytest.mark.parametrize(("shape", "recipe", "cluster"), QUESTIONS.values(), ids=QUESTIONS)
@settings(max_examples=20, deadline=None)
@given(asked=st.lists(choices(), min_size=1, max_size=6))
def test_every_column_is_the_estimate_of_one_choice_to_the_byte(
    shape: ModelShape, recipe: Recipe, cluster: Cluster, asked: list[Choice]
) -> None:
    many = Estimator(shape, recipe, cluster).estimate(asked)
    for index, choice in enumerate(asked):
        assert row(many, index) == alone(estimate_memory(shape, recipe, choice, cluster))


@pytest.mark.parametrize(("shape", "recipe", "cluster"), QUESTIONS.values(), ids=QUESTIONS)
@settings(max_examples=20, deadline=None)
@given(choice=choices())
def test_what_cannot_fit_by_its_states_alone_is_never_said_to_fit(
    shape: ModelShape, recipe: Recipe, cluster: Cluster, choice: Choice
) -> None:
    estimate = estimate_memory(shape, recipe, choice, cluster)
    verdicts = {estimate.gpu.verdict, estimate.host.verdict, estimate.nvme.verdict}
    assert not (cannot_fit(shape, recipe, choice, cluster) and verdicts == {"fits"})
    tier, short = max(map(VERDICTS.index, verdicts)), estimate.gpu.short_bytes + estimate.host.short_bytes
    need = least_need(shape, recipe, choice, cluster)
    assert need <= (tier, short if tier == 2 else 0)
    assert cannot_fit(shape, recipe, choice, cluster) == (need[0] > 0)


@pytest.mark.parametrize(("shape", "recipe", "cluster"), QUESTIONS.values(), ids=QUESTIONS)
@settings(max_examples=20, deadline=None)
@given(choice=choices())
def test_what_is_held_all_the_time_is_the_same_with_recomputation(
    shape: ModelShape, recipe: Recipe, cluster: Cluster, choice: Choice
) -> None:
    """`standing_of` and the planner keep it without asking which."""
    laid = layout(shape, recipe)
    on, off = (
        standing(laid, recipe, replace(choice, gradient_checkpointing=recomputes), cluster, None)
        for recomputes in (True, False)
    )
    assert on == off


@settings(max_examples=20, deadline=None)
@given(first=choices(), then=choices(), rank=st.integers(0, 3))
def test_an_estimator_that_was_asked_before_answers_as_a_new_one(first: Choice, then: Choice, rank: int) -> None:
    """What it remembers of one choice never leaks into another."""
    first, then = (replace(item, batch=replace(item.batch, world_size=6)) for item in (first, then))
    used = Estimator(SMOLLM, FULL_ON_SMOLLM, ON_GPUS, rank=rank)
    used.estimate([first])
    estimate = estimate_memory(SMOLLM, FULL_ON_SMOLLM, then, ON_GPUS, rank=rank)
    assert row(used.estimate([then, first]), 0) == alone(estimate)


@settings(max_examples=30, deadline=None)
@given(choice=choices(), autotp_size=st.sampled_from([1, 2, 4]))
def test_a_part_of_the_model_is_the_estimate_of_one_choice_too(choice: Choice, autotp_size: int) -> None:
    """AutoTP: all that reads the shape reads the part of a rank."""
    batch = replace(choice.batch, world_size=4, autotp_size=autotp_size, sequence_parallel_size=1)
    asked = [replace(choice, batch=replace(batch, autotp_size=1)), replace(choice, batch=batch)]
    shape, recipe = llama_like(), Recipe(model="any", train_batch_size=64, max_length=128, loss="full")
    many = Estimator(shape, recipe, ON_GPUS).estimate(asked)
    for index, one in enumerate(asked):
        assert row(many, index) == alone(estimate_memory(shape, recipe, one, ON_GPUS))
