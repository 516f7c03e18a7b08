"""The 4.5x rule as documented."""

from zplan.memory.documented import documented_bucket_bytes
from zplan.zero_config import ZeroConfig


def test_the_documentation_s_example_is_nine_gigabytes() -> None:
    zero = ZeroConfig(stage=2, overlap_comm=True, allgather_bucket_size=500_000_000, reduce_bucket_size=500_000_000)
    assert documented_bucket_bytes(zero) == int(500_000_000 * 2 * 2 * 4.5) == 9_000_000_000


def test_without_overlap_the_rule_has_no_factor() -> None:
    assert documented_bucket_bytes(ZeroConfig(stage=2)) == (500_000_000 + 500_000_000) * 2


def test_where_the_docs_state_no_rule_there_is_none() -> None:
    assert documented_bucket_bytes(ZeroConfig(stage=3)) is None
    assert documented_bucket_bytes(ZeroConfig(stage=0)) is None
