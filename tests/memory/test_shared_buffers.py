"""Parameters of ZeRO-3 that are fetched by all_reduce: views of one buffer, which goes with the last of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.formula_case import Case, cut_layers, request_of
from zplan.catalog.find import find_model
from zplan.memory.estimate import estimate_memory
from zplan.memory.gather import Part, without_update
from zplan.memory.shared_buffers import SharedBuffers
from zplan.model_shape import ModelShape
from zplan.zero_config import ZeroConfig


def test_a_buffer_is_there_as_long_as_one_of_its_parameters() -> None:
    shared = SharedBuffers(4)
    shared.gather((0, 1, 2), 3000)
    assert shared.has((0, 1, 2))
    assert shared.settle((0, 1, 2))
    assert not shared.settle((0, 1, 2))
    assert shared.release((0, 3)) == 0
    shared.keep((1,))
    assert shared.release((2,)) == 0  # the graph still has a view of another
    assert shared.forget((1,)) == 3000


def test_a_parameter_that_persists_holds_the_buffer_until_the_update() -> None:
    shared = SharedBuffers(4)
    shared.gather((0, 1), 1000)
    shared.gather((2, 3), 500)
    shared.release((0, 2))
    assert shared.give_back({0, 1}, set()) == 1000
    assert shared.give_back({0}, set()) == 0
    shared.keep((3,))
    assert shared.give_back(set(), {3}) == 500


def phases(*, by_all_reduce: bool, accumulation: int = 1) -> Mapping[Any, int]:
    """Of two layers of Mixtral, whose routers persist and are gathered with their experts in the first step."""
    case = Case(
        model="mixtral-8x7b", method="lora", layers=2, world_size=8, micro_batch=1, accumulation=accumulation,
        max_length=1024, checkpointing=True, loss="nll", attention="sdpa",
        zero=ZeroConfig(stage=3, stage3_use_all_reduce_for_fetch_params=by_all_reduce),
    )  # fmt: skip
    asked, whole = request_of(case), find_model(case.model)
    assert isinstance(whole, ModelShape)
    shape = cut_layers(whole, case.layers)
    return estimate_memory(shape, asked.recipe, asked.choice, asked.cluster).gpu.phases


def test_what_was_gathered_together_stays_with_the_router_of_a_recomputation_until_the_update() -> None:
    experts = 2 * 8 * 3 * 14336 * 4096  # of one layer
    plain, reduced = phases(by_all_reduce=False), phases(by_all_reduce=True)
    assert reduced["step"] - plain["step"] >= experts // 2
    again = phases(by_all_reduce=True, accumulation=2)
    assert again["forward"] - reduced["forward"] >= 2 * experts  # the first micro-step left them, and both are there


def test_they_are_given_back_before_the_norm_of_the_gradients_is_taken() -> None:
    """The last calls are the update, the end of the update, and the end of the phase: two moments each."""
    first, last = Part((70, 70), times=3), Part((90, 80, 50, 50, 50, 60, 0, 0))
    same, update = without_update((first, last), 50)
    assert same is first
    assert update.moments == (90, 80, 50, 0, 0, 60, 0, 0)
