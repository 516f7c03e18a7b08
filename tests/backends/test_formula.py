"""The formula backend keeps the contract and says which memory is short."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.backends.contract import BackendContract
from tests.oracle import TOY_RECIPE, toy_cluster, with_free_gpu
from zplan.backends.formula import FormulaBackend
from zplan.catalog import find_model
from zplan.model_shape import ModelShape
from zplan.trial import Outcome, TrialSpec
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


def test_a_full_gpu_is_gpu_oom_with_what_is_missing() -> None:
    spec = _spec()
    result = FormulaBackend(_shape()).run(replace(spec, cluster=with_free_gpu(spec.cluster, 1 << 20)))
    assert result.outcome is Outcome.GPU_OOM
    assert "GPU memory is short by" in result.message
