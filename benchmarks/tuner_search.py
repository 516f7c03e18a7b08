"""How many trials a search needs until it is within 3 % of the best: zplan against random, grid, TPE and DeepSpeed's autotuner.

    python -m benchmarks.tuner_search [--seeds 3] [--budget 40]      writes reports/tuner_search.md

The world: the formulas of zplan.memory and zplan.speed, bent. Every kind of configuration (stage, offload, recomputation,
micro-batch, overlap, number of GPUs) gets its own hidden factor on speed and on memory, and every trial scatters by 2 %.
zplan sees the unbent formula; the others see only their trials. All ask the same world with the same seeds.
The best is the best, without noise, of 500 random configurations, a grid of the first-order knobs, and a climb of 200
steps from there.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path
from statistics import median
from typing import Literal

import optuna

from zplan.backends.formula import FormulaBackend
from zplan.catalog import find_model, load_gpu
from zplan.files import save_text
from zplan.hardware import Cluster, Host
from zplan.ledger import Record
from zplan.model_shape import ModelShape
from zplan.planner import rank_candidates
from zplan.propose import Neighbour, Proposer, Rolls
from zplan.recipe import Recipe
from zplan.screen import Screen
from zplan.space import Problem, Space
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.units import GIB
from zplan.zero_config import Choice, ZeroConfig, batch_sizes

WITHIN = 0.97
REFERENCE_SAMPLES, REFERENCE_STEPS = 500, 200
PROBLEMS: tuple[tuple[str, str, int, str], ...] = (
    ("smollm2-135m", "t4-16gb", 2, "full"),
    ("smollm2-360m", "rtx-3060-12gb", 1, "full"),
    ("qwen2.5-0.5b", "rtx-4090-24gb", 2, "full"),
    ("llama-3.2-1b", "rtx-4090-24gb", 4, "full"),
    ("qwen2.5-1.5b", "a10-24gb", 4, "full"),
    ("smollm2-1.7b", "l4-24gb", 8, "full"),
    ("qwen2.5-3b", "a100-40gb", 4, "full"),
    ("llama-3.2-3b", "h100-80gb", 2, "full"),
    ("mistral-7b", "a100-80gb", 8, "full"),
    ("mistral-7b", "rtx-4090-24gb", 2, "lora"),
    ("llama-3.1-8b", "h100-80gb", 8, "full"),
    ("qwen2.5-7b", "a100-40gb", 8, "full"),
)


@dataclass
class World:
    """One problem with its hidden truth."""

    name: str
    shape: ModelShape
    recipe: Recipe
    cluster: Cluster
    seed: int
    _predicted: dict[str, TrialResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.space = Space(Problem(shape=self.shape, recipe=self.recipe, cluster=self.cluster))
        self._formula = FormulaBackend(self.shape)
        self.evidence: Literal["formula"] = "formula"

    def spec(self, choice: Choice) -> TrialSpec:
        return TrialSpec(recipe=self.recipe, choice=choice, cluster=self.cluster, model_path="")

    def run(self, spec: TrialSpec) -> TrialResult:
        """The unbent formula, remembered: what zplan's screen sees."""
        key = self.space.key(spec.choice)
        if key not in self._predicted:
            self._predicted[key] = self._formula.run(spec)
        return self._predicted[key]

    def _hidden(self, *parts: object, spread: float) -> float:
        text = f"{self.seed}/{self.name}/{parts}"
        return random.Random(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)).gauss(0.0, spread)

    def speed(self, choice: Choice) -> float:
        """True tokens/s without noise; 0 where it runs out of memory."""
        zero, batch = choice.zero, choice.batch
        predicted = self.run(self.spec(choice))
        place = (zero.stage, zero.offload_optimizer.device, zero.offload_param.device)
        gpu_bytes = (predicted.gpu_used_bytes or 0) * exp(self._hidden("bytes", place, spread=0.05))
        host_bytes = predicted.host_resident_bytes or 0
        if gpu_bytes > self.cluster.gpu.free_bytes or host_bytes > self.cluster.host.available_bytes:
            return 0.0
        factor = self._hidden("place", place, spread=0.15)
        factor += self._hidden("recompute", choice.gradient_checkpointing, spread=0.08)
        factor += self._hidden("micro", batch.train_micro_batch_size_per_gpu, spread=0.05)
        factor += self._hidden("ranks", batch.world_size, spread=0.08)
        factor += self._hidden("overlap", zero.overlap_comm, zero.stage, spread=0.04)
        factor += self._hidden("bucket", zero.reduce_bucket_size.bit_length(), spread=0.02)
        return (predicted.tokens_per_second or 0.0) * exp(factor)

    def trial(self, choice: Choice, noise: random.Random) -> TrialResult:
        """What a trial would have reported."""
        speed = self.speed(choice)
        if speed == 0.0:
            return TrialResult(outcome=Outcome.GPU_OOM, evidence="measured")
        return TrialResult(
            outcome=Outcome.OK, evidence="measured", tokens_per_second=speed * exp(noise.gauss(0.0, 0.02))
        )


Method = Callable[[World, int, random.Random], Iterator[Choice]]
"""Yields configurations to try; gets the answer through `World.trial` itself."""


def zplan_search(world: World, seed: int, noise: random.Random) -> Iterator[Choice]:
    """The tuner's own proposer, as run_study drives it."""
    template = world.spec(world.space.choice({"world_size": 1, "stage": 0}))
    screen = Screen(world.space, world, template)
    ranking = [item.choice for item in rank_candidates(world.shape, world.recipe, world.cluster)]
    proposer = Proposer(screen, world.shape, ranking, seed=seed)
    records: list[Record] = []
    while (proposal := proposer.next(records, ())) is not None:
        result = world.trial(proposal.choice, noise)
        key = world.space.key(proposal.choice)
        records.append(Record(key=key, origin=proposal.origin, choice=proposal.choice, result=result))
        yield proposal.choice


def random_search(world: World, seed: int, noise: random.Random) -> Iterator[Choice]:
    """Every knob at random."""
    rng = random.Random(seed)
    while True:
        yield world.space.suggest(Rolls(rng))


def first_order_grid(world: World) -> list[Choice]:
    """Stage x offload x recomputation x micro-batch in powers of two, on all GPUs, buckets as transformers' auto."""
    devices, ranks = ("none", "cpu"), world.cluster.world_size
    sizes = [2**n for n in range(8) if 2**n * ranks <= world.recipe.train_batch_size]
    bucket = {"reduce_bucket_size": world.shape.hidden_size**2, "world_size": ranks}
    grid = itertools.product((0, 1, 2, 3), devices, devices, (True, False), sizes)
    found = {}
    for stage, optimizer, param, recompute, size in grid:
        choice = world.space.choice(
            {
                **bucket, "stage": stage, "offload_optimizer.device": optimizer, "offload_param.device": param,
                "gradient_checkpointing": recompute, "train_micro_batch_size_per_gpu": size,
            }
        )  # fmt: skip
        found[world.space.key(choice)] = choice
    return list(found.values())


def grid_search(world: World, seed: int, noise: random.Random) -> Iterator[Choice]:
    """The grid in an order that is drawn once."""
    grid = first_order_grid(world)
    random.Random(seed).shuffle(grid)
    yield from grid


def tpe_search(world: World, seed: int, noise: random.Random) -> Iterator[Choice]:
    """Optuna's default sampler on the whole space; out of memory is told as 0 tokens/s."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    while True:
        trial = study.ask()
        choice = world.space.suggest(trial)
        study.tell(trial, world.trial(choice, noise).tokens_per_second or 0.0)
        yield choice


def deepspeed_autotuner(world: World, seed: int, noise: random.Random) -> Iterator[Choice]:
    """DeepSpeed's strategy: a profile run, then per stage the largest micro-batch, three sizes, and a grid.

    Recomputation is the user's (on, as in TRL), nothing is offloaded. A stage whose best micro-batch or metric falls
    behind the previous stage's is not tuned further; the grid stops after five experiments without gain.

    Source: deepspeed 0.19.8, autotuning/autotuner.py (tune, tune_space, get_min_max_micro_batch_size),
    constants.py (DEFAULT_TUNING_SPACE_ZERO_*), tuner/base_tuner.py (early_stopping 5).
    """
    yield _tuned(world, 3, 1, {})
    best_size, best_speed, largest = 0, 0.0, 0
    for stage in (0, 1, 2, 3):
        sizes = [n for n in range(1, 1025) if world.recipe.train_batch_size % (n * world.cluster.world_size) == 0]
        runnable: list[int] = []
        low, high = 0, len(sizes) - 1
        while low <= high:  # the largest micro-batch that runs, by bisection
            middle = (low + high) // 2
            choice = _tuned(world, stage, sizes[middle], {})
            yield choice
            if world.speed(choice):
                runnable.append(sizes[middle])
                low = middle + 1
            else:
                high = middle - 1
        if not runnable or max(runnable) < largest:
            continue
        largest = max(runnable)
        measured = {}
        for size in {largest, max(1, largest // 2), 1}:
            choice = _tuned(world, stage, size, {})
            yield choice
            measured[size] = world.trial(choice, noise).tokens_per_second or 0.0
        size, speed = max(measured.items(), key=lambda item: item[1])
        if stage and size > best_size and speed >= best_speed:
            for choice, found in _autotuner_grid(world, stage, size, noise):
                speed = max(speed, found)
                yield choice
        if size > best_size:
            best_size, best_speed = size, speed


def _autotuner_grid(world: World, stage: int, size: int, noise: random.Random) -> Iterator[tuple[Choice, float]]:
    buckets: dict[str, tuple[object, ...]] = {"reduce_bucket_size": (50_000_000, 500_000_000, 1_000_000_000)}
    if stage >= 2:
        buckets |= {"overlap_comm": (True, False), "contiguous_gradients": (False, True)}
    best, stale = 0.0, 0
    for values in itertools.product(*buckets.values()):
        choice = _tuned(world, stage, size, dict(zip(buckets, values, strict=True)))
        speed = world.trial(choice, noise).tokens_per_second or 0.0
        stale = 0 if speed > best else stale + 1
        best = max(best, speed)
        yield choice, speed
        if stale >= 5:
            return


def _tuned(world: World, stage: int, size: int, values: dict[str, object]) -> Choice:
    zero = replace(ZeroConfig(), stage=stage, **values)  # type: ignore[arg-type]
    batch = batch_sizes(world.recipe, micro_batch=_dividing(world, size), world_size=world.cluster.world_size)
    return world.space.canonical(Choice(zero=zero, batch=batch))


def _dividing(world: World, size: int) -> int:
    share = world.recipe.train_batch_size // world.cluster.world_size
    return max(n for n in range(1, size + 1) if share % n == 0)


METHODS: dict[str, Method] = {
    "zplan": zplan_search,
    "random": random_search,
    "grid": grid_search,
    "TPE": tpe_search,
    "DeepSpeed autotuner": deepspeed_autotuner,
}


def make_world(model: str, gpu: str, gpus: int, method: str, seed: int) -> World:
    """A catalogue model on one node."""
    shape = find_model(model, overrides={})
    assert isinstance(shape, ModelShape), model
    host = Host(total_bytes=512 * GIB, available_bytes=480 * GIB, num_cpus=32)
    cluster = Cluster(
        gpu=load_gpu(gpu), host=host, gpus_per_node=gpus, intra_node_bytes_per_second=25e9,
        host_link_bytes_per_second=20e9, described=True,
    )  # fmt: skip
    recipe = Recipe(model=model, method="lora" if method == "lora" else "full", train_batch_size=32)
    name = f"{model} {method}, {gpus} x {gpu}"
    return World(name=name, shape=shape, recipe=recipe, cluster=cluster, seed=seed)


def reference_speed(world: World) -> float:
    """The best that many configurations reach without noise."""
    rng = random.Random(12345)
    choices = [world.space.suggest(Rolls(rng)) for _ in range(REFERENCE_SAMPLES)] + first_order_grid(world)
    best = max(choices, key=world.speed)
    for _ in range(REFERENCE_STEPS):
        best = max(best, world.space.suggest(Neighbour(world.space.draft(best), rng)), key=world.speed)
    return world.speed(best)


def run_world(world: World, *, seed: int, budget: int) -> dict[str, int | None]:
    """Trials until within 3 % of the best, per method; None is not within the budget."""
    goal = WITHIN * reference_speed(world)
    found: dict[str, int | None] = {}
    for name, method in METHODS.items():
        choices = itertools.islice(method(world, seed, random.Random(f"{seed}/{name}")), budget)
        found[name] = next((i + 1 for i, choice in enumerate(choices) if world.speed(choice) >= goal), None)
    return found


def run_problem(problem: tuple[str, str, int, str], seeds: int, budget: int) -> tuple[str, list[dict[str, int | None]]]:
    """All methods on one problem, every seed with another hidden truth."""
    warnings.filterwarnings("ignore", module="optuna")
    worlds = [make_world(*problem, seed) for seed in range(seeds)]
    for world in worlds[1:]:
        world._predicted = worlds[0]._predicted  # the formula does not depend on the seed
    return worlds[0].name, [run_world(world, seed=seed, budget=budget) for seed, world in enumerate(worlds)]


def render(rows: dict[str, list[dict[str, int | None]]], *, budget: int, seeds: int, seconds: float) -> str:
    """The report."""
    lines = [
        "# Trials until within 3 % of the best", "",
        f"`python -m benchmarks.tuner_search`: {budget} trials, {seeds} seed(s), {seconds / 60:.0f} min. A dash: "
        "not within the budget. Several seeds: the median (a dash counts as more than the budget). "
        f"{len(rows)} of {len(PROBLEMS)} problems.", "",
        "| problem | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|",
    ]  # fmt: skip
    everything: dict[str, list[int]] = {name: [] for name in METHODS}
    for problem, results in rows.items():
        cells = []
        for name in METHODS:
            counts = [budget + 1 if (n := result[name]) is None else n for result in results]
            everything[name] += counts
            cells.append(_count(counts, budget))
        lines.append(f"| {problem} | " + " | ".join(cells) + " |")
    lines.append("| **median of all** | " + " | ".join(_count(c, budget) for c in everything.values()) + " |")
    lines.append(
        "| within the budget | "
        + " | ".join(f"{sum(n <= budget for n in c)} of {len(c)}" for c in everything.values())
        + " |"
    )
    return "\n".join([*lines, "", (__doc__ or "").partition("The world:")[2].strip(), ""])


def _count(counts: list[int], budget: int) -> str:
    middle = median(counts)
    return "-" if middle > budget else f"{middle:g}"


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--only", type=int, default=len(PROBLEMS), help="the first N problems")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("reports/tuner_search.md"))
    options = parser.parse_args()
    started, rows = time.monotonic(), {}
    with ProcessPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(run_problem, p, options.seeds, options.budget) for p in PROBLEMS[: options.only]]
        for done in as_completed(waiting):
            name, results = done.result()
            rows[name] = results
            seconds = time.monotonic() - started
            print(name, results, f"{seconds:.0f} s", file=sys.stderr, flush=True)
            save_text(render(rows, budget=options.budget, seeds=options.seeds, seconds=seconds), options.out)


if __name__ == "__main__":
    main()
