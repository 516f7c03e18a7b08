"""A few configurations against real DeepSpeed on two gloo ranks; the whole table is benchmarks/simulated_vs_real.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.simulate.conftest import question
from zplan.simulate.reference import run_on_real_ranks, simulate_in_fork


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "split"),
    [
        (1, {}), (2, {}), (3, {}), (2, {"shared": 2}), (3, {"shared": 2}), (3, {"cut": 2}),
        (2, {"recipe": {"method": "lora", "modules_to_save": ("embed_tokens",)}}),
        (3, {"recipe": {"method": "lora", "modules_to_save": ("lm_head",)}}),
    ],
)  # fmt: skip
def test_peaks_and_collectives_equal_those_of_real_ranks(stage: int, split: dict[str, Any], tmp_path: Path) -> None:
    """Data-parallel, with a shared sequence (Ulysses), with cut matrices (AutoTP), with a module that PEFT copies."""
    request = question(stage, **split, world_size=2, kind="cpu", cuda_answers=True, initialise=True)
    simulated, real = simulate_in_fork(request, tmp_path), run_on_real_ranks(request, tmp_path)
    assert simulated.allocated_phases == real.allocated_phases
    assert simulated.collectives == real.collectives
