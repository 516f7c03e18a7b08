"""Where the parameters of ZeRO-1 and ZeRO-2 lie in their flat groups, and which rank holds what."""

from __future__ import annotations

from zplan.memory.bf16_optimizer import is_dealt
from zplan.memory.exchange import PLAIN, Exchange
from zplan.memory.instances import Instances
from zplan.memory.stage12 import partition
from zplan.zero_config import OffloadOptimizer, ZeroConfig

TENS = Instances(
    numel=(10, 20, 30, 40, 50), itemsize=(2,) * 5, trainable=(True,) * 5, group=(0,) * 5, base=(0,),
    groups=((0, 1, 2, 3, 4),),
)  # fmt: skip
HALF = 76
"""150 elements over two ranks, a multiple of two."""


def test_parameters_lie_one_behind_the_other_and_are_cut_where_a_partition_ends() -> None:
    cut = partition(TENS, 2, 0)
    assert cut.sizes == (HALF,)
    assert cut.mine == {0: 10, 1: 20, 2: 30, 3: HALF - 60}
    assert partition(TENS, 2, 1).mine == {3: 100 - HALF, 4: 50}


def test_round_robin_deals_them_out_before_they_are_cut() -> None:
    """The order is 0, 2, 4, then 1, 3 (deepspeed 0.19.8, stage_1_and_2.py:901)."""
    cut = partition(TENS, 2, 0, dealt=True)
    assert cut.sizes == (HALF,)
    assert cut.mine == {0: 10, 2: 30, 4: HALF - 40}
    assert partition(TENS, 2, 1, dealt=True).mine == {4: 90 - HALF, 1: 20, 3: 40}
    assert cut.touched_by_rank == (10 + 30 + 50, 50 + 20 + 40)


def test_one_rank_is_dealt_nothing() -> None:
    assert partition(TENS, 1, 0, dealt=True).pieces == partition(TENS, 1, 0).pieces


def test_bf16_optimizer_does_not_deal() -> None:
    """It takes the place of ZeRO-1 where bf16 gradients are added in fp32, and knows no round_robin_gradients."""
    zero, in_fp32 = ZeroConfig(stage=1, round_robin_gradients=True), Exchange(accumulated="fp32")
    assert is_dealt(zero, PLAIN, 2)
    assert not is_dealt(zero, in_fp32, 2)
    offloaded = ZeroConfig(stage=1, round_robin_gradients=True, offload_optimizer=OffloadOptimizer(device="cpu"))
    assert is_dealt(offloaded, in_fp32, 2)
