"""What a node allows, against what a run needs there: available memory, cgroup, locked pages, shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zplan.hardware import Cluster
from zplan.memory.terms import HostLimit, Verdict
from zplan.units import MIB, format_bytes

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
    cluster: Cluster, *, ranks: int, resident_bytes: int, locked_bytes_of_a_rank: int
) -> tuple[HostLimit, ...]:
    """Every limit of the node that is known.

    Args:
        ranks: ranks that run on the node.
        locked_bytes_of_a_rank: what one process locks with mlock; `ulimit -l` counts it by process. Memory pinned by
            the CUDA driver does not count there.

    Source: deepspeed 0.19.8, csrc/pin_memory/page_alloc.cpp:24 (mlock), swap_tensor/utils.py:192.
    """
    host, on_cpu = cluster.host, cluster.gpu.kind == "cpu"
    found = [
        HostLimit(
            name="available memory", needed_bytes=resident_bytes, limit_bytes=host.available_bytes,
            fix="fewer --gpus-per-node, less offload, or more RAM",
        )
    ]  # fmt: skip
    if host.cgroup_limit_bytes is not None:
        found.append(
            HostLimit(
                name="cgroup", needed_bytes=resident_bytes, limit_bytes=host.cgroup_limit_bytes,
                fix="a larger --memory of docker or --mem of srun",
            )
        )  # fmt: skip
    if host.memlock_bytes is not None and locked_bytes_of_a_rank:
        found.append(
            HostLimit(
                name="memlock", needed_bytes=locked_bytes_of_a_rank, limit_bytes=host.memlock_bytes,
                fix="ulimit -l unlimited",
            )
        )  # fmt: skip
    if host.shm_bytes is not None and (needed := shm_bytes(ranks, on_cpu=on_cpu)):
        found.append(
            HostLimit(
                name="/dev/shm", needed_bytes=needed, limit_bytes=host.shm_bytes, is_certain=on_cpu,
                fix="docker run --shm-size=1g",
            )
        )  # fmt: skip
    return tuple(found)


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
