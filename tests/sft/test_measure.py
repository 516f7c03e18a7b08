"""The clock of a trial: what it times, and what it leaves out."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from sft import measure
from sft.compiling import THREAD_NAME
from sft.measure import StepClock, train
from sft.steps import Steps
from tests.sft.warm import make_recipe, make_spec


class FakeMeter:
    """Takes seconds when told so."""

    own_seconds = 0.0
    finished = 0

    def finish_phases(self) -> None:
        self.finished += 1


@pytest.fixture
def clock(tmp_path: Path) -> StepClock:
    steps = Steps(untimed=1, metered=2, timed=2, short=1)
    progress: Any = SimpleNamespace(beat=lambda: None)
    meter: Any = FakeMeter()
    made = StepClock(make_spec(make_recipe(tmp_path, None), timed_steps=2), steps, meter, progress)
    trainer: Any = SimpleNamespace(seen_tokens=torch.tensor(0), meter=meter)
    made.trainer = trainer
    return made


def take_steps(clock: StepClock, now: list[float], meter_seconds: list[float]) -> None:
    """Steps of 10 seconds and 100 tokens, and those that the meter takes besides."""
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = clock.trainer
    for index, seconds in enumerate(meter_seconds):
        now[0] += 10.0 + seconds
        clock.meter.own_seconds += seconds  # type: ignore[misc]
        trainer.seen_tokens += 100
        control = SimpleNamespace(should_training_stop=False)
        clock.on_step_end(args, SimpleNamespace(global_step=index + 1), control)


def test_the_meter_s_own_seconds_are_not_the_step_s(clock: StepClock, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    take_steps(clock, now, [3.0, 2.0, 0.0])
    assert clock.step_seconds == [10.0, 10.0]
    assert clock.tokens_before == 100


def test_the_meter_is_off_behind_the_step_with_the_peak(clock: StepClock) -> None:
    meter: Any = clock.meter
    take_steps(clock, [0.0], [0.0])
    assert not meter.finished
    take_steps(clock, [0.0], [0.0, 0.0, 0.0])
    assert meter.finished == 1
    assert clock.trainer is not None
    assert clock.trainer.meter is None


def test_steps_beat_while_compilers_work_and_leave_dropped_gradients_unwritten() -> None:
    """A rank that compiles for minutes would be ended for silence; the gradients cost a third of initialize."""
    seen: dict[str, Any] = {}

    class Looks:
        def train(self) -> None:
            seen["threads"] = {thread.name for thread in threading.enumerate()}
            seen["initialize"] = DeepSpeedZeroOptimizer.initialize_optimizer_states

    plain = DeepSpeedZeroOptimizer.initialize_optimizer_states
    train(Looks(), SimpleNamespace(beat=lambda: None))  # type: ignore[arg-type]
    assert THREAD_NAME in seen["threads"]
    assert seen["initialize"] is not plain
    assert DeepSpeedZeroOptimizer.initialize_optimizer_states is plain
