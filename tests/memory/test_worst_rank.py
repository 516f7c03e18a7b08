"""ZeRO-1 and 2: the estimate of no rank in particular is that of the rank which holds most."""

from __future__ import annotations

import pytest

from benchmarks.formula_case import cut_layers, request_of
from benchmarks.fresh_draws import any_case, wide_case
from zplan.catalog.find import find_model
from zplan.memory.estimate import estimate_memory
from zplan.model_shape import ModelShape

MOST_BELOW = 0.01
"""Of the largest rank's peak; not all ranks of many are looked at (stage12.worst_ranks)."""


@pytest.mark.parametrize("seed", [21, 22])
def test_no_rank_holds_more_than_is_said(seed: int) -> None:
    compared = 0
    for number in range(200):
        case = (wide_case if number % 2 else any_case)(seed, number)
        if case.zero.stage not in (1, 2) or not 2 <= case.world_size <= 8:
            continue
        asked, found = request_of(case), find_model(case.model)
        assert isinstance(found, ModelShape)
        question = cut_layers(found, case.layers), asked.recipe, asked.choice, asked.cluster
        said = estimate_memory(*question).gpu.phases
        for rank in range(case.world_size):
            of_rank = estimate_memory(*question, rank=rank).gpu.phases
            assert all(of_rank[phase] <= (1 + MOST_BELOW) * said[phase] for phase in of_rank), (case, rank)
        compared += 1
    assert compared > 20
