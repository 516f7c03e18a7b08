"""A few configurations against real DeepSpeed on two gloo ranks; the whole table is benchmarks/simulated_vs_real.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.simulate.conftest import question
from zplan import files
from zplan.simulate.report import SimulationReport
from zplan.simulate.request import SimulationRequest

SERVE = """
import json, os, sys
from pathlib import Path
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from zplan.simulate.worker import import_libraries
import_libraries()
from zplan import files
from zplan.simulate.reference import run_on_real_ranks, simulate_in_fork
from zplan.simulate.request import SimulationRequest
for line in sys.stdin:
    asked, folder = json.loads(line)
    request = files.from_data(SimulationRequest, asked, name="request")
    try:
        answer = [files.to_data(run(request, Path(folder))) for run in (simulate_in_fork, run_on_real_ranks)]
    except RuntimeError as error:
        answer = str(error)
    print(json.dumps(answer), file=answers, flush=True)
"""
"""Forks both from a process that has imported everything: three forks that import for themselves take three times as
long."""

Run = Callable[[SimulationRequest, Path], list[SimulationReport]]


@pytest.fixture(scope="module")
def both() -> Iterator[Run]:
    """Asks for the simulated and the real report of a request."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def ask(request: SimulationRequest, folder: Path) -> list[SimulationReport]:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(json.dumps([files.to_data(request), str(folder)]) + "\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            assert isinstance(answer, list), answer
            return [files.from_data(SimulationReport, report, name="report") for report in answer]

        try:
            yield ask
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "split"),
    [
        (1, {}), (2, {}), (3, {}), (2, {"shared": 2}), (3, {"shared": 2}), (3, {"cut": 2}),
        (2, {"recipe": {"method": "lora", "modules_to_save": ("embed_tokens",)}}),
        (3, {"recipe": {"method": "lora", "modules_to_save": ("lm_head",)}}),
    ],
)  # fmt: skip
def test_peaks_and_collectives_equal_those_of_real_ranks(
    both: Run, stage: int, split: dict[str, Any], tmp_path: Path
) -> None:
    """Data-parallel, with a shared sequence (Ulysses), with cut matrices (AutoTP), with a module that PEFT copies."""
    request = question(stage, **split, world_size=2, kind="cpu", cuda_answers=True, initialise=True)
    simulated, real = both(request, tmp_path)
    assert simulated.allocated_phases == real.allocated_phases
    assert simulated.collectives == real.collectives
