"""Configurations worth a look: every first-order one, neighbours of the best trials, what TPE suggests, random ones."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState, create_trial

from zplan.trial import Outcome
from zplan.tuner.ledger import Record, has_speed
from zplan.tuner.ranges import Elements, Options, Range, Share, Suggester, Value
from zplan.tuner.space import Draft, Space, world_sizes
from zplan.zero_config import Choice

_TPE_SUGGESTIONS, _RANDOM_SUGGESTIONS, _NEIGHBOURS, _PARENTS = 8, 32, 32, 3


def first_order_choices(space: Space, placements: Sequence[Draft]) -> Iterator[Choice]:
    """Every number of GPUs x placement of states x recomputation x micro-batch; other knobs as in `placements`."""
    recipe = space.problem.recipe
    for template in placements:
        for world_size in world_sizes(recipe, space.problem.cluster):
            share = recipe.train_batch_size // world_size
            for micro_batch in (size for size in range(1, share + 1) if share % size == 0):
                for recompute in (True, False):
                    choice = space.choice(
                        {
                            **template, "world_size": world_size, "train_micro_batch_size_per_gpu": micro_batch,
                            "gradient_checkpointing": recompute,
                        }
                    )  # fmt: skip
                    if space.contains(choice):
                        yield choice


def one_per_placement(space: Space, ranking: Sequence[Choice]) -> list[Draft]:
    """Stage x offload, each with the other knobs as the ranking has them."""
    found: dict[tuple[object, ...], Draft] = {}
    for choice in ranking:
        zero = choice.zero
        place = (zero.stage, zero.offload_optimizer.device, zero.offload_param.device)
        # More ranks first: knobs that act between ranks only are then in the draft.
        if place not in found or choice.batch.world_size > int(found[place]["world_size"]):
            found[place] = space.draft(choice)
    return list(found.values())


def suggestions(space: Space, records: Sequence[Record], rng: random.Random, *, seed: int) -> Iterator[Choice]:
    """Neighbours of the fastest trials, TPE's suggestions and random ones."""
    suggesters: list[Suggester] = [Rolls(rng) for _ in range(_RANDOM_SUGGESTIONS)]
    suggesters += tpe_suggestions(space, records, _TPE_SUGGESTIONS, seed=seed)
    ran = [record for record in records if record.result.outcome is Outcome.OK]
    for record in sorted(ran, key=lambda record: -(record.result.tokens_per_second or 0.0))[:_PARENTS]:
        draft = space.draft(record.choice)
        suggesters += [Neighbour(draft, rng) for _ in range(_NEIGHBOURS)]
    for suggester in suggesters:
        yield space.suggest(suggester)


class Rolls:
    """Random values, where `optuna.Trial` would suggest."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._rng.choice(list(choices))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        value: float = low * (high / low) ** self._rng.random()
        return min(high, max(low, round(value)))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        steps = round((high - low) / step) if step else 1
        return low + self._rng.randint(0, steps) * (step or high - low)


class Neighbour(Rolls):
    """A finished configuration with about two knobs rolled again."""

    def __init__(self, draft: Draft, rng: random.Random) -> None:
        super().__init__(rng)
        self._draft = draft

    def _keep(self, name: str) -> bool:
        return name in self._draft and self._rng.random() > 2 / max(len(self._draft), 3)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._draft[name] if self._keep(name) else super().suggest_categorical(name, choices)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self._draft[name]) if self._keep(name) else super().suggest_int(name, low, high, log=log)

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        return float(self._draft[name]) if self._keep(name) else super().suggest_float(name, low, high, step=step)


def tpe_suggestions(space: Space, records: Sequence[Record], count: int, *, seed: int) -> list[Suggester]:
    """Optuna's TPE, shown the finished trials with their memory constraint, asked for `count` suggestions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # group=True: the documented way for conditional spaces
        sampler = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for record in records:
            study.add_trial(_as_optuna(space, record))
        return [study.ask() for _ in range(count)]


def _as_optuna(space: Space, record: Record) -> optuna.trial.FrozenTrial:
    draft = space.draft(record.choice)
    ranges = {knob.name: knob.range for knob in space.knobs}
    return create_trial(
        state=TrialState.COMPLETE,
        value=record.result.tokens_per_second or 0.0,
        params=draft,
        distributions={name: _distribution(ranges[name], value) for name, value in draft.items()},
        constraints={"memory": -1.0 if has_speed(record.result) else 1.0},
    )


def _distribution(allowed: Range, value: Value) -> BaseDistribution:
    """The knob's distribution, widened to a value from outside its range (a trial from before the user narrowed it)."""
    match allowed:
        case Options(values):
            return CategoricalDistribution(values if value in values else (*values, value))
        case Elements(low, high):
            return IntDistribution(min(low, int(value)), max(high, int(value)), log=True)
        case Share(low, high):
            return FloatDistribution(min(low, float(value)), max(high, float(value)))  # a user's 0.35 is no tenth
