"""A model that was built for one question serves another exactly as if it had been built for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.simulate.conftest import TINY_LLAMA, question
from zplan import files
from zplan.simulate.client import WorkerClient
from zplan.simulate.report import SimulationError, SimulationReport
from zplan.simulate.request import SimulationRequest
from zplan.simulate.template import loading_key
from zplan.zero_config import OffloadOptimizer, OffloadParam

LATE: dict[str, Any] = {
    "reduce_bucket_size": 3_000, "sub_group_size": 20_000, "stage3_prefetch_bucket_size": 5_000,
    "stage3_param_persistence_threshold": 100, "stage3_max_live_parameters": 30_000, "stage3_max_reuse_distance": 9_000,
    "contiguous_gradients": False, "overlap_comm": False, "offload_optimizer": OffloadOptimizer(device="cpu"),
}  # fmt: skip
"""Every knob that the engine reads after the model was built, away from its default."""


UNLIKE = ("wall_seconds", "cpu_seconds", "worker_rss_bytes", "num_played", "samples")
"""What two equal questions in a row are not told alike: what is measured of the worker, and the timeline, since
DeepSpeed fetches sets of parameters in the order of their addresses (partitioned_param_coordinator.py)."""


def said(report: SimulationReport) -> dict[str, Any]:
    data = files.to_data(report)
    return {name: data[name] for name in data if name not in UNLIKE}


@pytest.fixture(scope="module")
def fresh() -> Iterator[WorkerClient]:
    """A worker that is asked once about each model."""
    with WorkerClient() as client:
        yield client


def fewer_ranks(request: SimulationRequest) -> SimulationRequest:
    """The same batch on half of the ranks."""
    batch = request.choice.batch
    half = replace(batch, world_size=batch.world_size // 2, gradient_accumulation_steps=2)
    return replace(request, choice=replace(request.choice, batch=half))


LORA: dict[str, Any] = {"method": "lora"}
SMALL_RANK: dict[str, Any] = {"lora_r": 4}
"""Not used by full fine-tuning, and one model more."""
CPU_OPTIMIZER, CPU_PARAM = OffloadOptimizer(device="cpu"), OffloadParam(device="cpu")
PAIRS = {
    "stage 3": (question(3), question(3, zero=LATE)),
    "stage 3, lora": (question(3, zero=LATE, recipe=LORA), question(3, recipe=LORA)),
    "stage 3, offloaded": (
        question(3, zero={"offload_param": CPU_PARAM}), question(3, zero={**LATE, "offload_param": CPU_PARAM}),
    ),
    "stages 0 and 2": (question(0), question(2, zero={"overlap_comm": True, "round_robin_gradients": True})),
    "stages 2 and 1, lora": (
        question(2, recipe=LORA), question(1, zero={"offload_optimizer": CPU_OPTIMIZER}, recipe=LORA),
    ),
    "other ranks": (question(2, recipe=SMALL_RANK), fewer_ranks(question(2, recipe=SMALL_RANK))),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_the_answer_does_not_depend_on_the_question_that_the_model_was_built_for(
    pair: str, worker: WorkerClient, fresh: WorkerClient
) -> None:
    other, request = PAIRS[pair]
    assert other != request
    assert loading_key(other) == loading_key(request)
    first, second = worker.ask(other), worker.ask(other)
    assert said(first) == said(second)
    assert said(worker.ask(request)) == said(fresh.ask(request))


@pytest.mark.parametrize(
    "changed",
    [
        {"offload_param": CPU_PARAM},
        {"stage3_allgather_sequential": True},
        {"offload_optimizer": OffloadOptimizer(device="nvme", nvme_path="/swap")},
    ],
)
def test_what_zero_init_reads_takes_a_model_of_its_own(changed: dict[str, Any]) -> None:
    assert loading_key(question(3, zero=changed)) != loading_key(question(3))


def template_of(client: WorkerClient) -> int:
    """The one child of an idle worker."""
    (template,) = Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().split()
    return int(template)


def test_the_first_question_about_a_model_leaves_it_built_for_the_next(fresh: WorkerClient) -> None:
    fresh.ask(question(1, recipe={"lora_r": 3}))
    template = template_of(fresh)
    played = fresh.ask(question(2, recipe={"lora_r": 3}))
    assert (template_of(fresh), played.num_played) == (template, 2)
    fresh.ask(question(1, recipe={"method": "lora"}))
    assert template_of(fresh) != template


def test_what_a_model_taught_is_known_when_it_is_built_again(fresh: WorkerClient) -> None:
    request = question(1, recipe={"lora_r": 5})
    assert fresh.ask(request).num_played == 0
    fresh.ask(question(3))
    assert fresh.ask(request).num_played == 2


def test_a_template_that_was_lost_is_replaced(fresh: WorkerClient) -> None:
    before = fresh.ask(question(1, recipe={"lora_r": 2}))
    os.kill(template_of(fresh), signal.SIGKILL)
    for _ in range(2):
        assert said(fresh.ask(question(1, recipe={"lora_r": 2}))) == said(before)


def test_a_question_that_cannot_be_answered_is_refused_each_time(worker: WorkerClient) -> None:
    for _ in range(3):
        with pytest.raises(SimulationError, match="trust_remote_code"):
            worker.ask(question(2, config={**TINY_LLAMA, "model_type": "brand_new"}))
