"""What ZeRO-3 may release: DeepSpeed's own answer, sooner."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

from sft import release, software
from zplan.zero3_trace import METHOD, PREFIX


@pytest.fixture
def original() -> Iterator[Any]:
    """DeepSpeed's method; put back when the test is over."""
    with pytest.MonkeyPatch.context() as patch:
        method = vars(Coordinator)[METHOD]
        patch.setattr(Coordinator, METHOD, method)
        yield method


class Traced:
    """As much of a coordinator as is asked."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.modules = [self._module(chance, index) for index in range(12)]
        order = (*self.modules, *self.modules[::-1], *chance.choices(self.modules, k=6))
        setattr(self, f"{PREFIX}submodule_order", order)
        setattr(self, f"{PREFIX}max_reuse_dist_in_numel", chance.choice((0, 30, 300, 10**9)))
        fetched: Any = defaultdict(lambda: -(10**10))
        for module in chance.sample(self.modules, 3):
            fetched.update(dict.fromkeys(module.parameters(recurse=False), chance.randrange(30)))
        setattr(self, f"{PREFIX}most_recent_step_id_param_fetched_for", fetched)
        self.order = order

    def _module(self, chance: random.Random, index: int) -> torch.nn.Module:
        module = torch.nn.Module()
        for number in range(chance.randrange(3)):
            parameter: Any = torch.nn.Parameter(torch.zeros(0))
            parameter.ds_id, parameter.ds_numel = 10 * index + number, chance.randrange(1, 40)
            parameter.ds_persist = chance.random() < 0.3
            module.register_parameter(f"p{number}", parameter)
        module.ds_external_parameters = lambda: ()  # type: ignore[assignment]
        module._z3_leaf = chance.random() < 0.2  # type: ignore[assignment]
        return module

    def is_complete_trace(self) -> bool:
        return True


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_deepspeed_would_release(original: Any, seed: int) -> None:
    traced = Traced(seed)
    for step, module in enumerate(traced.order):
        assert release.params_to_release(traced, module, step) == original(traced, module, step)


def test_what_is_compared_is_not_always_nothing() -> None:
    found = [
        release.params_to_release(traced, module, step)
        for traced in map(Traced, range(40))
        for step, module in enumerate(traced.order)
    ]
    assert any(found)
    assert not all(found)


def test_another_deepspeed_keeps_its_own(original: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "version", lambda name: "0.20.0")
    release.quicken_release()
    assert vars(Coordinator)[METHOD] is original
    monkeypatch.setattr(software, "version", lambda name: "0.19.8+cpu")
    release.quicken_release()
    assert vars(Coordinator)[METHOD] is release.params_to_release
