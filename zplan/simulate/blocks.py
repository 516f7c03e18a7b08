"""Blocks and pools of CUDA's caching allocator, its constants and its roundings.

Source: torch 2.13, c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (the constants).
"""

from __future__ import annotations

import bisect

from zplan.values import dataclass

MIB = 1 << 20
MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 * MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
MIN_LARGE_ALLOCATION_BYTES = 10 * MIB
LARGE_ROUNDING_BYTES = 2 * MIB
ADDRESS_BYTES = 1 << 50
"""Address range of an expandable segment; torch takes 9/8 of the card, of which no stream uses more either."""
Key = tuple[int, int, int]


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment: allocated, free, or addresses of an expandable segment that hold no memory."""

    segment: int
    offset: int
    bytes: int
    pool: Pool
    allocated: bool = False
    mapped: bool = True
    before: Block | None = None
    after: Block | None = None
    age_base: int = 0

    @property
    def key(self) -> Key:
        return (self.bytes, self.segment, self.offset)

    @property
    def is_split(self) -> bool:
        return self.before is not None or self.after is not None

    @property
    def expandable_bytes(self) -> int:
        """Its size, and the addresses behind it that it can grow into."""
        after = self.after
        return self.bytes + (after.bytes if after is not None and not after.mapped else 0)


@dataclass(slots=True)
class Clock:
    """How often blocks of one class of sizes were looked for, whatever the stream: what a block's age counts."""

    searches: int = 0


class Pool:
    """Free blocks of one stream and one class of sizes, smallest first; torch keeps all streams in one set."""

    def __init__(self, *, small: bool, clock: Clock) -> None:
        self.small = small
        self.clock = clock
        self.free: list[tuple[Key, Block]] = []
        self.unmapped: list[Block] = []
        """By address."""

    def insert(self, block: Block) -> None:
        block.age_base = self.clock.searches
        bisect.insort(self.free, (block.key, block))  # no two keys are equal, so no blocks are compared

    def remove(self, block: Block) -> None:
        del self.free[self.position(block.key)]

    def position(self, key: Key) -> int:
        return bisect.bisect_left(self.free, (key,))  # less than any (key, block), and no less than a smaller key's

    def age(self, block: Block) -> int:
        return self.clock.searches - block.age_base


def rounded_bytes(requested: int, power2_divisions: int = 0) -> int:
    """Block size of a request: a multiple of 512 bytes, or of a part of the power of two below it.

    Source: round_size, roundup_power2_next_division.
    """
    if power2_divisions > 1 and requested > MIN_BLOCK_BYTES * power2_divisions:
        floor = 1 << (requested.bit_length() - 1)
        step = floor >> (power2_divisions.bit_length() - 1)
        return -(-requested // step) * step if step else 2 * floor
    return max(MIN_BLOCK_BYTES, -(-requested // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)


def segment_bytes(size: int) -> int:
    """What is asked of cudaMalloc for a block of `size` bytes. Source: get_allocation_size."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_ALLOCATION_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // LARGE_ROUNDING_BYTES) * LARGE_ROUNDING_BYTES


def page_bytes(pool: Pool) -> int:
    """What an expandable segment maps at a time."""
    return SMALL_SEGMENT_BYTES if pool.small else LARGE_SEGMENT_BYTES


def format_size(num_bytes: int) -> str:
    """Bytes in PyTorch's own spelling (format_size of CUDACachingAllocator.cpp)."""
    if num_bytes <= 1024:
        return f"{num_bytes} bytes"
    if num_bytes <= MIB:
        return f"{num_bytes / 1024:.2f} KiB"
    if num_bytes <= 1 << 30:
        return f"{num_bytes / MIB:.2f} MiB"
    return f"{num_bytes / (1 << 30):.2f} GiB"
