"""How long a dry run takes, cold and warm; writes reports/simulate_speed.md.

    python -m benchmarks.simulate_speed

Cold is `zplan simulate` as typed: a new process, all imports, two optimizer steps, the answer. Warm is the same
question to a worker that has imported everything. Seconds of CPU stand beside those of the clock: on a machine that
does other work as well, only they can be compared. One core, micro-batch 1, 2048 tokens, 8 GPUs (64 for 70 B).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from zplan.backends.simulated import simulate
from zplan.catalog import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.model_shape import ModelShape
from zplan.recipe import Method, Recipe
from zplan.simulate.client import WorkerClient
from zplan.simulate.report import SimulationReport
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

REPORT = Path(__file__).parents[1] / "reports" / "simulate_speed.md"
GIB = 1 << 30
TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row."""

    model: str
    stage: int
    method: Method = "full"
    offload: bool = False
    world_size: int = 8
    goal_seconds: float = 15.0


CASES = (
    *(
        Case(model="mistral-7b", stage=stage, method=method, offload=offload)
        for stage in (0, 1, 2, 3)
        for method in ("full", "lora")
        for offload in (False, True)
        if stage or not offload
    ),
    Case(model="llama-3.1-70b", stage=3, world_size=64, goal_seconds=45.0),
    Case(model="llama-3.1-70b", stage=3, method="lora", world_size=64, goal_seconds=45.0),
    Case(model="smollm2-135m", stage=2),
    Case(model="smollm2-135m", stage=3),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case, measured."""

    case: Case
    cold_wall: float
    cold_cpu: float
    warm_wall: float
    warm_cpu: float
    rss_bytes: int

    @property
    def ratio(self) -> float:
        """Configurations a minute, warm over cold, by CPU seconds."""
        return self.cold_cpu / self.warm_cpu


def measure(case: Case, worker: WorkerClient) -> Row:
    cold_wall, cold_cpu = cold(case)
    started = time.monotonic()
    report = warm(case, worker)
    return Row(
        case=case,
        cold_wall=cold_wall,
        cold_cpu=cold_cpu,
        warm_wall=time.monotonic() - started,
        warm_cpu=report.cpu_seconds,
        rss_bytes=report.worker_rss_bytes,
    )


def cold(case: Case) -> tuple[float, float]:
    """Wall and CPU seconds of the command, with all of its processes, on one core."""
    command = [
        sys.executable, "-m", "zplan.cli", "simulate", "--model", case.model, "--stage", str(case.stage),
        "--method", case.method, "--gpu", "h100-80gb", "--gpus-per-node", "8", "--nodes", str(case.world_size // 8),
        "--host-ram", "2TiB", "--micro-batch", "1", "--max-length", str(TOKENS),
        "--train-batch-size", str(case.world_size),
        *(("--offload-optimizer", "cpu") if case.offload else ()),
        *(("--offload-param", "cpu") if case.offload and case.stage == 3 else ()),
    ]  # fmt: skip
    core = min(os.sched_getaffinity(0))
    before, started = os.times(), time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=lambda: os.sched_setaffinity(0, {core})
    )
    wall, after = time.monotonic() - started, os.times()
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    spent = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    return wall, spent


def warm(case: Case, worker: WorkerClient) -> SimulationReport:
    """The report of the same question."""
    shape = find_model(case.model)
    assert isinstance(shape, ModelShape)
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=case.world_size
    )  # fmt: skip
    zero = ZeroConfig(
        stage=case.stage,  # type: ignore[arg-type]
        offload_optimizer=OffloadOptimizer(device="cpu") if case.offload else OffloadOptimizer(),
        offload_param=OffloadParam(device="cpu") if case.offload and case.stage == 3 else OffloadParam(),
    )
    return simulate(
        shape,
        Recipe(model=case.model, method=case.method, max_length=TOKENS, train_batch_size=case.world_size),
        Choice(zero=zero, batch=batch, gradient_checkpointing=True),
        Cluster(
            gpu=Gpu(name="h100-80gb", total_bytes=80 * GIB, free_bytes=79 * GIB),
            host=Host(total_bytes=2048 * GIB, available_bytes=2048 * GIB),
            gpus_per_node=8,
            nodes=case.world_size // 8,
        ),
        worker=worker,
    )


def render(rows: list[Row]) -> str:
    """What was reached, then the table."""
    late = [row for row in rows if row.cold_cpu > row.case.goal_seconds]
    heavy = max(row.rss_bytes for row in rows)
    ratios = [row.ratio for row in rows]
    return "\n".join([
        "# How long a dry run takes",
        "",
        f"`python -m benchmarks.simulate_speed`, {time.strftime('%Y-%m-%d')}, one core, load average"
        f" {os.getloadavg()[0]:.1f} at the end. Cold: `zplan simulate` as typed, imports included. Warm: the same"
        f" question to a worker that has imported everything. Two optimizer steps, micro-batch 1, {TOKENS} tokens.",
        "",
        f"{len(rows) - len(late)} of {len(rows)} rows are within their goal in CPU seconds (15 s; 45 s for 70 B); the"
        f" largest resident size of a run is {heavy / (1 << 20):.0f} MiB. Warm over cold, in configurations a minute of"
        f" CPU: median {median(ratios):.1f}, smallest {min(ratios):.1f}, largest {max(ratios):.1f}.",
        "",
        "| model | GPUs | stage | method | offload | cold wall s | cold CPU s | warm wall s | warm CPU s | RSS MiB"
        " | a minute, cold | a minute, warm | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(row) for row in rows),
        "",
    ])  # fmt: skip


def line(row: Row) -> str:
    case = row.case
    return (
        f"| {case.model} | {case.world_size} | {case.stage} | {case.method} | {'cpu' if case.offload else 'none'} "
        f"| {row.cold_wall:.1f} | {row.cold_cpu:.1f} | {row.warm_wall:.1f} | {row.warm_cpu:.1f} "
        f"| {row.rss_bytes >> 20} | {60 / row.cold_cpu:.1f} | {60 / row.warm_cpu:.1f} | {row.ratio:.1f} |"
    )


def measured(cases: tuple[Case, ...]) -> Iterator[Row]:
    with WorkerClient() as worker:
        warm(CASES[-1], worker)  # starts it
        for case in cases:
            row = measure(case, worker)
            print(line(row), file=sys.stderr, flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--only", default="", help="cases of models whose name contains this")
    arguments = parser.parse_args()
    rows = list(measured(tuple(case for case in CASES if arguments.only in case.model)))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
