"""What to try next: the baseline, the diverse best of the ranking, then what promises the most gain."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from math import log
from typing import Any

import numpy as np

from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.settings import hf_auto_zero
from zplan.speed.estimate import estimate_speed
from zplan.trial import Outcome, TrialResult
from zplan.tuner.front import Front, Point, gpu_bytes, make_front
from zplan.tuner.ledger import Objective, Origin, Record, Running, has_speed, out_of_memory
from zplan.tuner.pool import first_order_choices, one_per_placement, suggestions
from zplan.tuner.screen import Screen, Screened
from zplan.tuner.space import Space, nearest_micro_batch, world_sizes
from zplan.tuner.surrogate import Observation, Surrogate, Vector, features, make_kernel, share_of
from zplan.values import dataclass
from zplan.zero_config import Choice, OffloadOptimizer, OffloadParam, batch_sizes

_SEEDS = 4
"""Trials from the baseline and the ranking before the model takes over."""
_LOOKS = 24
"""Configurations of the pool that fit by formula and are compared in full."""
_MOST_REFUSALS = 24
"""Simulations that refuse, one after the other, before a search is at its end: each takes seconds."""
_TRAINER_MICRO_BATCH = 8
"""per_device_train_batch_size of transformers' TrainingArguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The next trial, why, and what is expected of it."""

    choice: Choice
    origin: Origin
    predicted: TrialResult | None = None
    simulated: TrialResult | None = None
    expected_gain: float | None = None
    """Expected improvement over the best so far, as a fraction; None for seeds."""


@dataclass(frozen=True, eq=False, slots=True)
class Idea:
    """A configuration whose memory has not been asked about."""

    choice: Choice
    key: str
    point: Vector
    """As `features` places it."""
    log_speed: float
    """log tokens/s by formula; 0 where it knows none."""


class Proposer:
    """Turns the trials so far into the next one."""

    def __init__(
        self,
        screen: Screen,
        shape: ModelShape,
        ranking: Sequence[Choice],
        *,
        seed: int,
        objective: Objective = "speed",
    ) -> None:
        self._screen, self._space = screen, screen.space
        ranking = list(filter(screen.space.contains, map(screen.space.nearest, ranking)))
        self._ranking = list({item.key: item for item in screen.look_at_all(ranking)}.values())
        allowed = map(screen.space.nearest, baselines(shape, screen.template.recipe, screen.space))
        self._baselines = list(filter(screen.space.contains, allowed))
        self._shape = shape
        self._placements = one_per_placement(screen.space, ranking)
        self._points: dict[str, Vector] = {}
        self._kernel = make_kernel(screen.space.knobs)
        self._random = random.Random(seed)
        self._seed = seed
        self._objective = objective

    def next(self, records: Sequence[Record], running: Sequence[Running]) -> Proposal | None:
        """The next trial; None if everything that can fit has been tried."""
        taken = {record.key for record in records} | {trial.key for trial in running} | self._screen.refused
        seed = self._next_seed(taken, started=len(records) + len(running))
        if seed is not None:
            return seed
        return self._next_by_model(records, running)

    def _next_seed(self, taken: set[str], *, started: int) -> Proposal | None:
        baseline = self._next_baseline(taken)
        if baseline is not None or started >= _SEEDS:
            return baseline
        for item in diverse(self._ranking, _SEEDS):
            if item.promising and item.key not in taken:
                proposal = self._proposal(item, "ranking")
                if item.key not in self._screen.refused:
                    return proposal
        return None

    def _next_baseline(self, taken: set[str]) -> Proposal | None:
        """The first that fits by formula and that the simulation does not refuse; None if that one was tried."""
        for item in map(self._screen.look, self._baselines):
            if not item.promising or self._screen.says_no(item):
                continue
            if item.key in taken:
                return None
            proposal = self._proposal(item, "baseline")
            if not self._screen.says_no(item):
                return proposal
        return None

    def _next_by_model(self, records: Sequence[Record], running: Sequence[Running]) -> Proposal | None:
        """What promises most. A refusal by the simulation teaches where memory ends, and the rest is compared anew."""
        for _ in range(_MOST_REFUSALS):
            taken = {record.key for record in records} | {trial.key for trial in running} | self._screen.refused
            found = self._most_promising(records, taken)
            if found is None:
                return None
            proposal = self._proposal(found[0], "search", expected_gain=found[1])
            if not self._screen.says_no(found[0]):
                return proposal
        return None

    def _most_promising(self, records: Sequence[Record], taken: set[str]) -> tuple[Screened, float | None] | None:
        """It and its expected gain, which nobody knows before a first trial ran."""
        observations = [*map(self._observe, records), *map(self._observe_refusal, self._screen.refusals())]
        model = Surrogate(observations, self._kernel)
        candidates = self._candidates(records, model, taken)
        pool = {item.key: item for item in candidates if item.promising and item.key not in taken}
        if not pool:
            return None
        gains = self._gains(model, records, pool)
        best = min(pool, key=lambda key: (-gains[key], key))
        return pool[best], gains[best] if model.best is not None else None

    def propose(self, choice: Choice, origin: Origin) -> Proposal:
        """A configuration that is already decided."""
        return self._proposal(self._screen.look(choice), origin)

    def again(self, choices: Iterable[Choice]) -> Proposal | None:
        """The first of these interrupted trials that still fits: what is free may have changed since."""
        for item in filter(lambda item: item.promising, map(self._screen.look, choices)):
            proposal = self._proposal(item, "search")
            if not self._screen.says_no(item):
                return proposal
        return None

    def _proposal(self, item: Screened, origin: Origin, expected_gain: float | None = None) -> Proposal:
        return Proposal(
            choice=item.choice, origin=origin, predicted=item.predicted, simulated=self._screen.confirm(item),
            expected_gain=expected_gain,
        )  # fmt: skip

    def _gains(self, model: Surrogate, records: Sequence[Record], pool: Mapping[str, Screened]) -> dict[str, float]:
        """Key -> what a trial of it is expected to add: to the best speed, or to the front."""
        points = np.array([self._point(item.key, item.choice) for item in pool.values()])
        speeds = np.array([_log_speed(item.predicted) for item in pool.values()])
        fits = np.array([model.likely_fits(self._log_share(item.predicted)) for item in pool.values()])
        front = self._front(model, records) if self._objective == "pareto" else None
        if front is None:
            return dict(zip(pool, (fits * model.gains(points, speeds)).tolist(), strict=True))
        means, deviations = model.speeds(points, speeds)
        found = {}
        for (key, item), fit, mean, deviation in zip(pool.items(), fits, means, deviations, strict=True):
            found[key] = fit * front.expected_gain(mean, deviation, *self._log_bytes(item.predicted))
        return found

    def _point(self, key: str, choice: Choice) -> Vector:
        """Where the model sees a configuration; kept, because trials and their rivals are looked at again and again."""
        if key not in self._points:
            self._points[key] = features(self._space.knobs, self._space.draft(choice))
        return self._points[key]

    def _front(self, model: Surrogate, records: Sequence[Record]) -> Front | None:
        """What the trials reach: speeds as the model believes them, bytes as the formula says, like the candidates'."""
        ran = [record for record in records if has_speed(record.result)]
        if not ran:
            return None
        points = [
            Point(float(speed), *self._log_bytes(self._screen.look(record.choice).predicted))
            for record, speed in zip(ran, model.believed, strict=True)
            if record.result.outcome is Outcome.OK
        ]
        return make_front(points, self._screen.template.cluster) if points else None

    @staticmethod
    def _log_bytes(predicted: TrialResult) -> tuple[float, float]:
        return log(max(gpu_bytes(predicted) or 1, 1)), log(max(predicted.host_resident_bytes or 1, 1))

    def _observe(self, record: Record) -> Observation:
        predicted = self._screen.look(record.choice).predicted
        measured = record.result.tokens_per_second
        return Observation(
            point=self._point(record.key, record.choice),
            log_predicted=_log_speed(predicted),
            log_measured=log(measured) if measured and has_speed(record.result) else None,
            log_share=self._log_share(predicted),
            out_of_memory=out_of_memory(record.result),
        )

    def _observe_refusal(self, item: Screened) -> Observation:
        """As good as a trial that ran out of memory."""
        return Observation(
            point=self._point(item.key, item.choice), log_predicted=_log_speed(item.predicted), log_measured=None,
            log_share=self._log_share(item.predicted), out_of_memory=True,
        )  # fmt: skip

    def _log_share(self, predicted: TrialResult) -> float:
        cluster = self._screen.template.cluster
        return share_of(
            {
                cluster.gpu.free_bytes: predicted.gpu_used_bytes or 0,
                cluster.host.available_bytes: predicted.host_resident_bytes or 0,
            }
        )

    def _candidates(self, records: Sequence[Record], model: Surrogate, taken: set[str]) -> Iterable[Screened]:
        """The ranking, and of a large pool those that promise most if they fit: speed costs little, memory much."""
        yield from self._ranking
        if self._objective == "pareto":  # what is slow may be small: all kinds are compared, not only the fastest
            yield from self._screen.look_at_all(idea.choice for idea in self._first_order)
        found = suggestions(self._space, records, self._random, seed=self._seed + len(records))
        ideas = (*self._first_order, *map(self._idea, filter(self._space.contains, found)))
        untried = [idea for key, idea in {idea.key: idea for idea in ideas}.items() if key not in taken]
        if not untried:
            return
        points = np.array([idea.point for idea in untried])
        gains = model.gains(points, np.array([idea.log_speed for idea in untried]))
        best_first = (untried[index].choice for index in np.argsort(-gains, kind="stable"))
        seen = 0
        while seen < _LOOKS and (asked := list(islice(best_first, _LOOKS - seen))):
            items = self._screen.look_at_all(asked)
            seen += sum(item.promising for item in items)
            yield from items

    @cached_property
    def _first_order(self) -> tuple[Idea, ...]:
        """Before every trial the same."""
        return tuple(map(self._idea, first_order_choices(self._space, self._placements)))

    def _idea(self, choice: Choice) -> Idea:
        template = self._screen.template
        speed = estimate_speed(self._shape, template.recipe, choice, template.cluster).tokens_per_second
        key = self._space.key(choice)
        return Idea(
            choice=choice, key=key, log_speed=log(speed) if speed else 0.0, point=self._point(key, choice)
        )  # fmt: skip


def _log_speed(predicted: TrialResult) -> float:
    return log(predicted.tokens_per_second) if predicted.tokens_per_second else 0.0


def baselines(shape: ModelShape, recipe: Recipe, space: Space) -> list[Choice]:
    """What a user of transformers' "auto" would have run: the documentation's examples, from fast to small.

    Source: transformers 5.23, docs/source/en/deepspeed.md, "Selecting a ZeRO stage"; its examples set overlap_comm.
    """
    cpu, param = OffloadOptimizer(device="cpu"), OffloadParam(device="cpu")
    steps = (
        replace(hf_auto_zero(2, shape.hidden_size), overlap_comm=True),
        replace(hf_auto_zero(2, shape.hidden_size), overlap_comm=True, offload_optimizer=cpu),
        hf_auto_zero(3, shape.hidden_size),
        replace(hf_auto_zero(3, shape.hidden_size), offload_optimizer=cpu, offload_param=param),
    )
    world = max(world_sizes(recipe, space.problem.cluster))
    choices = []
    for wanted in (_TRAINER_MICRO_BATCH, 1):
        micro_batch = nearest_micro_batch(recipe, world, wanted)
        batch = batch_sizes(recipe, micro_batch=micro_batch, world_size=world)
        choices += [Choice(zero=zero, batch=batch) for zero in steps]
    return choices


def diverse(ranking: Sequence[Screened], count: int) -> list[Screened]:
    """The best of the ranking, at most one of each kind first: stage, offload and recomputation make the kind."""
    first: dict[tuple[Any, ...], Screened] = {}
    for item in ranking:
        zero, batch = item.choice.zero, item.choice.batch
        kind = (zero.stage, zero.offload_optimizer.device, zero.offload_param.device)
        first.setdefault((*kind, item.choice.gradient_checkpointing, batch.world_size), item)
    chosen = list(first.values())[:count]
    return chosen + [item for item in ranking if item not in chosen][: count - len(chosen)]
