"""Gradients that DeepSpeed allocates and drops: the same bytes, and zeros only where somebody keeps them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from sft import software
from sft.dropped_gradients import unwritten_gradients
from sft.meter import LiveBytes

NUMEL = 1000


def initialize(monkeypatch: pytest.MonkeyPatch, *, cpu_offload: bool) -> tuple[Any, list[str], int]:
    """The partition, what was called for its gradient, and the peak of live bytes."""
    partition = torch.nn.Parameter(torch.ones(NUMEL))
    optimizer: Any = SimpleNamespace(
        bit16_groups=[[partition]], partition_size=[NUMEL], single_partition_of_fp32_groups=[partition], device="cpu",
        cpu_offload=cpu_offload, cpu_offload_pin_memory=False, optimizer=torch.optim.SGD([partition]),
    )  # fmt: skip
    called: list[str] = []
    for name in ("zeros", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, name=name, **k: (called.append(name), make(*a, **k))[1])
    with LiveBytes() as live:  # type: ignore[no-untyped-call]
        DeepSpeedZeroOptimizer.initialize_optimizer_states(optimizer)
    return partition, called, live.peak_bytes


def test_a_gradient_that_is_dropped_is_allocated_and_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with unwritten_gradients():
        partition, called, peak_bytes = initialize(monkeypatch, cpu_offload=False)
    assert partition.grad is None
    assert called == ["empty"]
    assert peak_bytes == NUMEL * 4  # fp32


def test_a_gradient_that_stays_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    with unwritten_gradients():
        partition, called, peak_bytes = initialize(monkeypatch, cpu_offload=True)
    assert not partition.grad.any()
    assert called == ["zeros"]
    assert peak_bytes == NUMEL * 4


def test_behind_its_end_and_under_another_deepspeed_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    before = DeepSpeedZeroOptimizer.initialize_optimizer_states
    with unwritten_gradients():
        assert DeepSpeedZeroOptimizer.initialize_optimizer_states is not before
    assert DeepSpeedZeroOptimizer.initialize_optimizer_states is before
    monkeypatch.setattr(software, "version", lambda name: "0.20.0")
    with unwritten_gradients():
        assert DeepSpeedZeroOptimizer.initialize_optimizer_states is before
