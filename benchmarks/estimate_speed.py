"""How fast the memory model answers: configurations a second on one core, and the cold command.

    python -m benchmarks.estimate_speed

Three questions, one process, one core: configurations whose ZeRO section was never seen (each costs a replay of the
engine), configurations that differ in micro-batch only (the replay is reused), and the same ones again. Then whole
cold commands, beside Python itself and the libraries that print the table. Writes reports/estimate_speed.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from zplan.catalog.find import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import estimate_memory
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.settings import hf_auto_zero
from zplan.zero_config import BatchSizes, Choice

REPORT = Path(__file__).parent.parent / "reports" / "estimate_speed.md"
GIB = 1 << 30
CLUSTER = Cluster(
    gpu=Gpu(name="h100-80gb", kind="cuda", total_bytes=80 * GIB, free_bytes=80 * GIB),
    host=Host(total_bytes=1024 * GIB, available_bytes=1000 * GIB),
    gpus_per_node=8,
)
MODELS = ("smollm2-135m", "mistral-7b", "llama-2-70b")
REPEATS = 5
COMMANDS = (
    ("python -c pass", (sys.executable, "-c", "pass")),
    ("python -c 'import click, rich.table'", (sys.executable, "-c", "import click, rich.console, rich.table")),
    ("zplan estimate, one configuration", ("--stage", "2")),
    ("zplan estimate, ranked table", ()),
)


def choices(shape: ModelShape, *, bucket: int, micro_batches: Iterable[int]) -> list[Choice]:
    """Every stage, with and without recomputation; `bucket` makes the ZeRO section a new one."""
    return [
        Choice(
            zero=replace(hf_auto_zero(stage, shape), reduce_bucket_size=bucket),
            batch=BatchSizes(train_micro_batch_size_per_gpu=size, gradient_accumulation_steps=8 // size, world_size=8),
            gradient_checkpointing=recompute,
        )
        for stage in (0, 1, 2, 3)
        for recompute in (True, False)
        for size in micro_batches
    ]


def rate(run: Callable[[Choice], object], work: list[Choice]) -> float:
    """Configurations a second of CPU time."""
    start = time.process_time()
    for choice in work:
        run(choice)
    return len(work) / (time.process_time() - start)


def model_row(name: str) -> str:
    """Rates of one model: unseen ZeRO sections, unseen micro-batches, repeated."""
    shape = find_model(name)
    assert isinstance(shape, ModelShape)
    recipe = Recipe(model=name, train_batch_size=64, max_length=2048)

    def run(choice: Choice) -> object:
        return estimate_memory(shape, recipe, choice, CLUSTER)

    sizes = (1, 2, 4, 8)
    for choice in choices(shape, bucket=500_000_000, micro_batches=sizes):
        run(choice)
    unseen = [c for n in range(20) for c in choices(shape, bucket=10_000_000 + n, micro_batches=(1,))]
    new_size = [c for n in range(20) for c in choices(shape, bucket=10_000_000 + n, micro_batches=sizes[1:])]
    rates = (rate(run, unseen), rate(run, new_size), rate(run, new_size))
    return f"| {name} | " + " | ".join(f"{value:,.0f}" for value in rates) + " |"


def command_row(label: str, command: tuple[str, ...]) -> str:
    """Smallest wall and CPU seconds of a cold command."""
    if not command or command[0].startswith("--"):
        model = ("--model", "mistral-7b", "--gpu", "h100", "--gpus-per-node", "8")
        command = (sys.executable, "-c", "from zplan.cli import main; main()", "estimate", *model, *command)
    walls, cpus = [], []
    for _ in range(REPEATS):
        before, start = os.times(), time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        walls.append(time.perf_counter() - start)
        cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return f"| {label} | {min(walls):.2f} | {min(cpus):.2f} |"


def main() -> None:
    """Measure and write the report."""
    lines = [
        "# How fast the memory model answers",
        "",
        "`python -m benchmarks.estimate_speed`, one core. Configurations a second (every stage, with and without",
        "recomputation), by what is new in them. A ZeRO section that was never seen costs a replay of the engine.",
        "",
        "| model | new ZeRO section | new micro-batch | seen before |",
        "|---|---:|---:|---:|",
        *(model_row(name) for name in MODELS),
        "",
        f"Cold commands, mistral-7b on 8 x h100, best of {REPEATS}, seconds.",
        "",
        "| command | wall | CPU |",
        "|---|---:|---:|",
        *(command_row(label, command) for label, command in COMMANDS),
        "",
        "Aim: 20,000 configurations a second, and the command within 1.5 times the import of its libraries.",
    ]
    text = "\n".join(lines) + "\n"
    REPORT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
