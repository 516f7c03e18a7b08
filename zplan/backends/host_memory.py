"""How much host memory a trial may still take: MemAvailable and the cgroup, whichever is less."""

from __future__ import annotations

from pathlib import Path

import psutil

_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")
_UNLIMITED = 1 << 60
"""cgroup v1 writes a number near 2**63 for "no limit"."""


def available_host_bytes(*, v2: Path = _V2, v1: Path = _V1) -> int:
    """Bytes that can be allocated before the kernel reclaims or kills.

    min(MemAvailable, cgroup limit - cgroup usage + its inactive file cache)

    Source: Linux Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat inactive_file).
    """
    available = int(psutil.virtual_memory().available)
    room = _cgroup_room_bytes(v2=v2, v1=v1)
    return available if room is None else min(available, room)


def _cgroup_room_bytes(*, v2: Path, v1: Path) -> int | None:
    for root, limit, usage, cache in (
        (v2, "memory.max", "memory.current", "inactive_file"),
        (v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit_bytes, usage_bytes = _number(root / limit), _number(root / usage)
        if limit_bytes is not None and usage_bytes is not None and limit_bytes < _UNLIMITED:
            return max(0, limit_bytes - usage_bytes + _entry(root / "memory.stat", cache))
    return None


def count_oom_kills(*, v2: Path = _V2, v1: Path = _V1) -> int:
    """Processes of our cgroup that the kernel has killed for memory so far; 0 where the kernel does not say."""
    return _entry(v2 / "memory.events", "oom_kill") + _entry(v1 / "memory.oom_control", "oom_kill")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _entry(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)
