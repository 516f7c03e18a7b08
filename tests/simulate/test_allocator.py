"""The rules of CUDA's caching allocator, each on a stream made by hand."""

from __future__ import annotations

import pytest

from zplan.simulate.allocator import AllocatorOptions, CachingAllocator, CardFullError, format_size

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
    options = AllocatorOptions(garbage_collection_threshold=0.5)
    allocator = CachingAllocator(capacity_bytes=200 * MIB, options=options)
    allocator.free(allocator.allocate(64 * MIB))
    allocator.allocate(80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB


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
    allocator = CachingAllocator(capacity_bytes=100 * MIB, total_bytes=128 * MIB)
    allocator.allocate(64 * MIB)
    with pytest.raises(CardFullError) as caught:
        allocator.allocate(64 * MIB)
    assert str(caught.value).startswith(
        "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 128.00 MiB of which 36.00 MiB"
        " is free. Of the allocated memory 64.00 MiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but"
        " unallocated."
    )


def test_sizes_are_spelt_as_pytorch_spells_them() -> None:
    assert [format_size(n) for n in (1024, 2048, 3 << 20, 5 << 30)] == [
        "1024 bytes", "2.00 KiB", "3.00 MiB", "5.00 GiB",
    ]  # fmt: skip
