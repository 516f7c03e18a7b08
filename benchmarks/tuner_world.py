"""The world that tuner_search asks: the formulas of zplan.memory and zplan.speed, bent by factors no search sees."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import exp
from pathlib import Path
from typing import Any, Literal

from zplan.backends.formula import FormulaBackend
from zplan.catalog import find_model, load_gpu
from zplan.hardware import Cluster, Host
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.speed.estimate import estimate_speed
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.tuner.pool import Neighbour, Rolls
from zplan.tuner.space import Problem, Space
from zplan.units import GIB
from zplan.zero_config import Choice

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "benchmarks"
REFERENCE_SAMPLES, REFERENCE_STEPS = 2000, 500
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


_ANSWERED_BY = ("zplan/memory", "zplan/speed", "zplan/catalog", "zplan/model_shape.py", "zplan/backends/formula.py")


@dataclass
class Oracle:
    """The unbent formula of one problem, remembered on disk by configuration and by the code that answers."""

    shape: ModelShape
    path: Path | None
    answers: dict[str, TrialResult] = field(default_factory=dict)
    evidence: Literal["formula"] = "formula"

    def __post_init__(self) -> None:
        self._formula = FormulaBackend(self.shape)
        self._source = source_digest(*_ANSWERED_BY)
        if self.path is not None and self.path.exists():
            entries = (json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines())
            self.answers = {e["key"]: _slim(e["answer"]) for e in entries if e["source"] == self._source}

    def ask(self, key: str, spec: TrialSpec) -> TrialResult:
        """The formula's answer, worked out once per key."""
        return self.ask_all({key: spec.choice}, spec)[key]

    def ask_all(self, choices: Mapping[str, Choice], spec: TrialSpec) -> dict[str, TrialResult]:
        """The formula's answers by key, to the spec with each of the choices."""
        new = {key: choice for key, choice in choices.items() if key not in self.answers}
        for key, found in zip(new, self._formula.run_all(spec, list(new.values())), strict=True):
            kept: dict[str, Any] = {name: getattr(found, name) for name in _KEPT} | {"outcome": str(found.outcome)}
            self.answers[key] = _slim(kept)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"source": self._source, "key": key, "answer": kept}) + "\n")
        return {key: self.answers[key] for key in choices}


_KEPT = ("gpu_used_bytes", "host_resident_bytes", "step_seconds", "tokens_per_second")


def _slim(kept: dict[str, Any]) -> TrialResult:
    return TrialResult(**{**kept, "outcome": Outcome(kept["outcome"]), "evidence": "formula"})


@cache
def source_digest(*paths: str) -> str:
    """Of every source file under these folders or files of the repository, as they were when first asked."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted((ROOT / path).rglob("*.*")) if (ROOT / path).is_dir() else [ROOT / path]:
            if file.suffix in (".py", ".toml", ".json"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class World:
    """One problem with its hidden truth."""

    name: str
    recipe: Recipe
    cluster: Cluster
    oracle: Oracle
    seed: int
    evidence: Literal["formula"] = "formula"

    def __post_init__(self) -> None:
        self.shape = self.oracle.shape
        self.space = Space(Problem(shape=self.shape, recipe=self.recipe, cluster=self.cluster))

    def spec(self, choice: Choice) -> TrialSpec:
        return TrialSpec(recipe=self.recipe, choice=choice, cluster=self.cluster, model_path="")

    def run(self, spec: TrialSpec) -> TrialResult:
        """The unbent formula: what zplan's screen sees."""
        return self.oracle.ask(self.space.key(spec.choice), spec)

    def run_all(self, spec: TrialSpec, choices: Sequence[Choice]) -> list[TrialResult]:
        """The same of many choices."""
        keys = [self.space.key(choice) for choice in choices]
        answers = self.oracle.ask_all(dict(zip(keys, choices, strict=True)), spec)
        return [answers[key] for key in keys]

    def _hidden(self, *parts: object, spread: float) -> float:
        text = f"{self.seed}/{self.name}/{parts}"
        return random.Random(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)).gauss(0.0, spread)

    def speed_if_fits(self, choice: Choice) -> float:
        """True tokens/s without noise, memory aside."""
        zero, batch = choice.zero, choice.batch
        factor = self._hidden("place", _place(choice), spread=0.15)
        factor += self._hidden("recompute", choice.gradient_checkpointing, spread=0.08)
        factor += self._hidden("micro", batch.train_micro_batch_size_per_gpu, spread=0.05)
        factor += self._hidden("ranks", batch.world_size, spread=0.08)
        factor += self._hidden("overlap", zero.overlaps_comm, zero.stage, spread=0.04)
        factor += self._hidden("bucket", zero.reduce_bucket_size.bit_length(), spread=0.02)
        predicted = estimate_speed(self.shape, self.recipe, choice, self.cluster).tokens_per_second
        return (predicted or 0.0) * exp(factor)

    def fits(self, choice: Choice) -> bool:
        """Whether it truly fits."""
        predicted = self.run(self.spec(choice))
        gpu_bytes = (predicted.gpu_used_bytes or 0) * exp(self._hidden("bytes", _place(choice), spread=0.05))
        host_bytes = predicted.host_resident_bytes or 0
        return gpu_bytes <= self.cluster.gpu.free_bytes and host_bytes <= self.cluster.host.available_bytes

    def speed(self, choice: Choice) -> float:
        """True tokens/s without noise; 0 where it runs out of memory."""
        return self.speed_if_fits(choice) if self.fits(choice) else 0.0

    def trial(self, choice: Choice, noise: random.Random) -> TrialResult:
        """What a trial would have reported."""
        speed = self.speed(choice)
        if speed == 0.0:
            return TrialResult(outcome=Outcome.GPU_OOM, evidence="measured")
        return TrialResult(
            outcome=Outcome.OK, evidence="measured", tokens_per_second=speed * exp(noise.gauss(0.0, 0.02))
        )


def _place(choice: Choice) -> tuple[object, ...]:
    return choice.zero.stage, choice.zero.offload_optimizer.device, choice.zero.offload_param.device


def make_worlds(problem: tuple[str, str, int, str], seeds: Iterable[int]) -> list[World]:
    """A catalogue model on one node; every seed another hidden truth behind the same formula."""
    model, gpu, gpus, method = problem
    shape = find_model(model, overrides={})
    assert isinstance(shape, ModelShape), model
    host = Host(total_bytes=512 * GIB, available_bytes=480 * GIB, num_cpus=32)
    cluster = Cluster(
        gpu=load_gpu(gpu), host=host, gpus_per_node=gpus, intra_node_bytes_per_second=25e9,
        host_link_bytes_per_second=20e9, described=True,
    )  # fmt: skip
    recipe = Recipe(model=model, method="lora" if method == "lora" else "full", train_batch_size=32)
    oracle = Oracle(shape, FOLDER / f"tuner_oracle_{model}_{gpu}_{gpus}_{method}.jsonl")
    name = f"{model} {method}, {gpus} x {gpu}"
    return [World(name=name, recipe=recipe, cluster=cluster, oracle=oracle, seed=seed) for seed in seeds]


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


def reference(world: World) -> Choice:
    """The best that many configurations reach without noise: random ones, the grid, and a climb from the best of them.

    Speed costs microseconds and memory much more, so memory is asked from the fastest down until something fits.
    """
    rng = random.Random(12345)
    choices = [world.space.suggest(Rolls(rng)) for _ in range(REFERENCE_SAMPLES)] + first_order_grid(world)
    best = next(choice for choice in sorted(choices, key=world.speed_if_fits, reverse=True) if world.fits(choice))
    for _ in range(REFERENCE_STEPS):
        neighbour = world.space.suggest(Neighbour(world.space.draft(best), rng))
        if world.speed_if_fits(neighbour) > world.speed_if_fits(best) and world.fits(neighbour):
            best = neighbour
    return best
