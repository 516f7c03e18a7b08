"""Backend: one question (TrialSpec), one answer (TrialResult)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from zplan.trial import Evidence, TrialResult, TrialSpec
from zplan.zero_config import Choice


class Backend(Protocol):
    """Formula, simulated and real answer the same question; the tuner does not know which one it asks."""

    @property
    def evidence(self) -> Evidence:
        """The label that this backend's answers carry."""
        ...

    def run(self, spec: TrialSpec) -> TrialResult:
        """Answer one question. A configuration that fails is an outcome, not an exception.

        Raises:
            MachineError: the machine, not the configuration, is in the way.
        """
        ...


class Predictor(Backend, Protocol):
    """A backend that answers many questions at once: what a search compares its candidates by."""

    def run_all(self, spec: TrialSpec, choices: Sequence[Choice]) -> list[TrialResult]:
        """What `run` answers to the spec with each of the choices in place of its own, in their order."""
        ...
