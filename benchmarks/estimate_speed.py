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
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from zplan import files
from zplan.calibrate import QUANTITIES, Corrections, Sample, corrections_path, library_versions, machine_name
from zplan.catalog.find import find_model
from zplan.errors import ExitCode
from zplan.hardware import Cluster, Gpu, Host
from zplan.memory.estimate import estimate_memory
from zplan.memory.many import Estimates, Estimator
from zplan.model_shape import ModelShape
from zplan.probe import probe_hardware
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
ESTIMATE = ("-c", "from zplan.cli import main; main()", "estimate", "--model", "mistral-7b")
DESCRIBED = (*ESTIMATE, "--gpu", "h100", "--gpus-per-node", "8")


@dataclass(frozen=True)
class Command:
    """Something to start, after `python`."""

    label: str
    arguments: tuple[str, ...]
    calibrated: bool = False
    """On a machine whose trials have left corrections; else on one that has tuned nothing yet."""


COMMANDS = (
    Command("python -c pass", ("-c", "pass")),
    Command("python -c 'import typer, rich' (neither loads what it needs to print)", ("-c", "import typer, rich")),
    Command(
        "python -c 'import click, rich.table' (what prints the table)",
        ("-c", "import click, rich.console, rich.table"),
    ),
    Command("zplan estimate --model mistral-7b, of this machine", ESTIMATE),
    Command("zplan estimate --model mistral-7b, of this machine with corrections", ESTIMATE, calibrated=True),
    Command("the same of 8 x h100", DESCRIBED),
    Command("one configuration of 8 x h100", (*DESCRIBED, "--stage", "2")),
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


def save_corrections(cache: Path) -> None:
    """What 20 trials on this machine would leave in a cache folder."""
    machine, folder = probe_hardware(), cache / "zplan" / "calibration"
    samples = tuple(Sample(trial=f"study/{i}", log_ratios=dict.fromkeys(QUANTITIES, 0.01 * i)) for i in range(20))
    known = Corrections(machine=machine_name(machine), versions=library_versions(), samples=samples)
    files.save(known, corrections_path(machine, folder))


def command_rows(environment: dict[str, str]) -> list[str]:
    """Wall and CPU seconds of cold commands, taken in turns so that a busy moment hits all alike."""
    walls: dict[str, list[float]] = {command.label: [] for command in COMMANDS}
    cpus: dict[str, list[float]] = {command.label: [] for command in COMMANDS}
    with tempfile.TemporaryDirectory() as known, tempfile.TemporaryDirectory() as nothing:
        save_corrections(Path(known))
        for _ in range(RUNS):
            for command in COMMANDS:
                cache = known if command.calibrated else nothing
                before, start = getrusage(RUSAGE_CHILDREN), time.perf_counter()
                done = subprocess.run(
                    (sys.executable, *command.arguments), env={**environment, "XDG_CACHE_HOME": cache},
                    stdout=subprocess.DEVNULL, check=False,
                )  # fmt: skip
                walls[command.label].append(time.perf_counter() - start)
                after = getrusage(RUSAGE_CHILDREN)
                assert done.returncode in (ExitCode.OK, ExitCode.DOES_NOT_FIT), command
                cpus[command.label].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return [
        f"| {label} | {min(walls[label]):.3f} | {statistics.median(walls[label]):.3f} | {min(cpus[label]):.3f} "
        f"| {statistics.median(cpus[label]):.3f} |"
        for label in walls
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
            f"Cold commands, {RUNS} runs each in turns, seconds, with compiled modules as pip installs them. This",
            "machine is probed; its corrections are those of 20 trials.",
            "",
            "| command | wall, least | wall, median | CPU, least | CPU, median |",
            "|---|---:|---:|---:|---:|",
            *command_rows(environment),
            "",
            "Aim: within 1.5 times `import typer, rich`.",
            "",
        ]
    )


def main() -> None:
    """Measure and write the report."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for command in COMMANDS:
            subprocess.run(
                (sys.executable, *command.arguments), env=environment, stdout=subprocess.DEVNULL, check=False
            )
        fresh(environment, MODELS[0], METHODS[0], "grid", 10)
        text = report(environment)
    REPORT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
