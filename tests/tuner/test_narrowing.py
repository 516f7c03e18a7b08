"""Users fix, narrow and bound knobs with the flags of every command."""

from __future__ import annotations

import pytest

from zplan.errors import ConfigError
from zplan.planner import Fixed
from zplan.tuner.narrowing import narrow
from zplan.tuner.ranges import Elements, Options, Share


def test_a_flag_fixes_its_knob() -> None:
    ranges = narrow(Fixed(stage=2, micro_batch=4, offload_optimizer="cpu")).ranges
    assert ranges == {
        "stage": Options((2,)),
        "train_micro_batch_size_per_gpu": Options((4,)),
        "offload_optimizer.device": Options(("cpu",)),
    }


def test_a_setting_narrows_or_bounds() -> None:
    ranges = narrow(
        Fixed(
            settings=(
                "overlap_comm=true", "stage=2,3", "reduce_bucket_size=1e6..1e8", "offload_optimizer.ratio=0.3..0.8",
            )
        )
    ).ranges  # fmt: skip
    assert ranges == {
        "overlap_comm": Options((True,)),
        "stage": Options((2, 3)),
        "reduce_bucket_size": Elements(1_000_000, 100_000_000),
        "offload_optimizer.ratio": Share(0.3, 0.8),
    }


@pytest.mark.parametrize(
    "fixed", [Fixed(sequence_parallel_size=2), Fixed(settings=("tensor_parallel.autotp_size=2",))], ids=["file", "set"]
)
def test_shared_sequences_and_cut_matrices_are_not_searched(fixed: Fixed) -> None:
    with pytest.raises(ConfigError, match=r"(sequence_parallel|autotp)_size is 2"):
        narrow(fixed)


def test_a_switch_that_is_typed_as_a_number_is_a_switch() -> None:
    ranges = narrow(Fixed(settings=("overlap_comm=0", "gradient_checkpointing=1"))).ranges
    assert [type(value) for knob in ranges.values() if isinstance(knob, Options) for value in knob.values] == [bool] * 2


def test_only_single_values_reach_the_ranking() -> None:
    settings = ("overlap_comm=true", "stage=2,3", "reduce_bucket_size=1e6..1e8")
    assert narrow(Fixed(settings=settings)).fixed.settings == ("overlap_comm=true",)


def test_a_key_that_is_no_knob_is_kept_in_every_choice() -> None:
    assert narrow(Fixed(settings=("zero_hpz_partition_size=2",))).base.zero_hpz_partition_size == 2


@pytest.mark.parametrize(
    "setting",
    [
        "overlap_comm",
        "no_such_key=1",
        "zero_hpz_partition_size=1,2",
        "sub_group_size=9..3",
        "stage=x",
        "overlap_comm=2",
    ],
)
def test_a_setting_without_a_meaning_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError):
        narrow(Fixed(settings=(setting,)))
