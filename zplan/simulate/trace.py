"""The run as a Chrome / Perfetto trace: bytes as counters (a GPU's by category), phases and collectives as slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zplan.simulate.analysis import category_of, phased_events
from zplan.simulate.collectives import CollectiveRecorder
from zplan.simulate.report import MemoryKind
from zplan.simulate.tracker import Tracker

LEAST_CHANGE_BYTES = 1 << 20
"""A counter is written when a kind of memory has changed by this much since it was last written."""


def write_trace(path: str, tracker: Tracker, recorder: CollectiveRecorder) -> None:
    """Write the trace. Its clock counts operations, one microsecond each: the simulation knows order, not duration."""
    events = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "rank 0 (time: number of operations)"}},
        *_phase_slices(tracker),
        *_memory_counters(tracker),
        *_collective_slices(recorder),
    ]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _phase_slices(tracker: Tracker) -> list[dict[str, Any]]:
    starts = [(tracker.events[index][2] if index < len(tracker.events) else tracker.num_operations, phase)
              for index, phase in tracker.marks]  # fmt: skip
    ends = [start for start, _ in starts[1:]] + [tracker.num_operations]
    return [
        {"name": phase, "cat": "phase", "ph": "X", "ts": start, "dur": end - start, "pid": 0, "tid": 0}
        for (start, phase), end in zip(starts, ends, strict=True)
        if end > start
    ]


def _memory_counters(tracker: Tracker) -> list[dict[str, Any]]:
    current: dict[MemoryKind, int] = {"gpu": 0, "host": 0, "pinned": 0}
    parts: dict[str, int] = {}
    written = dict(current)
    counters: list[dict[str, Any]] = []
    for _, _, (action, block, operation) in phased_events(tracker):
        if block is None:
            continue
        kind = block.kind
        current[kind] += action * block.counted_bytes
        if kind == "gpu":
            category = category_of(block)
            parts[category] = parts.get(category, 0) + action * block.counted_bytes
        if abs(current[kind] - written[kind]) >= LEAST_CHANGE_BYTES:
            written[kind] = current[kind]
            values = dict(parts) if kind == "gpu" else {"bytes": current[kind]}
            counters.append({"name": f"{kind} bytes", "ph": "C", "ts": operation, "pid": 0, "args": values})
    return counters


def _collective_slices(recorder: CollectiveRecorder) -> list[dict[str, Any]]:
    return [
        {"name": name, "cat": "collective", "ph": "X", "ts": ts, "dur": 1, "pid": 0, "tid": 1, "args": {"bytes": size}}
        for ts, name, size in recorder.log
    ]
