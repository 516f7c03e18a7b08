"""What watches a training: the clock, the progress lines, the mark of a finished checkpoint, the orderly stop."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sft.checkpoint import MARK, Mark
from zplan import files
from zplan.units import format_seconds

_RECENT_STEPS = 50


class StepTimer(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, without saving and evaluation, and this rank's tokens of the timed ones.

    The first step is not timed: it allocates, compiles and fills caches.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seconds: list[float] = []
        self.total_seconds = 0.0
        self._mark: float | None = None
        self._tokens_before: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the step."""
        now = time.perf_counter()
        if self._mark is not None:
            self.seconds.append(now - self._mark)
            self.total_seconds += now - self._mark
        else:
            self._tokens_before = self.trainer.seen_tokens
        self._mark = now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saving is no part of a step."""
        self._mark = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nor is evaluation."""
        if self._mark is not None:
            self._mark = time.perf_counter()

    @property
    def tokens(self) -> int:
        """Real tokens of this rank in the timed steps."""
        return int(self.trainer.seen_tokens) - int(self._tokens_before or 0) if self.seconds else 0

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def tokens_per_second(self, tokens_of_ranks: list[int]) -> float | None:
        """Real tokens of all ranks per second of the timed steps."""
        return sum(tokens_of_ranks) / self.total_seconds if self.seconds else None

    @property
    def recent_seconds(self) -> float | None:
        """Median of the last steps, in the same time however many there were."""
        return statistics.median(self.seconds[-_RECENT_STEPS:]) if self.seconds else None


class ProgressLines(TrainerCallback):  # type: ignore[misc]
    """One line per logged step on stderr: loss, tokens/s, time left. Plain print: rich takes a millisecond per line."""

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print what was logged."""
        logs = logs or {}
        if "eval_loss" in logs:
            _say(f"held-out loss {logs['eval_loss']:.4f} at step {state.global_step}")
        if "loss" not in logs:
            return
        parts = [f"step {state.global_step}/{state.max_steps}", f"loss {logs['loss']:.4f}"]
        seconds = self.timer.recent_seconds
        if seconds is not None:
            speed = self.timer.tokens * args.world_size / self.timer.total_seconds
            parts.append(f"{speed:,.0f} tokens/s")
            parts.append(f"ETA {format_seconds(seconds * (state.max_steps - state.global_step))}")
        _say("   ".join(parts))


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


class MarkCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole after every rank has written its part."""

    def __init__(self, fingerprint: str, world_size: int, zero_stage: int) -> None:
        self.fingerprint = fingerprint
        self.world_size = world_size
        self.zero_stage = zero_stage

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks are past their own writing here; the barrier makes that true for all."""
        dist.barrier()
        if state.is_world_process_zero:
            mark = Mark(
                step=state.global_step,
                world_size=self.world_size,
                zero_stage=self.zero_stage,
                fingerprint=self.fingerprint,
            )
            files.save(mark, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / MARK)


class GracefulStop(TrainerCallback):  # type: ignore[misc]
    """On SIGTERM or SIGINT: finish the step, save, end. All ranks agree on the step, or saving would deadlock.

    The ranks ask each other while the next step runs and read the answer at its end: nobody waits for the question, and
    a stop takes one step more.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self._flag: Any = None
        self._answer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on there is something to save."""
        if dist.get_world_size() > 1:
            self._flag = torch.zeros(1, dtype=torch.int32, device=args.device)
        signal.signal(signal.SIGTERM, self._ask)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if any rank had been asked to by the end of the step before; every rank sees the same answer."""
        if self._agreed() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _agreed(self) -> bool:
        if self._flag is None:
            return self.asked
        self.wait()
        agreed = bool(self._flag.item())
        self._flag.fill_(self.asked)
        self._answer = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def wait(self) -> None:
        """Until no question is under way."""
        if self._answer is not None:
            self._answer.wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing may be under way when the process group is taken down."""
        self.wait()
