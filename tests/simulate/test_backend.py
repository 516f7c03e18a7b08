"""The simulated backend keeps the contract; where it cannot simulate, the formula answers under its own label."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from tests.backends.contract import BackendContract
from tests.shapes import described_cluster
from tests.simulate.conftest import TINY_LLAMA, question
from zplan.backends import simulated
from zplan.backends.formula import FormulaBackend
from zplan.candidates import Fixed
from zplan.catalog import find_model
from zplan.commands import Answer
from zplan.commands import simulate as command
from zplan.errors import ExitCode
from zplan.hardware import Host
from zplan.job import Job
from zplan.memory.host import PROCESS_CUDA
from zplan.model_shape import ModelShape
from zplan.planner import evaluate
from zplan.simulate.client import WorkerClient
from zplan.simulate.report import SimulationError
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.units import format_seconds
from zplan.zero_config import OffloadOptimizer, ZeroConfig


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


def test_cpu_ranks_run_out_of_memory_where_their_tensors_exceed_their_share(worker: WorkerClient) -> None:
    """To the byte: the share of a rank is what a device's memory is."""
    spec = tiny_spec()

    def simulated_with(share: int) -> TrialResult:
        gpu = replace(spec.cluster.gpu, kind="cpu", total_bytes=share, free_bytes=share)
        return simulated.SimulatedBackend(shape_with(), worker=worker).run(
            replace(spec, cluster=replace(spec.cluster, gpu=gpu))
        )

    needed = simulated_with(1 << 40).gpu_allocated_bytes
    assert needed
    assert simulated_with(needed).outcome is Outcome.OK
    short = simulated_with(needed - 1)
    assert (short.outcome, short.gpu_allocated_bytes) == (Outcome.GPU_OOM, needed)
    assert "a CPU rank holds" in short.message


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


def simulated_answer(worker: WorkerClient, monkeypatch: pytest.MonkeyPatch, *, zero: ZeroConfig, host: Host) -> Answer:
    """`zplan simulate` of the tiny model on a described card."""
    monkeypatch.setattr(command, "run_simulation", partial(simulated.simulate, worker=worker))
    spec = tiny_spec()
    job = Job(
        shape=shape_with(), recipe=spec.recipe, cluster=replace(spec.cluster, host=host), fixed=Fixed(),
        choice=replace(spec.choice, zero=zero),
    )  # fmt: skip
    return command.simulate(job, steps=2, trace=None, quiet=False)


def test_a_drive_that_is_too_small_does_not_fit_in_a_simulation_either(
    worker: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = OffloadOptimizer(device="nvme", nvme_path="/nvme")
    host = replace(tiny_spec().cluster.host, nvme_path="/nvme", nvme_free_bytes=100 << 20)
    answer = simulated_answer(worker, monkeypatch, zero=ZeroConfig(stage=3, offload_optimizer=offload), host=host)
    assert answer.code is ExitCode.DOES_NOT_FIT
    assert answer.data()["nvme"]["verdict"] == "does_not_fit"
    assert "NVMe is short by" in printed(answer)


def test_a_container_that_is_too_small_does_not_fit_in_a_simulation_either(
    worker: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = replace(tiny_spec().cluster.host, cgroup_limit_bytes=1 << 30)
    answer = simulated_answer(worker, monkeypatch, zero=ZeroConfig(stage=2), host=host)
    data = answer.data()["host"]
    assert answer.code is ExitCode.DOES_NOT_FIT
    assert (data["verdict"], data["short_bytes"]) == ("does_not_fit", data["resident_bytes"] - (1 << 30))
    assert "cgroup allows 1.00 GiB" in printed(answer)


def test_a_host_that_cannot_read_the_weights_does_not_fit_in_a_simulation_either(
    worker: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that are simulated take no more of it than the processes; the estimate counts the files, too."""
    spec = tiny_spec()
    roomy = simulated_answer(worker, monkeypatch, zero=ZeroConfig(stage=3), host=spec.cluster.host)
    candidate = evaluate(shape_with(), spec.recipe, replace(spec.choice, zero=ZeroConfig(stage=3)), spec.cluster)
    reading = candidate.memory.host.phases["load"]
    simulated_bytes = 4 * (PROCESS_CUDA + max(roomy.data()["simulation"]["host_phases"].values()))
    assert roomy.code is ExitCode.OK
    assert roomy.data()["host"]["resident_bytes"] == reading > simulated_bytes
    small = replace(spec.cluster.host, total_bytes=reading - 1, available_bytes=reading - 1)
    short = simulated_answer(worker, monkeypatch, zero=ZeroConfig(stage=3), host=small)
    assert (short.code, short.data()["host"]["short_bytes"]) == (ExitCode.DOES_NOT_FIT, 1)
    assert "by formula, short by 1 B" in printed(short)


def test_a_simulation_tells_the_predicted_step_time_and_that_it_is_the_formulas(
    worker: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = simulated_answer(worker, monkeypatch, zero=ZeroConfig(stage=2), host=tiny_spec().cluster.host)
    speed = answer.data()["speed"]
    assert (answer.code, speed["evidence"]) == (ExitCode.OK, "formula")
    assert f"{speed['tokens_per_second']:,.0f} tokens/s, {format_seconds(speed['step_seconds'])} a step" in printed(
        answer
    )


def printed(answer: Answer) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(answer.text)
    return capture.get()
