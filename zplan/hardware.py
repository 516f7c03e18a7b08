"""Cluster: the GPUs, hosts, limits and links a run gets. `probe_hardware` fills it from this machine."""

from __future__ import annotations

from typing import Literal

from zplan.values import dataclass

DeviceKind = Literal["cuda", "cpu"]
DESCRIBED_RAM_PER_GPU = 128 << 30
"""Host RAM of a described node when none is given: what data-centre nodes are sold with, per GPU."""
DESCRIBED_NVME = "/local_nvme"
"""Mount point that a described drive is given; DeepSpeed's documentation uses the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator of the cluster (all are alike). `kind="cpu"`: a CPU rank, its memory a share of the host's."""

    name: str
    kind: DeviceKind = "cuda"
    total_bytes: int
    free_bytes: int
    """What NVML calls free now; nameplate minus the driver's reserve for a described card."""
    dense_flops: float | None = None
    """bf16 matrix FLOP/s without sparsity, as published; None is unknown."""
    memory_bytes_per_second: float | None = None
    compute_capability: str | None = None
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One node's memory and limits, in bytes. None is unknown (or without a limit, for the limits)."""

    total_bytes: int
    available_bytes: int
    """min(MemAvailable, what the cgroup still allows)."""
    cgroup_limit_bytes: int | None = None
    memlock_bytes: int | None = None
    """`ulimit -l`; None is unlimited."""
    shm_bytes: int | None = None
    num_cpus: int = 1
    nvme_path: str | None = None
    nvme_free_bytes: int | None = None
    nvme_bytes_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`nodes` equal hosts with `gpus_per_node` equal GPUs each."""

    gpu: Gpu
    host: Host
    gpus_per_node: int = 1
    nodes: int = 1
    intra_node_bytes_per_second: float | None = None
    """NVLink or PCIe between two GPUs of a node, one direction."""
    inter_node_bytes_per_second: float | None = None
    """Of each GPU's own port, one direction."""
    host_link_bytes_per_second: float | None = None
    """PCIe between one GPU and its host, one direction, pinned memory."""
    described: bool = False
    """True when the user described it; False when it was probed."""

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.nodes
