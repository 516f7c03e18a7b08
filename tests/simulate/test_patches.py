"""What a patch answers in DeepSpeed's place is what DeepSpeed answers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    ZeRoTraceMode,
    iter_params,
)

from zplan.simulate.listing import listed_parameters
from zplan.zero3_trace import METHOD, PREFIX, params_to_release

ORIGINAL = vars(PartitionedParameterCoordinator)[METHOD]


def modules() -> list[torch.nn.Module]:
    """Five products, of which two share a weight; a norm that persists; one without parameters."""
    linears = [torch.nn.Linear(8, 8, bias=False) for _ in range(5)]
    linears[3].weight = linears[0].weight
    order = [linears[0], torch.nn.LayerNorm(8), linears[1], torch.nn.ReLU(), *linears[2:]]
    found: dict[torch.nn.Parameter, int] = {}
    for module in order:
        vars(module)["ds_external_parameters"] = tuple  # none; the engine gives modules this method
        for parameter in module.parameters():
            number = found.setdefault(parameter, len(found))
            parameter.ds_id, parameter.ds_numel, parameter.ds_persist = number, parameter.numel(), parameter.dim() == 1  # type: ignore[attr-defined]
    return order


def coordinator(order: list[torch.nn.Module], reuse_distance: int, mode: ZeRoTraceMode) -> Any:
    made = object.__new__(PartitionedParameterCoordinator)
    for name, value in (
        ("submodule_order", order),
        ("max_reuse_dist_in_numel", reuse_distance),
        ("trace_mode", mode),
        ("most_recent_step_id_param_fetched_for", defaultdict(lambda: -1, {order[2].weight: 4})),
    ):
        setattr(made, PREFIX + name, value)
    return made


def test_what_a_module_may_release_is_as_deepspeed_says() -> None:
    order = modules()
    sizes = set()
    for distance in (0, 64, 200, 1000):
        made = coordinator(order, distance, ZeRoTraceMode.COMPLETE)
        ours = params_to_release(ORIGINAL, listed_parameters(iter_params))
        for step, module in enumerate(order):
            for asked in {step, 0, len(order)}:
                assert ours(made, module, asked) == ORIGINAL(made, module, asked)
                sizes.add(len(ours(made, module, asked)))
    assert sizes == {0, 1}


def test_the_same_question_has_the_same_set_because_the_caller_adds_to_it() -> None:
    order = modules()
    made = coordinator(order, 64, ZeRoTraceMode.COMPLETE)
    ours = params_to_release(ORIGINAL, listed_parameters(iter_params))
    for module in order:
        ours(made, module, 1).add(77)
        assert 77 in ours(made, module, 1)


def test_a_trace_that_is_not_complete_is_still_refused() -> None:
    order = modules()
    made = coordinator(order, 64, ZeRoTraceMode.RECORD)
    ours = params_to_release(ORIGINAL, listed_parameters(iter_params))
    for module in order:
        with pytest.raises(RuntimeError, match="expected trace to be complete"):
            ours(made, module, 0)
