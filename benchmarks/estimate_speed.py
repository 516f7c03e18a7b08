"""How fast the memory model answers: configurations a second on one core, and the cold command.

    python -m benchmarks.estimate_speed

Many choices of one model, recipe and cluster are what tuning asks. They are taken at random, with a fixed seed, from
the grid of the tuner's own search space: every knob that acts, at every value or at both ends and the middle of its
range, on every number of GPUs. Each figure is a fresh process that has seen nothing: replays, tapes and tables are
paid for within it. Every process also compares a hundred of its answers with `estimate_memory`, to the byte.

Cold commands run beside Python itself and the libraries that print the table. Writes reports/estimate_speed.md.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zplan.catalog.find import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import estimate_memory
from zplan.memory.many import Estimates, Estimator
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.tuner.space import Knob, Options, Problem, Share, Space, Value
from zplan.zero_config import Choice

REPORT = Path(__file__).parent.parent / "reports" / "estimate_speed.md"
GIB = 1 << 30
CLUSTER = Cluster(
    gpu=Gpu(name="h100-80gb", kind="cuda", total_bytes=80 * GIB, free_bytes=80 * GIB),
    host=Host(total_bytes=1024 * GIB, available_bytes=1000 * GIB, nvme_path="/nvme", nvme_free_bytes=4096 * GIB),
    gpus_per_node=8,
)
MODELS = ("smollm2-135m", "mistral-7b", "llama-2-70b")
METHODS = ("full", "lora")
SIZES = (1_000, 10_000, 100_000)
COMPARED = 100
ALONE = 400
"""Choices asked one at a time."""
RUNS = 15
COMMANDS = (
    ("python -c pass", ("-c", "pass")),
    ("python -c 'import typer, rich' (neither loads what it needs to print)", ("-c", "import typer, rich")),
    ("python -c 'import click, rich.table' (what prints the table)", ("-c", "import click, rich.console, rich.table")),
    ("zplan estimate, one configuration", ("--stage", "2")),
    ("zplan estimate, ranked table", ()),
)


def levels(knob: Knob) -> Sequence[Value]:
    """Every option, or both ends and the (geometric) middle of a range."""
    if isinstance(knob.range, Options):
        return knob.range.values
    low, high = knob.range.low, knob.range.high
    return (low, 0.5 * (low + high), high) if isinstance(knob.range, Share) else (low, round((low * high) ** 0.5), high)


def grid(space: Space, count: int) -> list[Choice]:
    """Points of the grid over the search space, drawn with a fixed seed."""
    draw, found = random.Random(0), []
    for _ in range(count):
        draft: dict[str, Value] = {}
        for knob in space.knobs:
            if knob.acts(draft):
                draft[knob.name] = draw.choice(levels(knob))
        found.append(space.choice(draft))
    return found


class Continuous(random.Random):
    """A suggester that draws from whole ranges: next to no two choices share a bucket, a limit or a threshold."""

    def suggest_categorical(self, name: str, choices: Sequence[Value]) -> Value:
        return self.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return round(low * (high / low) ** self.random())

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        return self.uniform(low, high)


def measure(model: str, method: str, kind: str, count: int) -> tuple[float, float]:
    """Choices a second of CPU time in this process, which has not asked anything before; then of the same ones again.

    Args:
        kind: `grid`; `drawn` from whole ranges; or `alone`, the grid one choice at a time.
    """
    shape = find_model(model)
    assert isinstance(shape, ModelShape)
    recipe = Recipe(model=model, train_batch_size=64, max_length=2048, method=method)  # type: ignore[arg-type]
    space, suggester = Space(Problem(shape=shape, recipe=recipe, cluster=CLUSTER)), Continuous(0)
    choices = [space.suggest(suggester) for _ in range(count)] if kind == "drawn" else grid(space, count)
    if kind == "alone":
        first = timed(lambda: [estimate_memory(shape, recipe, choice, CLUSTER) for choice in choices])
        return count / first, count / timed(
            lambda: [estimate_memory(shape, recipe, choice, CLUSTER) for choice in choices]
        )
    answers: list[Estimates] = []
    start = time.process_time()
    estimator = Estimator(shape, recipe, CLUSTER)
    answers.append(estimator.estimate(choices))
    first = time.process_time() - start
    again = timed(lambda: answers.append(estimator.estimate(choices)))
    many = answers[0]
    for index in range(0, count, max(count // COMPARED, 1)):
        alone = estimate_memory(shape, recipe, choices[index], CLUSTER)
        got = (many.gpu.used.high[index], many.host_resident_bytes[index], many.nvme_bytes[index])
        assert got == (alone.gpu.used.high, alone.host.resident_bytes, alone.nvme.bytes), choices[index]
    return count / first, count / again


def timed(run: Callable[[], object]) -> float:
    """Seconds of CPU time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def fresh(environment: dict[str, str], *question: object) -> list[float]:
    """`measure` in a process of its own."""
    code = "import sys; from benchmarks.estimate_speed import measure; a = sys.argv; "
    code += "print(*measure(a[1], a[2], a[3], int(a[4])))"
    command = (sys.executable, "-c", code, *map(str, question))
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return [float(number) for number in text.split()]


def model_rows(environment: dict[str, str]) -> list[str]:
    """One line for each model and method."""
    lines = []
    for model in MODELS:
        for method in METHODS:
            few, more = (fresh(environment, model, method, "grid", size)[0] for size in SIZES[:-1])
            many, again = fresh(environment, model, method, "grid", SIZES[-1])
            drawn = fresh(environment, model, method, "drawn", SIZES[0])[0]
            rates = [few, more, many, again, drawn, *fresh(environment, model, method, "alone", ALONE)]
            lines.append(f"| {model}, {method} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    return lines


def command_rows(environment: dict[str, str]) -> list[str]:
    """Wall and CPU seconds of cold commands, taken in turns so that a busy moment hits all alike."""
    model = ("estimate", "--model", "mistral-7b", "--gpu", "h100", "--gpus-per-node", "8")
    walls: dict[str, list[float]] = {label: [] for label, _ in COMMANDS}
    cpus: dict[str, list[float]] = {label: [] for label, _ in COMMANDS}
    for _ in range(RUNS):
        for label, arguments in COMMANDS:
            ours = ("-c", "from zplan.cli import main; main()", *model, *arguments)
            before, start = os.times(), time.perf_counter()
            command = (sys.executable, *(arguments if arguments[:1] == ("-c",) else ours))
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            after = os.times()
            walls[label].append(time.perf_counter() - start)
            cpus[label].append(
                after.children_user + after.children_system - before.children_user - before.children_system
            )
    return [
        f"| {label} | {min(walls[label]):.3f} | {statistics.median(walls[label]):.3f} | {min(cpus[label]):.2f} "
        f"| {statistics.median(cpus[label]):.2f} |"
        for label, _ in COMMANDS
    ]


def report(environment: dict[str, str]) -> str:
    """The whole report."""
    return "\n".join(
        [
            "# How fast the memory model answers",
            "",
            "`python -m benchmarks.estimate_speed`, one core, CPU time. Choices a second, each figure a fresh process",
            "that has seen nothing. Choices are taken from the grid of the tuner's search space on 8 x h100 with NVMe:",
            "every knob that acts, at every option or at both ends and the middle of its range, 1 to 8 GPUs. Asked",
            "together (`zplan.memory.many`) they are the same to the byte as asked one at a time.",
            "",
            "| model, method | first 1,000 | first 10,000 | first 100,000 | the same 100,000 again "
            "| first 1,000 drawn from whole ranges | first 400 one at a time | the same 400 again |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *model_rows(environment),
            "",
            "Aim: 20,000 a second. What a choice costs at first is the replay of the engine for its buckets and",
            "limits; a grid shares them, draws from whole ranges share next to nothing.",
            "",
            f"Cold commands, mistral-7b on 8 x h100, {RUNS} runs each in turns, seconds, with compiled modules as pip",
            "installs them.",
            "",
            "| command | wall, least | wall, median | CPU, least | CPU, median |",
            "|---|---:|---:|---:|---:|",
            *command_rows(environment),
            "",
            "Aim: one configuration within 1.5 times `import typer, rich`.",
            "",
        ]
    )


def main() -> None:
    """Measure and write the report."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _, arguments in COMMANDS[:3]:
            subprocess.run((sys.executable, *arguments), env=environment, check=True)
        fresh(environment, MODELS[0], METHODS[0], "grid", 10)
        text = report(environment)
    REPORT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
