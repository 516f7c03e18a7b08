"""A micro-step that is played from a tape leaves what it would have left if every operation had run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_outputs import CausalLMOutput

from tests.simulate.conftest import TINY_LLAMA, question
from zplan import files
from zplan.simulate.client import WorkerClient
from zplan.simulate.patches import Patches, install_fake_tensor_patches
from zplan.simulate.playing import Player
from zplan.simulate.recording import Recorder
from zplan.simulate.report import SimulationReport
from zplan.simulate.request import SimulationRequest
from zplan.simulate.tape import Tape, tape_key
from zplan.simulate.tracker import Tracker
from zplan.zero_config import OffloadOptimizer

OF_THE_WORKER = ("wall_seconds", "cpu_seconds", "worker_rss_bytes", "num_played")
LORA: dict[str, Any] = {"method": "lora", "lora_r": 6}
CPU = {"offload_optimizer": OffloadOptimizer(device="cpu")}
QWEN = {**TINY_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}


def without_checkpointing(request: SimulationRequest) -> SimulationRequest:
    return replace(request, choice=replace(request.choice, gradient_checkpointing=False))


PAIRS = {
    "a smaller bucket": (question(2), question(2, zero={"reduce_bucket_size": 3_000})),
    "stage 2 for 0": (question(2, recipe={"loss": "full"}), question(0, recipe={"loss": "full"})),
    "stage 0 for 1, accumulating": (question(0, config=QWEN), question(1, config=QWEN, accumulation=3)),
    "lora, accumulating": (
        question(1, recipe=LORA), question(2, recipe=LORA, accumulation=2, zero={"overlap_comm": True}),
    ),
    "offloaded": (question(2), question(2, zero={**CPU, "contiguous_gradients": False})),
    "offloaded for not, other ranks": (question(1, zero=CPU), question(1, world_size=2, accumulation=2)),
    "no checkpointing": (without_checkpointing(question(1)), without_checkpointing(question(2, zero=CPU))),
    "lora, no checkpointing": (
        without_checkpointing(question(0, recipe=LORA)), without_checkpointing(question(2, recipe=LORA)),
    ),
    "muon": (question(1, recipe={"optimizer": "muon"}), question(2, recipe={"optimizer": "muon"}, accumulation=2)),
    "qlora": (question(0, recipe={"method": "qlora"}), question(2, recipe={"method": "qlora"}, accumulation=2)),
    "CPU ranks": (question(0, kind="cpu", cuda_answers=True), question(2, kind="cpu", cuda_answers=True)),
}  # fmt: skip


def said(report: SimulationReport) -> dict[str, Any]:
    """All of it, with every sample of the timeline and the number of its operation."""
    data = files.to_data(report)
    return {name: data[name] for name in data if name not in OF_THE_WORKER}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_played_run_says_what_a_run_of_every_operation_says(pair: str, worker: WorkerClient) -> None:
    first, second = PAIRS[pair]
    first = replace(first, recipe=second.recipe, cluster=second.cluster)
    assert tape_key(first) == tape_key(second)
    worker.ask(first)
    played = worker.ask(second)
    assert played.num_played == second.steps * second.choice.batch.gradient_accumulation_steps
    real = worker.ask(replace(second, replay=False))
    assert real.num_played == 0
    assert said(played) == said(real)


def test_a_run_that_records_says_what_any_run_says(worker: WorkerClient) -> None:
    request = question(2, recipe={"lora_r": 3, "method": "lora"})
    real, recorded = worker.ask(replace(request, replay=False)), worker.ask(request)
    assert recorded.num_played == real.num_played == 0
    assert said(recorded) == said(real)


@pytest.mark.parametrize(
    "request_",
    [question(3), question(2, shared=2), question(2, cut=2), question(2, steps=1), question(2, replay=False)],
    ids=["stage 3", "Ulysses", "AutoTP", "one step", "switched off"],
)
def test_what_deepspeed_changes_within_the_model_is_neither_recorded_nor_played(request_: SimulationRequest) -> None:
    assert tape_key(request_) is None


def test_checkpointing_and_the_micro_batch_take_a_tape_of_their_own() -> None:
    request = question(2)
    larger = replace(request.choice.batch, train_micro_batch_size_per_gpu=2)
    others = [without_checkpointing(request), replace(request, choice=replace(request.choice, batch=larger))]
    assert len({tape_key(other) for other in (request, *others)}) == 3


Forward = Callable[["Toy", torch.Tensor], torch.Tensor]


class Toy(torch.nn.Module):
    def __init__(self, compute: Forward) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(64, 64))
        self.kept: list[torch.Tensor] = []
        self._compute = compute

    def forward(self, x: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(loss=self._compute(self, x))


def record(compute: Forward) -> tuple[list[Tape | None], list[list[Any]], int]:
    """The tapes of two steps of a model; the events of these and of a third step, which is played if there is a tape;
    how many were played, with a fourth step of another batch."""
    mode = FakeTensorMode()
    tracker = Tracker({"cpu": "gpu"}, fake_mode=mode)
    tapes: list[Tape | None] = []
    steps: list[list[Any]] = []
    with Patches() as patches:
        install_fake_tensor_patches(patches, tracker)
        with mode, tracker:
            model: Any = Toy(compute)
            real = model.forward
            recorder = Recorder(tracker, list(model.parameters()))
            model.forward = recorder.around(real)
            for _ in range(2):
                steps.append(step(model, tracker))
                tapes.append(recorder.finish())
            if tapes[0] is not None:
                model.forward = Player(tapes[0], tracker, list(model.parameters())).instead_of(real)
                steps.append(step(model, tracker))
                step(model, tracker, rows=5)
    return tapes, steps, tracker.num_played


def step(model: Any, tracker: Tracker, rows: int = 3) -> list[Any]:
    """What was taken and freed, from the start of the step on."""
    batch = torch.ones(rows, 64)
    events, operations = len(tracker.events), tracker.num_operations
    model(x=batch).loss.backward()
    assert model.weight.grad.shape == (64, 64)
    model.weight.grad = None
    return [
        (action, block and (block.requested_bytes, block.site), operation - operations)
        for action, block, operation in tracker.events[events:]
    ]


def product(model: Toy, x: torch.Tensor) -> torch.Tensor:
    return (x @ model.weight).exp().sum()


def test_other_inputs_than_those_of_the_tape_run_for_real() -> None:
    tapes, _, num_played = record(product)
    assert tapes[0] is not None
    assert num_played == 1


def test_a_played_step_takes_and_frees_the_same_blocks_at_the_same_operations() -> None:
    tapes, (first, second, played), _ = record(product)
    assert tapes[0] == tapes[1]
    assert len(played) > 8
    assert first == second == played


def test_a_step_that_leaves_a_block_behind_makes_no_tape() -> None:
    def compute(model: Toy, x: torch.Tensor) -> torch.Tensor:
        model.kept.append(x * 2)
        return product(model, x)

    assert record(compute)[0] == [None, None]


def test_steps_that_differ_make_different_tapes() -> None:
    def compute(model: Toy, x: torch.Tensor) -> torch.Tensor:
        (x * 2 if model.kept else x.double()).sum()
        model.kept = [x]
        return product(model, x)

    (first, second), _, _ = record(compute)
    assert first != second


def test_a_gradient_that_others_hold_makes_no_tape() -> None:
    def compute(model: Toy, x: torch.Tensor) -> torch.Tensor:
        return model.weight.sum()

    assert record(compute)[0] == [None, None]
