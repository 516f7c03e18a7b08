"""The simulated backend keeps the contract; where it cannot simulate, the formula answers under its own label."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.backends.contract import BackendContract
from tests.shapes import described_cluster
from tests.simulate.conftest import TINY_LLAMA, question
from zplan.backends import simulated
from zplan.backends.formula import FormulaBackend
from zplan.candidates import Fixed
from zplan.catalog import find_model
from zplan.commands import simulate as command
from zplan.errors import ExitCode
from zplan.job import Job
from zplan.model_shape import ModelShape
from zplan.simulate.client import WorkerClient
from zplan.simulate.report import SimulationError
from zplan.trial import Outcome, TrialSpec


def shape_with(**config: object) -> ModelShape:
    """SmolLM's shape, for the formula; what is simulated is the tiny model of `config`."""
    shape = find_model("smollm2-135m")
    assert isinstance(shape, ModelShape)
    return replace(shape, config={**TINY_LLAMA, **config})


def tiny_spec() -> TrialSpec:
    asked = question(2)
    cluster = described_cluster(gpus_per_node=4)
    return TrialSpec(recipe=asked.recipe, choice=asked.choice, cluster=cluster, model_path="none")


class TestContract(BackendContract):
    @pytest.fixture
    def backend(self, worker: WorkerClient) -> simulated.SimulatedBackend:
        return simulated.SimulatedBackend(shape_with(), worker=worker)

    @pytest.fixture
    def spec(self) -> TrialSpec:
        return tiny_spec()


def test_a_model_that_cannot_be_simulated_is_answered_by_formula(worker: WorkerClient) -> None:
    shape = shape_with(model_type="brand_new")
    result = simulated.SimulatedBackend(shape, worker=worker).run(tiny_spec())
    assert result.evidence == "formula"
    assert result.gpu_allocated_bytes == FormulaBackend(shape).run(tiny_spec()).gpu_allocated_bytes
    assert "trust_remote_code" in result.message


def test_what_a_library_refuses_is_a_bad_configuration(worker: WorkerClient) -> None:
    result = simulated.SimulatedBackend(shape_with(model_type="bloom"), worker=worker).run(tiny_spec())
    assert (result.outcome, result.evidence) == (Outcome.BAD_CONFIG, "simulated")


def test_host_memory_that_is_too_small_is_said(worker: WorkerClient) -> None:
    spec = tiny_spec()
    host = replace(spec.cluster.host, available_bytes=1 << 20)
    result = simulated.SimulatedBackend(shape_with(), worker=worker).run(
        replace(spec, cluster=replace(spec.cluster, host=host))
    )
    assert result.outcome is Outcome.HOST_OOM
    assert "host memory is short by" in result.message


def test_the_command_falls_back_to_the_formula_and_names_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise SimulationError("Router: aten.nonzero.default depends on values", module="Router", operation="nonzero")

    monkeypatch.setattr(command, "run_simulation", stop)
    spec = tiny_spec()
    job = Job(shape=shape_with(), recipe=spec.recipe, cluster=spec.cluster, fixed=Fixed(), choice=spec.choice)
    answer = command.simulate(job, steps=2, trace=None, quiet=False)
    assert answer.code is ExitCode.OK
    assert answer.data()["evidence"] == "formula"
    assert answer.data()["simulation_error"]["module"] == "Router"
