"""What is looked at before a rank starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sft.preflight import check_devices
from tests.sft.warm import make_plan, make_recipe
from zplan.errors import DoesNotFitError
from zplan.plan import Plan
from zplan.probe import NvmlGpu
from zplan.units import GIB


@dataclass(frozen=True)
class Driver:
    """So many cards, as NVML lists them."""

    count: int

    def devices(self) -> Sequence[NvmlGpu]:
        card = NvmlGpu(name="NVIDIA L4", total_bytes=24 * GIB, free_bytes=23 * GIB, compute_capability="8.9")
        return [card] * self.count


def plan_of(ranks: int, kind: str) -> Plan:
    plan = make_plan(make_recipe(Path("model"), None), ranks=ranks)
    assert kind in ("cuda", "cpu")
    gpu = replace(plan.cluster.gpu, kind="cuda" if kind == "cuda" else "cpu")
    return replace(plan, cluster=replace(plan.cluster, gpu=gpu))


@pytest.mark.parametrize(("cards", "visible"), [(1, None), (8, "0,3,5")])
def test_more_ranks_than_gpus_are_refused_before_any_is_started(cards: int, visible: str | None) -> None:
    with pytest.raises(DoesNotFitError, match=r"4 ranks, and this machine has [13] GPU"):
        check_devices(plan_of(4, "cuda"), Driver(cards), visible=visible)


@pytest.mark.parametrize(("kind", "cards"), [("cuda", 4), ("cuda", 8), ("cuda", 0), ("cpu", 1)])
def test_enough_gpus_cpu_ranks_and_a_driver_that_says_nothing_pass(kind: str, cards: int) -> None:
    check_devices(plan_of(4, kind), Driver(cards), visible=None)
