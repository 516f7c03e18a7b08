"""A few configurations against real DeepSpeed on two gloo ranks; the whole table is benchmarks/simulated_vs_real.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulate.conftest import question
from zplan.simulate.reference import run_on_real_ranks, simulate_in_fork


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "shared"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)])
def test_peaks_and_collectives_equal_those_of_real_ranks(stage: int, shared: int, tmp_path: Path) -> None:
    request = question(stage, shared=shared, world_size=2, kind="cpu", cuda_answers=True, initialise=True)
    simulated, real = simulate_in_fork(request, tmp_path), run_on_real_ranks(request, tmp_path)
    assert simulated.allocated_phases == real.allocated_phases
    assert simulated.collectives == real.collectives
