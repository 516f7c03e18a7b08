"""BackendContract: what every backend owes to the tuner. Subclass it, give `backend` and `spec`."""

from __future__ import annotations

import dataclasses

import pytest

from zplan import files
from zplan.backends.base import Backend
from zplan.trial import Outcome, TrialResult, TrialSpec


class BackendContract:
    """Inherit in a test class that defines the two fixtures."""

    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError

    @pytest.fixture
    def spec(self) -> TrialSpec:
        raise NotImplementedError

    def test_it_answers_with_its_own_label(self, backend: Backend, spec: TrialSpec) -> None:
        assert backend.run(spec).evidence == backend.evidence

    def test_a_trial_that_runs_has_a_speed(self, backend: Backend, spec: TrialSpec) -> None:
        result = backend.run(spec)
        assert result.outcome is Outcome.OK, result.message
        assert result.tokens_per_second is not None
        assert result.tokens_per_second > 0
        assert result.step_seconds is not None
        assert result.step_seconds > 0

    def test_bytes_are_whole_and_positive(self, backend: Backend, spec: TrialSpec) -> None:
        result = backend.run(spec)
        sizes = [getattr(result, item.name) for item in dataclasses.fields(result) if item.name.endswith("_bytes")]
        assert all(size is None or (type(size) is int and size >= 0) for size in sizes)

    def test_the_answer_survives_a_file(self, backend: Backend, spec: TrialSpec) -> None:
        result = backend.run(spec)
        assert files.from_data(TrialResult, files.to_data(result), name="answer") == result
