"""What tuner_search compares zplan with: random, grid, Optuna's TPE, and DeepSpeed's autotuner restated."""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from math import ceil

import optuna

from benchmarks.tuner_world import World, first_order_grid
from zplan.tuner.pool import Rolls
from zplan.zero_config import Choice, ZeroConfig, batch_sizes

_PLATEAU = 0.05
"""METRIC_PERCENT_DIFF_CONST"""
_MOST_MICRO_BATCH, _LIST_SIZE, _PATIENCE, _MOST_EXPERIMENTS = 1024, 3, 5, 50
"""Defaults of max_train_micro_batch_size_per_gpu, num_tuning_micro_batch_sizes, tuner_early_stopping, num_trials."""


def random_search(world: World, seed: int, noise: random.Random) -> Iterator[Choice]:
    """Every knob at random."""
    rng = random.Random(seed)
    while True:
        yield world.space.suggest(Rolls(rng))


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
    """DeepSpeed's strategy, all stages allowed; every experiment that it would launch is one trial.

    A profile run; then per stage, if a sum of 16 bytes a parameter leaves room: the largest micro-batch by its own
    formula, by bisection where that fails, a list of sizes up to it, smaller sizes while they gain 5 %, and a grid of
    buckets and flags that ends after five experiments without gain. Recomputation is the user's (on, as in TRL),
    nothing is offloaded, the global batch is the recipe's.

    Source: deepspeed 0.19.8, autotuning/autotuner.py (tune, tune_space, get_min_max_micro_batch_size,
    get_tuning_micro_batch_size_list, run_tuning_micro_batch_sizes, get_instantiation_memory_required_per_gpu),
    constants.py (DEFAULT_TUNING_SPACE_ZERO_*), config_templates/, tuner/base_tuner.py.
    """
    state = _Autotuner(world, noise)
    profile = state.choice(3, 1)
    yield profile
    predicted = world.oracle.ask(world.space.key(profile), world.spec(profile))
    states = state.instantiation_bytes(3)
    state.activation_bytes = max(1, (predicted.gpu_used_bytes or 0) - states)
    largest, best_size, best_speed = 0, 0, 0.0
    for stage in (0, 1, 2, 3):
        if world.cluster.gpu.total_bytes <= state.instantiation_bytes(stage) + state.activation_bytes:
            continue
        found = yield from state.tune_stage(stage, largest, best_size, best_speed)
        if found[1] > best_size:
            largest, best_size, best_speed = found


Found = tuple[int, int, float]
"""Largest micro-batch, the fastest one, its speed."""


@dataclass
class _Autotuner:
    world: World
    noise: random.Random
    activation_bytes: int = 1

    def instantiation_bytes(self, stage: int) -> int:
        """fp32 parameters, gradients and Adam states, cut as the stage cuts them (bf16 is not looked at)."""
        numel, ranks = self.world.shape.num_parameters, self.world.cluster.world_size
        sizes = {1: 8 * numel, 2: 4 * numel, 3: 4 * numel}
        return sum(size // ranks if stage >= first else size for first, size in sizes.items())

    def choice(self, stage: int, size: int, values: dict[str, object] | None = None) -> Choice:
        """An experiment; the grid's templates set no overlap and no contiguous gradients."""
        template = {"sub_group_size": 10**12, "stage3_param_persistence_threshold": 10**6} if stage == 3 else {}
        zero = replace(ZeroConfig(), stage=stage, **({**template, **values} if values else {}))
        share = self.world.recipe.train_batch_size // self.world.cluster.world_size
        micro_batch = max(n for n in range(1, min(size, share) + 1) if share % n == 0)
        batch = batch_sizes(self.world.recipe, micro_batch=micro_batch, world_size=self.world.cluster.world_size)
        return self.world.space.canonical(Choice(zero=zero, batch=batch))

    def measure(self, choice: Choice) -> float:
        return self.world.trial(choice, self.noise).tokens_per_second or 0.0

    def tune_stage(
        self, stage: int, prev_largest: int, prev_size: int, prev_speed: float
    ) -> Generator[Choice, None, Found]:
        free = self.world.cluster.gpu.total_bytes - self.instantiation_bytes(stage)
        calculated = free // self.activation_bytes
        if calculated < prev_largest:
            return 0, 0, 0.0
        smallest, largest = yield from self._range(stage, prev_largest, calculated)
        if largest < max(prev_largest, 1):
            return 0, 0, 0.0
        sizes, speeds = _size_list(smallest, largest), {}
        for size in sizes:
            yield self.choice(stage, size)
            speeds[size] = self.measure(self.choice(stage, size))
        sizes = yield from self._smaller(stage, sizes, speeds, smallest)
        size, speed = max(speeds.items(), key=lambda item: item[1])
        if stage and size > prev_size and speed >= prev_speed:
            grid_size, grid_speed = yield from self._grid(stage, sizes)
            if grid_speed > speed:
                size, speed = grid_size, grid_speed
        return largest, size, speed

    def _range(self, stage: int, smallest: int, calculated: int) -> Generator[Choice, None, tuple[int, int]]:
        smallest = max(smallest, 1)
        yield self.choice(stage, smallest)
        speed = self.measure(self.choice(stage, smallest))
        if not speed:
            return -1, -1
        used, most = {smallest}, min(calculated, _MOST_MICRO_BATCH, self.world.recipe.train_batch_size)
        for size in (ceil(1.05 * most), most, int(0.95 * most)):
            if size in used:
                return smallest, size
            if size > _MOST_MICRO_BATCH:
                continue
            yield self.choice(stage, size)
            if self.measure(self.choice(stage, size)):
                return smallest, size
        low, high = smallest, most
        while low <= high:
            middle = (low + high) // 2
            if middle in used:
                low = middle + 1
                continue
            yield self.choice(stage, middle)
            found = self.measure(self.choice(stage, middle))
            if not found:
                high = middle - 1
                continue
            low = middle + 1
            used.add(middle)
            if (found - speed) / speed < _PLATEAU:
                break
            speed = found
        return smallest, low - 1

    def _smaller(
        self, stage: int, sizes: list[int], speeds: dict[int, float], smallest: int
    ) -> Generator[Choice, None, list[int]]:
        largest = best = sizes[-1]
        start = sizes[-2] + 1 if len(sizes) > 1 else smallest
        for size in reversed(range(start, largest, max(1, (largest - start) // 3))):
            yield self.choice(stage, size)
            speeds[size] = self.measure(self.choice(stage, size))
            if speeds[size] <= speeds[best] * (1 + _PLATEAU):
                break
            best = size
        return [*sizes[:-1], best]

    def _grid(self, stage: int, sizes: list[int]) -> Generator[Choice, None, tuple[int, float]]:
        """Values that do nothing here (allgather_bucket_size, reduce_scatter) cost their experiments all the same."""
        flags, buckets = (True, False), (50_000_000, 500_000_000, 1_000_000_000)
        later = stage >= 2
        grid = itertools.product(
            flags if later else (False,),
            flags if later else (True,),
            buckets,
            buckets,
            flags if later else (True,),
            sizes,
        )
        best, best_size, best_number = 0.0, sizes[0], 0
        for number, (overlap, _scatter, bucket, _allgather, contiguous, size) in enumerate(grid):
            values = {"overlap_comm": overlap, "reduce_bucket_size": bucket, "contiguous_gradients": not contiguous}
            choice = self.choice(stage, size, values)
            yield choice
            speed = self.measure(choice)
            if speed > best:
                best, best_size, best_number = speed, size, number
            if number + 1 >= min(best_number + _PATIENCE, _MOST_EXPERIMENTS):
                break
        return best_size, best


def _size_list(smallest: int, largest: int) -> list[int]:
    smallest = max(smallest, largest // 2)
    stride = max(1, (largest - smallest) // _LIST_SIZE)
    return [size for size in range(smallest, largest, stride) if largest // size != 1] + [largest]
