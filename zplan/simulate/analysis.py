"""From the stream of allocations to the report: peaks, what was alive at the peak, reserved memory, timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache

from zplan.simulate.allocator import CachingAllocator, CardFullError
from zplan.simulate.blocks import Block as CacheBlock
from zplan.simulate.report import Allocation, Category, MemoryKind, Sample
from zplan.simulate.tracker import ALLOCATE, EMPTY_CACHE, Block, Tracker
from zplan.values import dataclass

NUM_SAMPLES = 400
NUM_TOP_ALLOCATIONS = 12
KINDS: tuple[MemoryKind, ...] = ("gpu", "host", "pinned")


@dataclass(slots=True)
class Peaks:
    """Highest bytes per phase and kind, and where the GPU's overall peak was."""

    phases: dict[MemoryKind, dict[str, int]]
    gpu_bytes: int
    gpu_index: int
    gpu_phase: str
    samples: tuple[Sample, ...]


def phased_events(tracker: Tracker) -> Iterator[tuple[int, str, tuple[int, Block | None, int]]]:
    """(index, phase, event) in order; a phase that allocates nothing still appears through its neighbours."""
    marks = iter([*tracker.marks[1:], (len(tracker.events) + 1, "")])
    phase = tracker.marks[0][1]
    next_index, next_phase = next(marks)
    for index, event in enumerate(tracker.events):
        while index >= next_index:
            phase = next_phase
            next_index, next_phase = next(marks)
        yield index, phase, event


def find_peaks(tracker: Tracker) -> Peaks:
    """One pass over the events."""
    current: dict[MemoryKind, int] = dict.fromkeys(KINDS, 0)
    parts: dict[Category, int] = defaultdict(int)
    phases: dict[MemoryKind, dict[str, int]] = {kind: {} for kind in KINDS}
    peak, peak_index, peak_phase = 0, -1, ""
    samples: list[Sample] = []
    stride = max(len(tracker.events) // NUM_SAMPLES, 1)
    before = ""
    for index, phase, (action, block, operation) in phased_events(tracker):
        if phase != before:
            before = phase
            for kind in KINDS:
                phases[kind][phase] = max(phases[kind].get(phase, 0), current[kind])
        if block is not None:
            kind = block.kind
            current[kind] += action * block.counted_bytes
            if kind == "gpu":
                parts[category_of(block)] += action * block.counted_bytes
            if current[kind] > phases[kind][phase]:
                phases[kind][phase] = current[kind]
            if kind == "gpu" and current[kind] > peak:
                peak, peak_index, peak_phase = current[kind], index, phase
        if index % stride == 0 or (index == peak_index and block is not None and block.counted_bytes > peak >> 6):
            samples.append(Sample(
                operation=operation, phase=phase, gpu_bytes=current["gpu"], host_bytes=current["host"],
                pinned_bytes=current["pinned"], categories={name: size for name, size in parts.items() if size},
            ))  # fmt: skip
    return Peaks(phases, peak, peak_index, peak_phase, tuple(samples))


def alive_at(tracker: Tracker, index: int) -> list[Block]:
    """GPU blocks that were allocated at or before the event and not yet freed."""
    alive: dict[int, Block] = {}
    for action, block, _ in tracker.events[: index + 1]:
        if block is None or block.kind != "gpu":
            continue
        if action == ALLOCATE:
            alive[id(block)] = block
        else:
            alive.pop(id(block), None)
    return list(alive.values())


def category_of(block: Block) -> Category:
    """What a block was for: what the run said, else what its call site says."""
    return block.category or category_of_site(block.phase, block.site)


@cache
def category_of_site(phase: str, site: str) -> Category:
    if phase in ("load", "init") and site.startswith(("transformers/", "peft/")):
        return "parameters"
    for part, category in SITE_CATEGORIES:
        if part in site:
            return category
    return "activations" if phase in ("forward", "backward") else "temporary"


SITE_CATEGORIES: tuple[tuple[str, Category], ...] = (
    ("_allgather", "gathered"),
    ("_all_gather", "gathered"),
    ("all_gather", "gathered"),
    ("alloc_param", "gathered"),
    ("partitioned_param_coordinator.py", "gathered"),
    ("create_fp32_partitions", "master"),
    ("_create_fp32_partitions", "master"),
    ("initialize_optimizer_states", "optimizer"),
    ("_init_group", "optimizer"),
    ("setup_buckets", "buckets"),
    ("ipg_buffer", "buckets"),
    ("contiguous_memory_allocator", "buckets"),
    ("_setup_for_real_optimizer", "buckets"),
    ("create_reduce_and_remove_grad_hooks", "buckets"),
    ("allreduce", "buckets"),
    ("reduce", "buckets"),
    ("torch/optim", "temporary"),
    ("runtime/zero/", "temporary"),
    ("runtime/", "temporary"),
)
"""Part of a call site -> category; the first that matches."""


def categories(blocks: list[Block]) -> dict[Category, int]:
    totals: dict[Category, int] = defaultdict(int)
    for block in blocks:
        totals[category_of(block)] += block.counted_bytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def top_allocations(blocks: list[Block]) -> tuple[Allocation, ...]:
    """The largest call sites among the blocks."""
    groups: dict[tuple[Category, str], list[int]] = defaultdict(list)
    for block in blocks:
        groups[(category_of(block), block.site or "small")].append(block.counted_bytes)
    largest = sorted(groups.items(), key=lambda item: -sum(item[1]))[:NUM_TOP_ALLOCATIONS]
    return tuple(
        Allocation(bytes=sum(sizes), count=len(sizes), category=category, site=site)
        for (category, site), sizes in largest
    )


def replay(tracker: Tracker, allocator: CachingAllocator) -> tuple[Mapping[str, int], str]:
    """Peak reserved bytes per phase, and PyTorch's out-of-memory message if the card was full."""
    phases: dict[str, int] = {}
    pieces: dict[int, CacheBlock] = {}
    for _, phase, (action, block, _operation) in phased_events(tracker):
        if action == EMPTY_CACHE:
            allocator.empty_cache()
        elif block is None or block.kind != "gpu":
            continue
        elif action == ALLOCATE:
            try:
                pieces[id(block)] = allocator.allocate(block.requested_bytes, stream=block.stream)
            except CardFullError as error:
                return phases, f"{error} (simulated, in {phase} at {block.site or 'a small allocation'})"
        else:
            allocator.free(pieces.pop(id(block)))
        if allocator.reserved_bytes > phases.get(phase, -1):
            phases[phase] = allocator.reserved_bytes
    return phases, ""


def copied_bytes(tracker: Tracker, source: str, target: str) -> int:
    return tracker.copied.get((source, target), 0)
