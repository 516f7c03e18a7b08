"""What a node allows: RAM, cgroup, locked pages and shared memory, each with what is short and how to mend it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.memory.test_estimate import SHAPE
from tests.shapes import described_cluster
from zplan.hardware import Cluster
from zplan.memory.estimate import estimate_memory
from zplan.memory.host_limits import GLOO_SEGMENT, NCCL_CHANNELS, NCCL_SEGMENT, shm_bytes
from zplan.memory.terms import HostLimit, MemoryEstimate
from zplan.recipe import Recipe
from zplan.units import GIB, MIB
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, ZeroConfig


def node(kind: Any = "cuda", gpus: int = 2, **host: Any) -> Cluster:
    cluster = described_cluster(kind=kind, gpus_per_node=gpus, nvme=True)
    return replace(cluster, host=replace(cluster.host, **host))


def estimate(cluster: Cluster, device: Any = "none") -> MemoryEstimate:
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, world_size=cluster.gpus_per_node
    )
    zero = ZeroConfig(stage=3, offload_optimizer=OffloadOptimizer(device=device, nvme_path="/nvme"))
    recipe = Recipe(model="m", train_batch_size=batch.train_batch_size, max_length=128)
    return estimate_memory(SHAPE, recipe, Choice(zero=zero, batch=batch), cluster)


def limit(found: MemoryEstimate, name: str) -> HostLimit:
    (one,) = [limit for limit in found.host.limits if limit.name == name]
    return one


def test_nvme_buffers_are_locked_pages_and_count_against_memlock_by_process() -> None:
    enough = estimate(node(memlock_bytes=GIB), "nvme")
    needed = limit(enough, "memlock").needed_bytes
    rank = sum(-(-parameter.numel // 2) for _, parameter in SHAPE.parameters() if parameter.kind != "norm")
    assert needed == 4 * 4 * rank  # buffer_count x fp32 x the larger sub-group of one rank
    assert enough.host.verdict == "fits"
    short = estimate(node(memlock_bytes=needed - 1), "nvme")
    assert (short.host.verdict, short.host.short_bytes) == ("does_not_fit", 1)
    assert any(note.startswith("memlock allows") and note.endswith("ulimit -l unlimited") for note in short.notes)


def test_what_the_driver_pins_does_not_count_against_memlock() -> None:
    found = estimate(node(memlock_bytes=64 * 1024), "cpu")
    assert found.host.pinned_bytes > 64 * 1024
    assert found.host.verdict == "fits"


def test_a_cgroup_below_the_need_does_not_fit_and_says_so() -> None:
    needed = estimate(node()).host.resident_bytes
    found = estimate(node(cgroup_limit_bytes=needed - 7))
    assert (found.host.verdict, found.host.short_bytes) == ("does_not_fit", 7)
    assert any(note.startswith("cgroup allows") for note in found.notes)


def test_cpu_ranks_reduce_through_shared_memory_of_a_known_size() -> None:
    assert shm_bytes(4, on_cpu=True) == 4 * (2 * MIB + 64 * MIB + 8) == 4 * GLOO_SEGMENT
    found = estimate(node(kind="cpu", shm_bytes=64 * MIB))
    assert found.host.verdict == "does_not_fit"
    assert found.host.short_bytes == 2 * GLOO_SEGMENT - 64 * MIB


def test_nccl_may_need_shared_memory_so_too_little_is_tight() -> None:
    assert shm_bytes(1, on_cpu=False) == 0
    assert shm_bytes(8, on_cpu=False) == 8 * NCCL_CHANNELS * NCCL_SEGMENT
    found = estimate(node(gpus=8, shm_bytes=64 * MIB))  # Docker's default
    assert (found.host.verdict, found.host.short_bytes) == ("tight", 0)
    assert any("docker run --shm-size" in note for note in found.notes)
    assert estimate(node(gpus=8, shm_bytes=GIB)).host.verdict == "fits"


def test_a_drive_that_is_too_small_says_how_much_is_short() -> None:
    found = estimate(node(nvme_free_bytes=1000), "nvme").nvme
    assert (found.verdict, found.short_bytes) == ("does_not_fit", found.bytes - 1000)
