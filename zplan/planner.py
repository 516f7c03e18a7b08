"""Candidates for a model on a cluster, best first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

from zplan.candidates import (
    Ask,
    Candidate,
    Fixed,
    asker,
    base_zero,
    best_micro_batch,
    check_stage,
    evaluate,
    lift_settings,
    micro_batches,
    splits,
    world_sizes,
    zero_sections,
)
from zplan.errors import ConfigError
from zplan.fixes import Fix, quantify_fixes, smallest_changes
from zplan.hardware import Cluster
from zplan.memory.estimate import BucketRule
from zplan.memory.least import cannot_fit, least_need
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.settings import apply_settings
from zplan.speed.estimate import estimate_speed
from zplan.zero_config import BatchSizes, Choice, ZeroConfig, batch_sizes

__all__ = [
    "Candidate",
    "Fix",
    "Fixed",
    "evaluate",
    "make_choice",
    "quantify_fixes",
    "rank_candidates",
    "smallest_change_that_fits",
]


def make_choice(shape: ModelShape, recipe: Recipe, cluster: Cluster, *, fixed: Fixed) -> Choice:
    """One configuration from the user's flags: what is not given is as cautious as it gets.

    Micro-batch 1, recomputation on, nothing offloaded, transformers' "auto" sizes.

    Raises:
        ConfigError: no stage, a setting that cannot be read, sizes that do not divide.
    """
    fixed = lift_settings(fixed)
    if fixed.stage is None:
        raise ConfigError("no ZeRO stage given", because="one configuration has one stage", fix="--stage 2")
    stage = check_stage(fixed.stage)
    _refuse_dead_offload(fixed)
    devices = fixed.offload_optimizer or "none", fixed.offload_param or "none"
    zero = base_zero(stage, shape.hidden_size, cluster.host.nvme_path, *devices)
    batch = batch_sizes(
        recipe, micro_batch=fixed.micro_batch or 1, world_size=fixed.world_size or cluster.world_size, **splits(fixed)
    )
    checkpointing = True if fixed.gradient_checkpointing is None else fixed.gradient_checkpointing
    return Choice(zero=apply_settings(zero, fixed.settings), batch=batch, gradient_checkpointing=checkpointing)


def _refuse_dead_offload(fixed: Fixed) -> None:
    """A flag that the engine would silently ignore is a question that was not meant."""
    if fixed.stage == 0 and fixed.offload_optimizer not in (None, "none"):
        raise ConfigError(
            f"--offload-optimizer {fixed.offload_optimizer} has no effect at stage 0",
            because="DeepSpeed offloads optimizer states at stages 1, 2 and 3 (runtime/zero/config.py)",
            fix="--stage 2",
        )
    if fixed.stage in (0, 1, 2) and fixed.offload_param not in (None, "none"):
        raise ConfigError(
            f"--offload-param {fixed.offload_param} has no effect at stage {fixed.stage}",
            because="DeepSpeed offloads parameters at stage 3 only (runtime/zero/config.py)",
            fix="--stage 3",
        )


def rank_candidates(
    shape: ModelShape,
    recipe: Recipe,
    cluster: Cluster,
    *,
    fixed: Fixed | None = None,
    bucket_rule: BucketRule = "engine",
) -> tuple[Candidate, ...]:
    """Every strategy that the user's decisions leave open, best first.

    On all GPUs: each ZeRO stage x offload x recomputation, with the largest micro-batch that fits. On fewer GPUs: the
    best strategy of each number. Those that fit come first, by tokens/s; then the tight ones; then the others by how
    much is short.

    Raises:
        ConfigError: a setting that cannot be read, sizes that do not divide, decisions that contradict each other.
    """
    fixed = lift_settings(fixed if fixed is not None else Fixed())
    most, *fewer = world_sizes(cluster, fixed)
    found = sorted(_strategies(shape, recipe, cluster, fixed, most, bucket_rule), key=_rank)
    if not found:
        _refuse_dead_offload(fixed)
        raise ConfigError("the given stage and offload flags leave no strategy", fix="--stage 3")
    for world_size in fewer:
        sequences = world_size * (fixed.micro_batch or 1) // (fixed.sequence_parallel_size * fixed.autotp_size)
        if fixed.micro_batch is None or recipe.train_batch_size % sequences == 0:
            found.append(_best_on(shape, recipe, cluster, fixed, world_size, bucket_rule))
    return tuple(sorted(found, key=_rank))


Ladder = tuple[Choice, ...]
"""A strategy, from the smallest micro-batch to the largest."""


def _best_on(
    shape: ModelShape, recipe: Recipe, cluster: Cluster, fixed: Fixed, world_size: int, bucket_rule: BucketRule
) -> Candidate:
    """The fastest strategy that fits on fewer GPUs; if none does, the one that is least short."""
    ladders = tuple(_ladders(shape, recipe, cluster, fixed, world_size))
    ask = asker(shape, recipe, cluster, fixed, bucket_rule)
    fastest = _fastest_of(shape, recipe, cluster, ladders, ask)
    return fastest if fastest is not None else _least_short(shape, recipe, cluster, ladders, ask)


def _least_short(shape: ModelShape, recipe: Recipe, cluster: Cluster, ladders: Iterable[Ladder], ask: Ask) -> Candidate:
    """The first by `_rank`. Asked from the least need up, until the least need of the others is already more."""
    found: list[tuple[tuple[Any, ...], int, Candidate]] = []
    needs = ((least_need(shape, recipe, first, cluster), index, first) for index, (first, *_) in enumerate(ladders))
    for need, index, first in sorted(needs, key=itemgetter(0, 1)):
        if found and need > min(found)[0][:2]:
            break
        tried = ask(first)
        found.append((_rank(tried), index, tried))
    return min(found)[2]


def _fastest_of(
    shape: ModelShape, recipe: Recipe, cluster: Cluster, ladders: Iterable[Ladder], ask: Ask
) -> Candidate | None:
    """The fastest strategy that fits; None if none does.

    Speed costs microseconds and memory much more, so memory is asked from the fastest down until something fits, and
    not where the model's states alone are too much, or where the smallest micro-batch did not fit.
    """
    by_speed = sorted(
        ((choice, ladder[0]) for ladder in _with_room(shape, recipe, cluster, ladders) for choice in ladder),
        key=lambda item: -(estimate_speed(shape, recipe, item[0], cluster).tokens_per_second or 0.0),
    )
    smallest_fits: dict[Choice, bool] = {}
    for choice, first in by_speed:
        if not smallest_fits.get(first, True):
            continue
        tried = ask(choice)
        if tried.tier == 0:
            return tried
        if first not in smallest_fits:
            alone = tried if choice == first else ask(first)
            smallest_fits[first] = alone.tier == 0
    return None


def _with_room(shape: ModelShape, recipe: Recipe, cluster: Cluster, ladders: Iterable[Ladder]) -> Iterator[Ladder]:
    """Strategies that are not too much by what is held all the time alone, which is the same with recomputation."""
    known: dict[tuple[ZeroConfig, BatchSizes], bool] = {}
    for ladder in ladders:
        key = (ladder[0].zero, ladder[0].batch)
        if key not in known:
            known[key] = not cannot_fit(shape, recipe, ladder[0], cluster)
        if known[key]:
            yield ladder


def _strategies(
    shape: ModelShape, recipe: Recipe, cluster: Cluster, fixed: Fixed, world_size: int, bucket_rule: BucketRule
) -> Iterator[Candidate]:
    ask = asker(shape, recipe, cluster, fixed, bucket_rule)
    for ladder in _ladders(shape, recipe, cluster, fixed, world_size):
        yield best_micro_batch(shape, recipe, cluster, ladder, ask)


def _ladders(shape: ModelShape, recipe: Recipe, cluster: Cluster, fixed: Fixed, world_size: int) -> Iterator[Ladder]:
    """Each strategy as its choices from the smallest micro-batch to the largest."""
    sizes = micro_batches(recipe, world_size, fixed)
    batches = [batch_sizes(recipe, micro_batch=size, world_size=world_size, **splits(fixed)) for size in sizes]
    checkpointing = (True, False) if fixed.gradient_checkpointing is None else (fixed.gradient_checkpointing,)
    for zero in zero_sections(shape, cluster, fixed, world_size):
        for recompute in checkpointing:
            yield tuple(Choice(zero=zero, batch=batch, gradient_checkpointing=recompute) for batch in batches)


def _rank(candidate: Candidate) -> tuple[int, int, float, int, int]:
    """Tier, then (if it does not fit) bytes short, then speed, then the simpler one, then GPU bytes."""
    zero = candidate.choice.zero
    short = candidate.short_bytes if candidate.tier == 2 else 0
    speed = candidate.speed.tokens_per_second or 0.0
    parts = 2 * (zero.offloads_optimizer + zero.offloads_param) + (zero.offload_param.device == "nvme")
    return candidate.tier, short, -speed, 4 * parts + zero.stage, candidate.memory.gpu.used.expected


def smallest_change_that_fits(
    shape: ModelShape,
    recipe: Recipe,
    cluster: Cluster,
    *,
    fixed: Fixed | None = None,
    bucket_rule: BucketRule = "engine",
) -> tuple[Fix, ...]:
    """When nothing fits: of each kind of change the smallest one that would make something fit."""
    decided = lift_settings(fixed if fixed is not None else Fixed())

    def best() -> Candidate:
        return _best_on(shape, recipe, cluster, decided, world_sizes(cluster, decided)[0], bucket_rule)

    def fitting(shape: ModelShape, recipe: Recipe, cluster: Cluster) -> Candidate | None:
        ladders = _ladders(shape, recipe, cluster, decided, world_sizes(cluster, decided)[0])
        return _fastest_of(shape, recipe, cluster, ladders, asker(shape, recipe, cluster, decided, bucket_rule))

    return smallest_changes(best, shape, recipe, cluster, fitting)
