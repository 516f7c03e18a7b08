"""Short names of strategies."""

from __future__ import annotations

from zplan.report.labels import choice_label, strategy_code, strategy_legend
from zplan.zero_config import BatchSizes, Choice, ZeroConfig


def split(**sizes: int) -> Choice:
    batch = BatchSizes(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, world_size=4, **sizes)
    return Choice(zero=ZeroConfig(stage=2), batch=batch)


def test_what_ranks_share_is_in_the_name_and_the_legend_only_where_they_do() -> None:
    alone, shared, cut = split(), split(sequence_parallel_size=2), split(autotp_size=4)
    assert [strategy_code(one, 8) for one in (alone, shared, cut)] == [
        "ZeRO-2 ckpt 4/8", "ZeRO-2 ckpt seq/2 4/8", "ZeRO-2 ckpt tp/4 4/8",
    ]  # fmt: skip
    assert "sequences over 2" in choice_label(shared)
    assert "matrices over 4" in choice_label(cut)
    assert "Ulysses" not in strategy_legend([alone])
    assert "Ulysses" in strategy_legend([alone, shared])
