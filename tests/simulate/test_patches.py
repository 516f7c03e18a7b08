"""What a patch answers in DeepSpeed's place is what DeepSpeed answers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    ZeRoTraceMode,
    iter_params,
)

from zplan.simulate.listing import counted_parameters, listed_parameters
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


MODEL = torch.nn.Linear(2, 2)
OTHER = torch.nn.Parameter(torch.zeros(2))
BOTH = [MODEL.weight, MODEL.bias]


@pytest.mark.parametrize(
    ("groups", "refused"),
    [([BOTH], ""), ([[*BOTH, OTHER, OTHER]], ""), ([[*BOTH, MODEL.bias]], "bias"), ([BOTH, [MODEL.weight]], "weight")],
    ids=["each once", "one that is not the model's twice", "twice in a group", "in two groups"],
)
def test_an_optimizer_that_has_a_parameter_twice_is_refused_as_deepspeed_does(
    groups: list[list[torch.nn.Parameter]], refused: str
) -> None:
    optimizer = SimpleNamespace(param_groups=[{"params": group} for group in groups])
    for check in (DeepSpeedEngine._check_for_duplicates, counted_parameters(DeepSpeedEngine._check_for_duplicates)):
        if refused:
            with pytest.raises(AssertionError, match=f"name: {refused} occurs"):
                check(SimpleNamespace(module=MODEL), optimizer)
        else:
            check(SimpleNamespace(module=MODEL), optimizer)


def test_an_optimizer_that_has_each_parameter_once_is_not_searched_for_every_one_of_them() -> None:
    def search(engine: Any, optimizer: Any) -> None:
        raise RuntimeError("searched")

    counted_parameters(search)(None, SimpleNamespace(param_groups=[{"params": BOTH}]))
