"""What a node allows, against what a run needs there: available memory, cgroup, locked pages, shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zplan.hardware import Cluster
from zplan.memory.terms import HostLimit, LimitName, Verdict
from zplan.units import GIB, MIB, format_bytes

ROOM = 1.1
"""Below this much over the estimate the verdict is `tight`: other processes and the page cache want some, too."""
NCCL_SEGMENT = 9_637_888
"""Bytes of one shared-memory connection of NCCL 2, as its error message for a full /dev/shm names them."""
NCCL_CHANNELS = 2
"""Rings that NCCL builds over GPUs without NVLink; assumed. GPUs with peer access use no shared memory."""
GLOO_SEGMENT = 2 * MIB + 2 * 32 * MIB + 8
"""deepspeed 0.19.8, csrc/cpu/comm/shm.cpp:95 (allreduce_workspace): two small buffers, two of 32 MiB, two states."""


def shm_bytes(ranks: int, *, on_cpu: bool) -> int:
    """Shared memory of the collectives of a node's ranks.

        CPU ranks:  ranks * (2 MiB + 2 * 32 MiB + 8)
        GPUs:       ranks * rings * 9637888, where there is no peer access; an upper bound elsewhere

    Source: deepspeed 0.19.8, csrc/cpu/comm/shm.cpp:368 (shared_create).
    """
    if ranks < 2:
        return 0
    return ranks * (GLOO_SEGMENT if on_cpu else NCCL_CHANNELS * NCCL_SEGMENT)


def host_limits(
    cluster: Cluster, *, ranks: int, resident_bytes: int, locked_bytes_of_a_rank: int, shared_bytes: int = 0
) -> tuple[HostLimit, ...]:
    """Every limit of the node that is known.

    Args:
        ranks: ranks that run on the node.
        locked_bytes_of_a_rank: what one process locks with mlock; `ulimit -l` counts it by process. Memory pinned by
            the CUDA driver does not count there.
        shared_bytes: of tensors that lie in shared memory (super_offload.py).

    Source: deepspeed 0.19.8, csrc/pin_memory/page_alloc.cpp:24 (mlock), swap_tensor/utils.py:192.
    """
    host, on_cpu = cluster.host, cluster.gpu.kind == "cpu"
    shm = shared_bytes + shm_bytes(ranks, on_cpu=on_cpu)
    fix = f"docker run --shm-size={-(-shm // GIB)}g"
    known = on_cpu or (host.shm_bytes is not None and shared_bytes > host.shm_bytes)
    rows: tuple[tuple[LimitName, int, int | None, str], ...] = (
        ("available memory", resident_bytes, host.available_bytes, "less offload, fewer GPUs a node, or more RAM"),
        ("cgroup", resident_bytes, host.cgroup_limit_bytes, "a larger --memory of docker or --mem of srun"),
        ("memlock", locked_bytes_of_a_rank, host.memlock_bytes, "ulimit -l unlimited"),
        ("/dev/shm", shm, host.shm_bytes, fix),
    )
    return tuple(
        HostLimit(
            name=name, needed_bytes=needed, limit_bytes=limit, fix=fix, is_certain=name != "/dev/shm" or known
        )
        for name, needed, limit, fix in rows
        if limit is not None and needed
    )  # fmt: skip


def verdict_of(limits: Sequence[HostLimit]) -> tuple[Verdict, int]:
    """The verdict of a node, and the largest number of bytes that is short."""
    short = max((limit.short_bytes for limit in limits if limit.is_certain), default=0)
    if short:
        return "does_not_fit", short
    memory = limits[0]
    is_tight = memory.needed_bytes * ROOM > memory.limit_bytes or any(limit.short_bytes for limit in limits)
    return ("tight" if is_tight else "fits"), 0


def limit_notes(limits: Sequence[HostLimit]) -> Iterator[str]:
    """What is short besides plain memory, which the verdict's own line tells."""
    for limit in limits:
        if limit.short_bytes and limit.name != "available memory":
            sure = "" if limit.is_certain else ", without peer access between the GPUs"
            yield (
                f"{limit.name} allows {format_bytes(limit.limit_bytes)} and {format_bytes(limit.needed_bytes)} is"
                f" needed{sure}: {limit.fix}"
            )
