"""Which steps a trial takes, and on what: those that warm up, the one with the peak, those that are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft import data
from sft.release import is_quick
from zplan.trial import TrialSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Numbers of steps, in their order."""

    untimed: int
    """Warm-up: the clock starts behind them."""
    metered: int
    """Measured in detail; the last of them has the trial's peak."""
    timed: int
    short: int
    """Of a few tokens, at the beginning."""

    @property
    def total(self) -> int:
        return self.untimed + self.timed


def plan_steps(spec: TrialSpec, drawn: Sequence[data.Example]) -> Steps:
    """The spec's steps. The one with the peak warms nothing up behind the first: where the sequences drawn from the
    data are as long as its own, it is one of the timed steps, less the seconds that the meter takes in it.

    Limits: of the demo model that step still takes 1 to 6 % more CPU time than the next one; an operator's way into the
    meter is in it, and it learns from every token.

    Args:
        drawn: the examples of the timed steps; none where they are worst-case sequences themselves.
    """
    short = 1 if may_begin_short(spec) else 0
    alike = all(len(item.input_ids) == spec.recipe.max_length for item in drawn)
    return Steps(
        untimed=spec.warmup_steps - (1 if alike and may_time_the_peak(spec) else 0),
        metered=spec.warmup_steps,
        timed=spec.timed_steps,
        short=short,
    )


def may_begin_short(spec: TrialSpec) -> bool:
    """Whether the first step can be fed a few tokens without missing a peak.

    Below stage 3 it differs from the second one only by what it does not have yet: the optimizer's states. ZeRO-3's
    first step has no trace either, and its peak can be the highest. On CUDA a step is cheap, and what the allocator
    reserves depends on the order of the sizes. Packing would put short rows together.
    """
    return _is_costly(spec) and spec.choice.zero.stage < 3


def may_time_the_peak(spec: TrialSpec) -> bool:
    """Whether the last warm-up step does what every later one does. ZeRO-3's second step, the first with a trace, must
    not search through all of it for every module."""
    return _is_costly(spec) and (spec.choice.zero.stage < 3 or is_quick())


def _is_costly(spec: TrialSpec) -> bool:
    """CPU ranks, whose warm-up steps take most of a trial, on rows that are what they are."""
    return spec.cluster.gpu.kind == "cpu" and spec.warmup_steps > 1 and not spec.recipe.packing


def draw(spec: TrialSpec, examples: Sequence[data.Example]) -> tuple[data.Example, ...]:
    """Examples of the timed steps: as many as they need, none without data."""
    recipe = spec.recipe
    return data.draw_examples(
        examples,
        spec.timed_steps * recipe.train_batch_size,
        max_length=recipe.max_length,
        seed=recipe.seed,
        packing=recipe.packing,
    )


def rows(spec: TrialSpec, steps: Steps, drawn: Sequence[data.Example], *, vocab_size: int) -> tuple[data.Example, ...]:
    """All examples of the trial, in order: short, worst-case, and drawn ones (or worst-case ones without data).

    With packing, more of those drawn than are needed.
    """
    recipe, batch = spec.recipe, spec.recipe.train_batch_size
    longest = data.worst_case(
        steps.metered * batch, max_length=recipe.max_length, vocab_size=vocab_size, seed=recipe.seed
    )
    short = steps.short * batch
    first = (*(data.shortened(item) for item in longest[:short]), *longest[short:])
    left = (steps.total - steps.metered) * batch
    if not drawn:
        return first + data.worst_case(left, max_length=recipe.max_length, vocab_size=vocab_size, seed=recipe.seed + 1)
    return first + tuple(drawn if recipe.packing else drawn[:left])
