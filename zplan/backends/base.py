"""Backend: one question (TrialSpec), one answer (TrialResult)."""

from __future__ import annotations

from typing import Protocol

from zplan.trial import Evidence, TrialResult, TrialSpec


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
