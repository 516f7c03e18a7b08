"""The rules of CUDA's caching allocator, each on a stream made by hand."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest

from zplan.errors import ConfigError
from zplan.simulate.allocator import AllocatorOptions, CachingAllocator, CardFullError, parse_options
from zplan.simulate.blocks import format_size, rounded_bytes

MIB = 1 << 20


def test_a_request_is_rounded_up_to_512_bytes() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert allocator.allocated_bytes == 512 + 1024


def test_small_requests_share_a_segment_of_2_mib() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert allocator.reserved_bytes == 2 * MIB


def test_requests_between_1_and_10_mib_share_a_segment_of_20_mib() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(5 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_a_large_request_gets_its_own_segment_rounded_to_2_mib() -> None:
    allocator = CachingAllocator()
    allocator.allocate(11 * MIB)
    assert allocator.reserved_bytes == 12 * MIB


def test_a_freed_block_serves_the_next_request_that_fits() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(64 * MIB))
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 64 * MIB


def test_a_remainder_of_at_most_1_mib_is_not_split_off() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(64 * MIB))
    allocator.allocate(63 * MIB)
    assert allocator.allocated_bytes == 64 * MIB


def test_free_neighbours_merge() -> None:
    allocator = CachingAllocator()
    first, second = allocator.allocate(10 * MIB), None
    allocator.free(first)
    allocator.free(allocator.allocate(64 * MIB))
    first, second = allocator.allocate(32 * MIB), allocator.allocate(32 * MIB)
    allocator.free(first)
    allocator.free(second)
    allocator.allocate(64 * MIB)
    assert allocator.reserved_bytes == (10 + 64) * MIB


def test_a_block_of_another_stream_is_not_reused() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(64 * MIB, stream=0))
    allocator.allocate(64 * MIB, stream=1)
    assert allocator.reserved_bytes == 128 * MIB


def test_empty_cache_gives_back_whole_segments_only() -> None:
    allocator = CachingAllocator()
    kept = allocator.allocate(5 * MIB)
    allocator.free(allocator.allocate(5 * MIB))
    allocator.free(allocator.allocate(64 * MIB))
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_max_split_size_keeps_large_blocks_for_large_requests() -> None:
    allocator = CachingAllocator(options=AllocatorOptions(max_split_size_bytes=32 * MIB))
    allocator.free(allocator.allocate(64 * MIB))
    allocator.allocate(16 * MIB)
    assert allocator.reserved_bytes == (64 + 16) * MIB


def test_garbage_collection_frees_idle_segments_before_the_device_is_asked() -> None:
    """At 64 of 100 MiB the threshold is passed; without a memory fraction torch ignores the option."""

    def reserved(fraction: float | None) -> int:
        options = AllocatorOptions(garbage_collection_threshold=0.5, per_process_memory_fraction=fraction)
        allocator = CachingAllocator(capacity_bytes=200 * MIB, options=options)
        allocator.free(allocator.allocate(64 * MIB))
        allocator.allocate(80 * MIB)
        return allocator.reserved_bytes

    assert reserved(0.5) == 80 * MIB
    assert reserved(None) == (64 + 80) * MIB


def test_garbage_collection_takes_the_segments_that_waited_longest() -> None:
    """Source: garbage_collect_cached_blocks: those of at least average age go first, and only as many as needed."""
    options = AllocatorOptions(garbage_collection_threshold=0.5, per_process_memory_fraction=1.0)
    allocator = CachingAllocator(capacity_bytes=1000 * MIB, options=options)
    old, new = allocator.allocate(100 * MIB), allocator.allocate(120 * MIB)
    allocator.free(old)
    for _ in range(3):
        allocator.allocate(20 * MIB, stream=1)
    allocator.free(new)
    allocator.allocate(300 * MIB)
    assert allocator.reserved_bytes == (100 + 120 + 3 * 20 + 300) * MIB  # 80 MiB above the threshold
    allocator.allocate(310 * MIB)
    assert allocator.reserved_bytes == (120 + 3 * 20 + 300 + 310) * MIB


def test_expandable_segments_grow_where_fixed_ones_fragment() -> None:
    def reserved(options: AllocatorOptions) -> int:
        allocator = CachingAllocator(options=options)
        for size in range(20, 200, 20):
            allocator.free(allocator.allocate(size * MIB))
        return allocator.reserved_bytes

    assert reserved(AllocatorOptions(expandable_segments=True)) == 180 * MIB
    assert reserved(AllocatorOptions()) == sum(range(20, 200, 20)) * MIB


def test_a_full_card_first_gives_back_its_cache() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.allocate(64 * MIB))
    allocator.allocate(80 * MIB)
    assert (allocator.num_retries, allocator.reserved_bytes) == (1, 80 * MIB)


def test_a_full_card_speaks_as_pytorch_does() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB, total_bytes=128 * MIB, other_bytes=20 * MIB)
    allocator.allocate(64 * MIB)
    with pytest.raises(CardFullError) as caught:
        allocator.allocate(64 * MIB)
    assert str(caught.value).startswith(
        "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 128.00 MiB of which 36.00 MiB"
        " is free. Including non-PyTorch memory, this process has 84.00 MiB memory in use. Of the allocated memory"
        " 64.00 MiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated."
    )


def test_sizes_are_spelt_as_pytorch_spells_them() -> None:
    assert [format_size(n) for n in (1024, 2048, 3 << 20, 5 << 30)] == [
        "1024 bytes", "2.00 KiB", "3.00 MiB", "5.00 GiB",
    ]  # fmt: skip


def test_what_could_not_be_had_is_the_segment_not_the_tensor() -> None:
    """Source: malloc prints alloc_size: a tensor of 5 MiB asks the device for 20 MiB."""
    allocator = CachingAllocator(capacity_bytes=10 * MIB)
    with pytest.raises(CardFullError, match=r"Tried to allocate 20\.00 MiB"):
        allocator.allocate(5 * MIB)


@pytest.mark.parametrize("mebibytes", [84, 400])
@pytest.mark.parametrize("divisions", [4, 8])
def test_roundup_power2_divisions_rounds_to_parts_of_the_power_below(mebibytes: int, divisions: int) -> None:
    """As torch's test_cuda.py, test_allocator_settings (power2_div), with its two sizes of floats."""
    power = 64 if mebibytes == 84 else 256
    step = power // divisions
    assert rounded_bytes(mebibytes * MIB, divisions) == -(-mebibytes // step) * step * MIB
    assert rounded_bytes(power * MIB, divisions) == power * MIB
    assert rounded_bytes(600, divisions) == 1024  # below 512 bytes a division


def test_max_split_size_gives_back_the_blocks_that_it_keeps_whole() -> None:
    """As torch's test_cuda.py, test_max_split_expandable: three of 40 MiB fill 120, and make room for one of 120."""
    options = AllocatorOptions(max_split_size_bytes=40 * MIB, per_process_memory_fraction=1.0)
    allocator = CachingAllocator(capacity_bytes=120 * MIB, options=options)
    blocks = [allocator.allocate(40 * MIB) for _ in range(3)]
    with pytest.raises(CardFullError):
        allocator.allocate(40 * MIB)
    retries = allocator.num_retries
    for block in blocks:
        allocator.free(block)
    allocator.allocate(120 * MIB)
    assert allocator.reserved_bytes == 120 * MIB
    assert allocator.num_retries == retries  # release_available_cached_blocks sufficed


def test_empty_cache_gives_back_the_whole_pages_inside_an_expandable_segment_and_they_are_filled_again() -> None:
    """Source: unmap_block, find_expandable_block: 30 of the 50 MiB between two tensors are a page and a half."""
    allocator = CachingAllocator(options=AllocatorOptions(expandable_segments=True))
    first, hole, last = (allocator.allocate(size * MIB) for size in (20, 50, 10))
    assert allocator.reserved_bytes == 80 * MIB
    allocator.free(hole)
    allocator.empty_cache()
    assert allocator.reserved_bytes == (80 - 40) * MIB
    refilled = allocator.allocate(45 * MIB)
    assert refilled.offset == 20 * MIB
    assert allocator.reserved_bytes == 80 * MIB
    for block in (first, refilled, last):
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        AllocatorOptions(),
        AllocatorOptions(expandable_segments=True),
        AllocatorOptions(max_split_size_bytes=24 * MIB),
        AllocatorOptions(garbage_collection_threshold=0.6, per_process_memory_fraction=1.0),
        AllocatorOptions(roundup_power2_divisions=4),
    ],
    ids=["default", "expandable", "max_split", "garbage", "power2"],
)
def test_no_byte_is_lost_or_handed_out_twice_over_a_random_run(options: AllocatorOptions) -> None:
    chance = random.Random(7)
    allocator = CachingAllocator(capacity_bytes=600 * MIB, options=options)
    live = []
    for _ in range(3000):
        if live and chance.random() < 0.5:
            allocator.free(live.pop(chance.randrange(len(live))))
        elif chance.random() < 0.01:
            allocator.empty_cache()
        else:
            size = chance.choice((700, 300_000, 3 * MIB, 14 * MIB, 40 * MIB))
            with contextlib.suppress(CardFullError):
                live.append(allocator.allocate(size + chance.randrange(size), stream=chance.randrange(2)))
        free = sum(block.bytes for block in allocator._free_blocks())
        assert free + sum(block.bytes for block in live) == allocator.reserved_bytes <= 600 * MIB
        assert allocator.allocated_bytes == sum(block.bytes for block in live)
    spans = sorted((block.pool.small, block.segment, block.offset, block.offset + block.bytes) for block in live)
    assert all(a[:2] != b[:2] or a[3] <= b[2] for a, b in itertools.pairwise(spans))
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_the_options_are_those_of_pytorch_cuda_alloc_conf() -> None:
    text = "expandable_segments:True, max_split_size_mb:64,roundup_power2_divisions:8,backend:native"
    assert parse_options(text) == AllocatorOptions(
        expandable_segments=True, max_split_size_bytes=64 * MIB, roundup_power2_divisions=8
    )
    with pytest.raises(ConfigError, match="roundup_power2_divisions"):
        parse_options("roundup_power2_divisions:[256:1,>:8]")
