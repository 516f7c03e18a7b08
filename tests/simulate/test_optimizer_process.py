"""The thread that stands in for SuperOffload's process: it runs when it has a task, and only then."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulate.conftest import question
from zplan.simulate.client import WorkerClient
from zplan.simulate.optimizer_process import OptimizerProcesses
from zplan.simulate.report import SimulationError
from zplan.simulate.tracker import Tracker
from zplan.zero_config import OffloadOptimizer

SUPER = OffloadOptimizer(device="cpu", super_offload=True)


def test_a_task_is_done_when_put_returns_and_an_empty_one_ends_the_thread() -> None:
    log: list[Any] = []

    def serve(tasks: Any, results: Any) -> None:
        log.append("started")
        while (task := tasks.get()) is not None:
            log.append(task)
            results.put(-task)
        log.append("ended")

    processes = OptimizerProcesses(Tracker({"cpu": "host"}), ())
    context = processes.get_context("spawn")
    tasks, results = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=serve, args=(tasks, results), daemon=True)
    process.start()
    assert log == ["started"]
    for task in (1, 2):
        tasks.put(task)
        assert log[-1] == task
        assert results.get() == -task
    assert results.empty()
    assert process.is_alive()
    processes.close()
    assert log == ["started", 1, 2, "ended"]
    assert not process.is_alive()


def test_the_process_is_named_among_what_is_replaced_and_two_answers_are_equal(worker: WorkerClient) -> None:
    first, second = (worker.ask(question(3, zero={"offload_optimizer": SUPER})) for _ in range(2))
    assert any("optimizer process" in line for line in first.replaced)
    assert not any("Muon" in line or "bitsandbytes" in line for line in first.replaced), "no part of this run"
    assert first.pinned_phases == second.pinned_phases
    assert first.allocated_phases == second.allocated_phases


def test_cpu_ranks_are_refused_by_deepspeed_itself(worker: WorkerClient) -> None:
    with pytest.raises(SimulationError, match="only supports NVIDIA CUDA GPUs") as caught:
        worker.ask(question(3, kind="cpu", zero={"offload_optimizer": SUPER}))
    assert caught.value.cause == "refused"
