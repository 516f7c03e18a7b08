"""How long a dry run takes, cold and warm, and how many a minute; writes reports/simulate_speed.md.

    python -m benchmarks.simulate_speed                           # meant to end within 10 minutes; the report says
    python -m benchmarks.simulate_speed --only "7b 3" --series 8  # rows whose `model stage method` contains this

Cold is `zplan simulate` as typed: a new process, all imports, two optimizer steps, the answer. Warm is a worker that
has imported everything and is asked about one model as a tuner asks: a series of configurations in a row, no two alike.
It builds the model for the first one, and answers this one and the others from there; all of that counts. Seconds of
CPU stand beside those of the clock: on a machine that does other work as well, only they can be compared. One core,
micro-batch 1, 2048 tokens, 8 GPUs (64 for 70 B). Rows are kept short: one cold command each, offload at stages 2
and 3 alone, and what of a run is ours for the rows of FLOOR_MODEL at those stages without offload.
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

from benchmarks.simulate_floor import Floor, measure_floor
from zplan.catalog import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.model_shape import ModelShape
from zplan.recipe import Method, Recipe
from zplan.simulate.client import WorkerClient
from zplan.simulate.request import SimulationRequest
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

REPORT = Path(__file__).parents[1] / "reports" / "simulate_speed.md"
GIB = 1 << 30
TOKENS = 2048
SERIES = 4
"""Configurations in a row, unless told; a tuner asks dozens, so the one that builds the model weighs more here."""
FLOOR_MODEL = "mistral-7b"
"""Three more runs for each row of it that has_floor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row."""

    model: str
    stage: int
    method: Method = "full"
    offload: bool = False
    world_size: int = 8
    goal_seconds: float = 15.0

    @property
    def has_floor(self) -> bool:
        return self.model == FLOOR_MODEL and self.stage >= 2 and not self.offload


STARTER = Case(model="smollm2-135m", stage=1, world_size=64)
"""Asked to start a worker: a model that is none of the rows', for the first of a series finds nothing built."""
CASES = (
    *(
        Case(model="mistral-7b", stage=stage, method=method, offload=offload)
        for stage in (0, 1, 2, 3)
        for method in ("full", "lora")
        for offload in (False, True)
        if stage >= 2 or not offload
    ),
    Case(model="llama-3.1-70b", stage=3, world_size=64, goal_seconds=45.0),
    Case(model="llama-3.1-70b", stage=3, method="lora", world_size=64, goal_seconds=45.0),
    Case(model="smollm2-135m", stage=2),
    Case(model="smollm2-135m", stage=3),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case, measured: seconds for one configuration."""

    case: Case
    cold_wall: float
    cold_cpu: float
    first_wall: float
    first_cpu: float
    """With building the model and keeping it, as in all of the series."""
    next_cpu: float
    """Of the last of the series, whose model was built."""
    series_cpu: float
    """Of the whole series, by the worker and all of its forks, over the number of configurations."""
    rss_bytes: int
    floor: Floor | None

    @property
    def ratio(self) -> float:
        """Configurations a minute of CPU, warm over cold."""
        return self.cold_cpu / self.series_cpu


def shape_of(case: Case) -> ModelShape:
    shape = find_model(case.model)
    assert isinstance(shape, ModelShape)
    return shape


def sizes(case: Case, number: int) -> dict[str, int]:
    """What the configurations of a series differ in: a bucket, and ZeRO-3's two limits, halved each time.

    The bucket starts at DeepSpeed's own, or at the model's size: `zplan simulate` refuses one that cannot be filled.
    """
    changed = {"reduce_bucket_size": min(500_000_000, shape_of(case).num_parameters) >> number}
    if case.stage == 3:
        changed |= {
            "stage3_prefetch_bucket_size": 50_000_000 >> number,
            "stage3_max_live_parameters": 1_000_000_000 >> number,
        }
    return changed


def question(case: Case, number: int = 0) -> SimulationRequest:
    """One configuration of the series."""
    shape = shape_of(case)
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=case.world_size
    )  # fmt: skip
    zero = ZeroConfig(
        stage=case.stage,  # type: ignore[arg-type]
        offload_optimizer=OffloadOptimizer(device="cpu") if case.offload else OffloadOptimizer(),
        offload_param=OffloadParam(device="cpu") if case.offload and case.stage == 3 else OffloadParam(),
        **sizes(case, number),  # type: ignore[arg-type]
    )
    return SimulationRequest(
        config=shape.config,
        recipe=Recipe(model=case.model, method=case.method, max_length=TOKENS, train_batch_size=case.world_size),
        choice=Choice(zero=zero, batch=batch, gradient_checkpointing=True),
        cluster=Cluster(
            gpu=Gpu(name="h100-80gb", total_bytes=80 * GIB, free_bytes=79 * GIB),
            host=Host(total_bytes=2048 * GIB, available_bytes=2048 * GIB),
            gpus_per_node=8,
            nodes=case.world_size // 8,
        ),
    )


def measure(case: Case, series: int) -> Row:
    """The series by a worker of its own, and the first of it as a command."""
    cold_wall, cold_cpu = cold(case)
    with WorkerClient() as worker:
        worker.ask(question(STARTER))
        assert worker.pid is not None
        before, started = tree_cpu_seconds(worker.pid), time.monotonic()
        first = worker.ask(question(case))
        first_wall, first_cpu = time.monotonic() - started, tree_cpu_seconds(worker.pid) - before
        others = [worker.ask(question(case, number)) for number in range(1, series)]
        spent = tree_cpu_seconds(worker.pid) - before
    return Row(
        case=case,
        cold_wall=cold_wall,
        cold_cpu=cold_cpu,
        first_wall=first_wall,
        first_cpu=first_cpu,
        next_cpu=others[-1].cpu_seconds,
        series_cpu=spent / series,
        rss_bytes=max(report.worker_rss_bytes for report in (first, *others)),
        floor=measure_floor(question(case)) if case.has_floor else None,
    )


def tree_cpu_seconds(pid: int) -> float:
    """CPU seconds of a process, of its children that live, and of all that ended and were waited for."""
    while True:
        try:
            return _tree_cpu_seconds(pid)
        except (FileNotFoundError, ProcessLookupError):  # one that ended while it was looked at: its parent has it now
            if not Path(f"/proc/{pid}").exists():
                raise


def _tree_cpu_seconds(pid: int) -> float:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_tree_cpu_seconds(int(child)) for child in children)


def cold(case: Case) -> tuple[float, float]:
    """Wall and CPU seconds of the command, with all of its processes, on one core."""
    command = [
        sys.executable, "-m", "zplan.cli", "simulate", "--model", case.model, "--stage", str(case.stage),
        "--method", case.method, "--gpu", "h100-80gb", "--gpus-per-node", "8", "--nodes", str(case.world_size // 8),
        "--host-ram", "2TiB", "--micro-batch", "1", "--max-length", str(TOKENS),
        "--train-batch-size", str(case.world_size),
        *(("--offload-optimizer", "cpu") if case.offload else ()),
        *(("--offload-param", "cpu") if case.offload and case.stage == 3 else ()),
        *(word for name, value in sizes(case, 0).items() for word in ("--set", f"{name}={value}")),
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


def render(rows: list[Row], *, series: int, minutes: float) -> str:
    """What was reached, then the tables."""
    late = [row for row in rows if row.cold_cpu > row.case.goal_seconds]
    heavy = max(row.rss_bytes for row in rows)
    ratios = [row.ratio for row in rows]
    reached = sum(ratio >= 5 for ratio in ratios)
    return "\n".join([
        "# How long a dry run takes, and how many a minute",
        "",
        f"`python -m benchmarks.simulate_speed`, {time.strftime('%Y-%m-%d')}, {minutes:.1f} minutes, load average"
        f" {os.getloadavg()[0]:.1f} at the end. Cold: `zplan simulate` as typed on one core, imports included (first of"
        f" the series). Warm: {series} configurations of one model in a row, no two alike, by one worker that has"
        f" imported everything. Two optimizer steps, micro-batch 1, {TOKENS} tokens.",
        "",
        f"{len(rows) - len(late)} of {len(rows)} cold rows are within their goal in CPU seconds (15 s; 45 s for 70 B);"
        f" the largest resident size of a run is {heavy / (1 << 20):.0f} MiB. Warm over cold, in configurations a"
        f" minute of CPU: median {median(ratios):.1f}, smallest {min(ratios):.1f}, largest {max(ratios):.1f};"
        f" {reached} of {len(rows)} rows reach 5.",
        "",
        "Series: all that the worker and its forks used, over the number of configurations; the model is built once in"
        " it. First: what they used for the first one. Next: the run of the last one alone.",
        "",
        "| model | GPUs | stage | method | offload | cold wall s | cold CPU s | first wall s | first CPU s | next CPU s"
        " | series CPU s | RSS MiB | a minute, cold | a minute, warm | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(row) for row in rows),
        "",
        "## What of it is ours",
        "",
        "CPU seconds of one run whose model was built and that plays no tape: in the tracker, its dispatch and the"
        " report, and in libraries (DeepSpeed, PEFT, transformers, autograd, torch's own dispatcher). The last column"
        " is cold over the libraries' seconds alone: no simulation that runs them operation by operation gets beyond"
        " it here. Below stage 3 the series does not: from the second configuration on, the model's forward and"
        " backward are played from a tape (zplan/simulate/tape.py). Rows of"
        f" {FLOOR_MODEL} at stages 2 and 3 without offload.",
        "",
        "| model | stage | method | offload | run | ours | libraries | ratio without ours |",
        "|---|---|---|---|---|---|---|---|",
        *(floor_line(row.case, row.cold_cpu, row.floor) for row in rows if row.floor),
        "",
    ])  # fmt: skip


def line(row: Row) -> str:
    case = row.case
    return (
        f"| {case.model} | {case.world_size} | {case.stage} | {case.method} | {'cpu' if case.offload else 'none'} "
        f"| {row.cold_wall:.1f} | {row.cold_cpu:.1f} | {row.first_wall:.1f} | {row.first_cpu:.1f} | {row.next_cpu:.1f} "
        f"| {row.series_cpu:.1f} | {row.rss_bytes >> 20} | {60 / row.cold_cpu:.1f} | {60 / row.series_cpu:.1f} "
        f"| {row.ratio:.1f} |"
    )


def floor_line(case: Case, cold_cpu: float, floor: Floor) -> str:
    return (
        f"| {case.model} | {case.stage} | {case.method} | {'cpu' if case.offload else 'none'} | {floor.total:.1f} "
        f"| {floor.ours:.1f} | {floor.libraries:.1f} | {cold_cpu / floor.libraries:.1f} |"
    )


def measured(cases: tuple[Case, ...], series: int) -> Iterator[Row]:
    for case in cases:
        row = measure(case, series)
        print(line(row), file=sys.stderr, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--only", default="", help="cases whose `model stage method` contains this")
    parser.add_argument("--series", type=int, default=SERIES, choices=range(2, 9), help="configurations in a row")
    arguments, started = parser.parse_args(), time.monotonic()
    asked = [case for case in CASES if arguments.only in f"{case.model} {case.stage} {case.method}"]
    rows = list(measured(tuple(asked), arguments.series))
    arguments.out.parent.mkdir(exist_ok=True)
    minutes = (time.monotonic() - started) / 60
    arguments.out.write_text(render(rows, series=arguments.series, minutes=minutes), encoding="utf-8")


if __name__ == "__main__":
    main()
