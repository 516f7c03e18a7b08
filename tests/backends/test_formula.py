"""The formula backend keeps the contract and says which memory is short."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.backends.contract import BackendContract
from tests.oracle import TOY_RECIPE, toy_cluster, with_free_gpu
from zplan.backends.formula import FormulaBackend
from zplan.catalog import find_model
from zplan.memory.estimate import estimate_memory
from zplan.model_shape import ModelShape
from zplan.trial import Outcome, TrialSpec
from zplan.tuner.pool import Rolls
from zplan.tuner.space import Problem, Space
from zplan.zero_config import Choice, ZeroConfig, batch_sizes


def _shape() -> ModelShape:
    shape = find_model("smollm2-135m", overrides={})
    assert isinstance(shape, ModelShape)
    return shape


def _spec() -> TrialSpec:
    choice = Choice(zero=ZeroConfig(stage=2), batch=batch_sizes(TOY_RECIPE, micro_batch=1, world_size=4))
    return TrialSpec(recipe=TOY_RECIPE, cluster=toy_cluster(gpu_gib=80), model_path="none", choice=choice)


class TestContract(BackendContract):
    @pytest.fixture
    def backend(self) -> FormulaBackend:
        return FormulaBackend(_shape())

    @pytest.fixture
    def spec(self) -> TrialSpec:
        return _spec()


def test_many_choices_are_answered_like_one_at_a_time() -> None:
    """Of every kind of outcome, and again when the backend remembers another cluster."""
    shape, spec = _shape(), _spec()
    space, rng = Space(Problem(shape=shape, recipe=TOY_RECIPE, cluster=spec.cluster)), random.Random(0)
    choices = [space.suggest(Rolls(rng)) for _ in range(24)]
    backend, outcomes = FormulaBackend(shape), set()
    for cluster in (toy_cluster(gpu_gib=4), toy_cluster(gpu_gib=80)):
        spec = replace(spec, cluster=cluster)
        together = backend.run_all(spec, choices)
        outcomes |= {answer.outcome for answer in together}
        for choice, answer in zip(choices, together, strict=True):
            memory = estimate_memory(shape, TOY_RECIPE, choice, cluster)
            assert answer == FormulaBackend(shape).run(replace(spec, choice=choice))
            assert answer.gpu_used_bytes == memory.gpu.used.expected
            assert answer.host_pinned_bytes == memory.host.pinned_bytes
            assert answer.phases == memory.gpu.phases
            assert (answer.outcome is Outcome.GPU_OOM) == (memory.gpu.verdict == "does_not_fit")
    assert outcomes >= {Outcome.OK, Outcome.GPU_OOM}
    assert backend.run_all(spec, []) == []


def test_a_full_gpu_is_gpu_oom_with_what_is_missing() -> None:
    spec = _spec()
    result = FormulaBackend(_shape()).run(replace(spec, cluster=with_free_gpu(spec.cluster, 1 << 20)))
    assert result.outcome is Outcome.GPU_OOM
    assert "GPU memory is short by" in result.message
