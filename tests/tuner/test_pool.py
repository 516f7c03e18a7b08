"""What the pool is made of, when earlier trials have values that today's ranges do not."""

from __future__ import annotations

import random
import warnings

import pytest

from tests.oracle import TOY_RECIPE, toy_cluster, toy_shape
from zplan.trial import Outcome, TrialResult
from zplan.tuner.ledger import Record
from zplan.tuner.pool import suggestions
from zplan.tuner.ranges import Options, Share, is_inside
from zplan.tuner.space import Problem, Space
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig

PROBLEM = Problem(shape=toy_shape(), recipe=TOY_RECIPE, cluster=toy_cluster())
RNG = random.Random(0)
ROWS = TOY_RECIPE.train_batch_size // 4


def tried(ratio: float) -> Record:
    zero = ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device="cpu", ratio=ratio))
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=ROWS, world_size=4)
    result = TrialResult(outcome=Outcome.OK, evidence="measured", tokens_per_second=1000.0)
    return Record(key=str(ratio), origin="search", choice=Choice(zero=zero, batch=batch), result=result)


@pytest.mark.parametrize("allowed", [Share(0.1, 1.0), Share(0.35, 0.72), Share(0.4, 0.5)])
def test_a_share_that_is_no_tenth_or_out_of_todays_range_is_shown_to_the_sampler(allowed: Share) -> None:
    fixed = {"stage": Options((3,)), "offload_optimizer.device": Options(("cpu",))}
    space = Space(PROBLEM, {**fixed, "offload_optimizer.ratio": allowed})
    records = [tried(ratio) for ratio in (0.2, 0.35, 0.72, 0.9, 1.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [space.draft(choice)["offload_optimizer.ratio"] for choice in suggestions(space, records, RNG, seed=0)]
    fresh = [ratio for ratio in found if ratio not in (0.2, 0.35, 0.72, 0.9, 1.0)]
    assert fresh
    assert all(is_inside(allowed, ratio) for ratio in fresh)
