"""The inside of a trial: build the trainer as the training does, run a few steps, measure them on every rank."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, set_seed

from sft import build, data, prepared
from sft.compiling import beating_while_compiling
from sft.dropped_gradients import unwritten_gradients
from sft.meter import CpuMeter, CudaMeter, make_meter, measure_pinned_bytes, measure_used_bytes, peak_resident_bytes
from sft.ranks import Rank
from sft.software import check_software
from sft.steps import Steps, draw, plan_steps, rows
from zplan.trial import Outcome, TrialResult, TrialSpec, clearly_slower
from zplan.zero_config import deepspeed_config

if TYPE_CHECKING:
    from sft.trial import Progress

_VERSIONED = ("torch", "deepspeed", "transformers", "trl", "peft", "accelerate", "zplan")
_COLLECTIVE_SECONDS = 300.0
"""A rank that waits longer for its peers gives up; the launcher's deadline is usually shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank measured."""

    allocated_bytes: int
    reserved_bytes: int | None
    used_bytes: int | None
    resident_bytes: int
    pinned_bytes: int | None
    phases: dict[str, int]
    tokens: int
    local_world_size: int


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times the steps behind the warm-up, and ends the detailed measurement when the peak has been seen."""

    def __init__(self, spec: TrialSpec, steps: Steps, meter: CpuMeter | CudaMeter, progress: Progress) -> None:
        self.spec = spec
        self.steps = steps
        self.meter = meter
        self.progress = progress
        self.trainer: build.PlanTrainer | None = None
        self.step_seconds: list[float] = []
        self.tokens_before = 0
        self._mark = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """DeepSpeed's engine exists now; its optimizer step is a phase of its own."""
        assert self.trainer is not None
        engine = self.trainer.model_wrapped
        inner_step, meter = engine.step, self.meter

        def step(*args: Any, **kwargs: Any) -> Any:
            meter.enter("step")
            return inner_step(*args, **kwargs)

        engine.step = step
        self.progress.enter("steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the warm-up, or the timed step; end a trial that is clearly slower than the best."""
        assert self.trainer is not None
        self.progress.beat()
        step = state.global_step
        if step >= self.steps.untimed and torch.cuda.is_available():
            torch.cuda.synchronize()
        if step > self.steps.untimed:
            self.step_seconds.append(self._clock() - self._mark)
        if step == self.steps.metered:
            self.meter.finish_phases()
            self.trainer.meter = None
        if step > self.steps.untimed:
            control.should_training_stop |= self.is_pruned(args.device)
        if step == self.steps.untimed:
            self.tokens_before = int(self.trainer.seen_tokens)
            if dist.is_initialized():
                dist.barrier()
        self._mark = self._clock()
        return control

    def _clock(self) -> float:
        """Seconds since some moment, but for those that the meter took."""
        return time.perf_counter() - self.meter.own_seconds

    def is_pruned(self, device: torch.device) -> bool:
        """Rank 0 decides for all: ranks that end in different steps would wait for each other for ever."""
        if not self.spec.best_step_seconds or len(self.step_seconds) == self.spec.timed_steps:
            return False
        decision = torch.tensor(clearly_slower(self.step_seconds, self.spec.best_step_seconds), device=device).int()
        if dist.is_initialized():
            dist.broadcast(decision, src=0)
        return bool(decision.item())


def measure_trial(spec: TrialSpec, out_dir: Path, place: Rank, progress: Progress) -> TrialResult | None:
    """Train for warm-up and timed steps; the result on rank 0, None on the others."""
    kind = spec.cluster.gpu.kind
    recipe, choice = spec.recipe, spec.choice
    progress.enter("init")
    build.quiet_libraries()
    build.check_world(choice, place.world_size)
    check_software(recipe, choice, kind)
    build.init_process_group(kind, place, timeout_seconds=_COLLECTIVE_SECONDS)
    if kind == "cuda":
        torch.cuda.set_device(place.local_rank)
    meter = make_meter(kind, place.local_rank)
    meter.enter("load")
    tokenizer = prepared.load_tokenizer(spec)
    progress.enter("load")
    drawn = draw(spec, prepared.load_examples(spec, tokenizer))
    steps = plan_steps(spec, drawn)
    progress.enter("init")
    args = _arguments(spec, out_dir, steps)
    set_seed(recipe.seed)
    progress.enter("load")
    model = build.load_model(spec.model_path, recipe, weights=spec.weights)
    examples = rows(spec, steps, drawn, vocab_size=model.config.get_text_config().vocab_size)
    meter.enter("init")
    progress.enter("init")
    clock = StepClock(spec, steps, meter, progress)
    dataset = data.to_dataset(examples)
    trainer = build.build_trainer(recipe, args, model, tokenizer, dataset, callbacks=[clock], meter=meter)
    clock.trainer = trainer
    del model
    train(trainer, progress)
    return _gather(spec, trainer, clock, meter, place)


def train(trainer: build.PlanTrainer, progress: Progress) -> None:
    """The steps, alive while compilers work, and without writing what the engine drops at once."""
    with beating_while_compiling(progress.beat), unwritten_gradients():
        trainer.train()


def _arguments(spec: TrialSpec, out_dir: Path, steps: Steps) -> Any:
    recipe, choice, kind = spec.recipe, spec.choice, spec.cluster.gpu.kind
    return build.sft_config(
        recipe,
        choice,
        deepspeed_config(recipe, choice, cpu_adam=build.wants_cpu_adam(kind)),
        build.Run(
            output_dir=out_dir,
            max_steps=steps.total,
            learning_rate=recipe.learning_rate,
            seed=recipe.seed,
            keep_order=True,
        ),
        kind,
    )


def _gather(
    spec: TrialSpec, trainer: build.PlanTrainer, clock: StepClock, meter: CpuMeter | CudaMeter, place: Rank
) -> TrialResult | None:
    kind = spec.cluster.gpu.kind
    report = RankReport(
        allocated_bytes=meter.allocated_bytes,
        reserved_bytes=meter.reserved_bytes if isinstance(meter, CudaMeter) else None,
        used_bytes=measure_used_bytes(kind, place.local_rank),
        resident_bytes=peak_resident_bytes(),
        pinned_bytes=measure_pinned_bytes(kind),
        phases=dict(meter.phases),
        tokens=int(trainer.seen_tokens) - clock.tokens_before,
        local_world_size=place.local_world_size,
    )
    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, asdict(report))
    dist.destroy_process_group()
    if not place.is_first:
        return None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = summarise(
        [RankReport(**item) for item in gathered],
        clock.step_seconds,
        message=f"loss {losses[0]:.4f} to {losses[-1]:.4f}",
    )
    return as_pruned(result, spec) if len(clock.step_seconds) < spec.timed_steps else result


def as_pruned(result: TrialResult, spec: TrialSpec) -> TrialResult:
    """The result of a trial that ended early, with what it has measured."""
    steps = result.timed_step_seconds
    best = spec.best_step_seconds[: len(steps)]
    message = (
        f"ended after {len(steps)} of {spec.timed_steps} timed steps: "
        f"{sum(steps) / sum(best):.1f} times the seconds of the fastest trial; {result.message}"
    )
    return replace(result, outcome=Outcome.PRUNED, message=message)


def summarise(reports: list[RankReport], step_seconds: list[float], *, message: str) -> TrialResult:
    """Worst rank for device bytes, sum over a node's ranks for host bytes, all ranks' tokens for speed."""
    elapsed = sum(step_seconds)
    node = reports[: reports[0].local_world_size]
    phases = sorted({phase for report in reports for phase in report.phases})
    return TrialResult(
        outcome=Outcome.OK,
        evidence="measured",
        message=message,
        gpu_allocated_bytes=max(report.allocated_bytes for report in reports),
        gpu_reserved_bytes=_largest([report.reserved_bytes for report in reports]),
        gpu_used_bytes=_largest([report.used_bytes for report in reports]),
        host_resident_bytes=sum(report.resident_bytes for report in node),
        host_pinned_bytes=_total([report.pinned_bytes for report in node]),
        phases={phase: max(report.phases.get(phase, 0) for report in reports) for phase in phases},
        step_seconds=statistics.median(step_seconds) if step_seconds else None,
        timed_step_seconds=tuple(step_seconds),
        tokens_per_second=sum(report.tokens for report in reports) / elapsed if elapsed else None,
        versions={name: version(name) for name in _VERSIONED},
    )


def _largest(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _total(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
