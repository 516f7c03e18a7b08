"""Which suggestions are worth a trial: those that fit by formula, and that a simulation, if there is one, confirms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace

from zplan.backends.base import Backend, Predictor
from zplan.errors import ConfigError
from zplan.memory.families import leaf_refused
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.tuner.ledger import out_of_memory
from zplan.tuner.space import Space
from zplan.values import dataclass
from zplan.zero_config import Choice

_SURE_SHARE = 0.6
"""Of GPU or host memory, by formula. Below it nothing is simulated: where the formula was furthest off, on a model of
which it says so itself, it was 38 % too low (reports/formula_vs_simulation.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """One configuration, its canonical key, and what is known about it before any trial."""

    choice: Choice
    key: str
    predicted: TrialResult

    @property
    def promising(self) -> bool:
        """It fits by formula, if only tightly: what is expected does, the upper bound need not."""
        return self.predicted.outcome is Outcome.OK


@dataclass
class Screen:
    """Asks the formula about every suggestion, once per key, and the simulator about the few that win."""

    space: Space
    formula: Predictor
    template: TrialSpec
    """Everything of a trial but its choice."""
    simulator: Backend | None = None
    refused: set[str] = field(default_factory=set)
    """Keys that the simulation says do not fit."""
    _seen: dict[str, Screened] = field(default_factory=dict)
    _simulated: dict[str, TrialResult] = field(default_factory=dict)

    def spec(self, choice: Choice) -> TrialSpec:
        """The question about one configuration."""
        t = self.template
        return TrialSpec(
            recipe=t.recipe, choice=choice, cluster=t.cluster, model_path=t.model_path, warmup_steps=t.warmup_steps,
            timed_steps=t.timed_steps, weights=t.weights, deadline_seconds=t.deadline_seconds,
        )  # fmt: skip

    def look(self, choice: Choice) -> Screened:
        """The formula's answer."""
        return self.look_at_all([choice])[0]

    def look_at_all(self, choices: Iterable[Choice]) -> list[Screened]:
        """The formula's answers, in order; duplicates that differ only in dead knobs share theirs.

        DeepSpeed stops where it has fewer buffers of offload_param than it takes: these are looked at with enough.
        """
        stopped: dict[str, str] = {}
        canonical = [self._runnable(self.space.canonical(choice), stopped) for choice in choices]
        keys = [self.space.key(choice) for choice in canonical]
        new = {key: choice for key, choice in zip(keys, canonical, strict=True) if key not in self._seen}
        answers = self.formula.run_all(self.template, list(new.values()))
        for (key, choice), predicted in zip(new.items(), answers, strict=True):
            why = stopped.get(key)
            if why is not None:
                predicted = replace(predicted, outcome=Outcome.BAD_CONFIG, message=why)
            self._seen[key] = Screened(choice=choice, key=key, predicted=predicted)
        return [self._seen[key] for key in keys]

    def _runnable(self, choice: Choice, stopped: dict[str, str]) -> Choice:
        """With enough buffers; itself, and why, if no number within the ranges is, or DeepSpeed stops anyway."""
        problem = self.space.problem
        why = leaf_refused(problem.shape, problem.recipe, choice)
        if why is not None:
            stopped[self.space.key(choice)] = why
            return choice
        try:
            return self.space.runnable(choice)
        except ConfigError as error:
            stopped[self.space.key(choice)] = str(error)
            return choice

    def confirm(self, item: Screened) -> TrialResult | None:
        """The simulation's answer; None without a simulator, or where memory is far from full.

        What runs out of memory there is refused from now on. What cannot be simulated is not: the trial tells.
        """
        if self.simulator is None or self._share(item.predicted) < _SURE_SHARE:
            return None
        if item.key not in self._simulated:
            self._simulated[item.key] = self.simulator.run(self.spec(item.choice))
        if self.says_no(item):
            self.refused.add(item.key)
        return self._simulated[item.key]

    def refusals(self) -> list[Screened]:
        """What the simulation said no to."""
        return [item for key in self._simulated if self.says_no(item := self._seen[key])]

    def says_no(self, item: Screened) -> bool:
        """Whether the simulation was asked and ran out of memory."""
        result = self._simulated.get(item.key)
        return result is not None and out_of_memory(result)

    def _share(self, predicted: TrialResult) -> float:
        """How full the GPU or the host gets, whichever is fuller; full where the formula does not know."""
        cluster = self.template.cluster
        if predicted.gpu_used_bytes is None or predicted.host_resident_bytes is None:
            return 1.0
        return max(
            predicted.gpu_used_bytes / cluster.gpu.free_bytes,
            predicted.host_resident_bytes / cluster.host.available_bytes,
        )
