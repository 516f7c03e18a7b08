"""This machine, or a described one, as a Cluster. Reads NVML, /proc and cgroups; never creates a CUDA context."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from zplan.catalog import find_gpu, load_gpu, load_links
from zplan.errors import ConfigError
from zplan.hardware import DESCRIBED_NVME, DESCRIBED_RAM_PER_GPU, Cluster, Gpu, Host
from zplan.values import dataclass

CPU_RANKS_VARIABLE = "ZPLAN_CPU_RANKS"
_PORT_BYTES_PER_SECOND = 50e9
"""Between described nodes, of each GPU: 400 Gbit/s, as in NVIDIA's DGX H100 and later ones."""
_OLDER_PORT_BYTES_PER_SECOND = 25e9
"""200 Gbit/s, as in its DGX A100."""
_NO_LIMIT = 1 << 60
"""cgroup v1 writes a number near 2**63 for "no limit"."""
_CGROUP_FILES = (
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""(folder of the hierarchy, limit, usage) of cgroup v2, then v1, under /sys/fs/cgroup."""
_IPC_LOCK = 1 << 14
"""CAP_IPC_LOCK: a process that has it locks pages without limit (capabilities(7))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlGpu:
    """What NVML says of one device."""

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: str


class Nvml(Protocol):
    """The edge to the driver; recorded in tests."""

    def devices(self) -> Sequence[NvmlGpu]: ...


class DriverNvml:
    """NVML through nvidia-ml-py; no driver means no device."""

    def devices(self) -> Sequence[NvmlGpu]:
        if not has_driver():
            return ()
        import pynvml as nvml  # 10 ms

        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return ()
        try:
            return [_nvml_device(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        finally:
            nvml.nvmlShutdown()


def has_driver() -> bool:
    """Whether NVML's library loads; nvmlInit asks the same (pynvml.py, _LoadNvmlLibrary)."""
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _nvml_device(nvml: Any, index: int) -> NvmlGpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    name = nvml.nvmlDeviceGetName(handle)
    return NvmlGpu(
        name=name if isinstance(name, str) else name.decode(),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        compute_capability=f"{major}.{minor}",
    )


def probe_hardware(*, nvml: Nvml | None = None, cgroup_root: Path = Path("/sys/fs/cgroup")) -> Cluster:
    """This machine. With GPUs: all visible ones, as alike as their smallest. Without: CPU ranks that share the host.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES or ZPLAN_CPU_RANKS cannot be read.
    """
    host = probe_host(cgroup_root)
    devices = visible_devices((nvml or DriverNvml()).devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not devices:
        return cpu_cluster(host)
    return _gpu_cluster(devices, host)


def visible_devices(devices: Sequence[NvmlGpu], visible: str | None) -> list[NvmlGpu]:
    """The devices that CUDA_VISIBLE_DEVICES leaves, by index; a UUID leaves all (they are alike on one node)."""
    if visible is None:
        return list(devices)
    kept: list[NvmlGpu] = []
    for part in (text.strip() for text in visible.split(",") if text.strip()):
        if part.startswith(("GPU-", "MIG-")):
            return list(devices)[: len(visible.split(","))]
        if not part.lstrip("-").isdigit():
            raise ConfigError(f"CUDA_VISIBLE_DEVICES is {visible!r}", fix="export CUDA_VISIBLE_DEVICES=0,1")
        if not 0 <= int(part) < len(devices):
            break  # CUDA ignores everything from the first index that does not exist
        kept.append(devices[int(part)])
    return kept


def _gpu_cluster(devices: Sequence[NvmlGpu], host: Host) -> Cluster:
    smallest = min(devices, key=lambda device: device.free_bytes)
    known = find_gpu(smallest.name)
    listed, links = (load_gpu(known), load_links(known)) if known else (None, None)
    gpu = Gpu(
        name=smallest.name,
        total_bytes=smallest.total_bytes,
        free_bytes=smallest.free_bytes,
        dense_flops=listed.dense_flops if listed else None,
        memory_bytes_per_second=listed.memory_bytes_per_second if listed else None,
        compute_capability=smallest.compute_capability,
        source="NVML" + (f"; speeds: {listed.source}" if listed else ""),
    )
    return Cluster(
        gpu=gpu,
        host=host,
        gpus_per_node=len(devices),
        intra_node_bytes_per_second=links.intra_node_bytes_per_second if links else None,
        host_link_bytes_per_second=links.host_link_bytes_per_second if links else None,
    )


def cpu_cluster(host: Host) -> Cluster:
    """CPU ranks with gloo: two where there are two cores; each has an equal share of what the host has available."""
    text = os.environ.get(CPU_RANKS_VARIABLE, str(min(2, host.num_cpus)))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(
            f"{CPU_RANKS_VARIABLE} is {text!r}, not a number of ranks", fix=f"export {CPU_RANKS_VARIABLE}=2"
        )
    ranks = int(text)
    gpu = Gpu(
        name="CPU rank",
        kind="cpu",
        total_bytes=host.total_bytes // ranks,
        free_bytes=host.available_bytes // ranks,
        source="an equal share of this host's memory",
    )
    return Cluster(gpu=gpu, host=host, gpus_per_node=ranks)


def probe_host(cgroup_root: Path = Path("/sys/fs/cgroup")) -> Host:
    """RAM and limits of this node."""
    total, available = read_memory()
    limit, used = read_cgroup(cgroup_root)
    shm = Path("/dev/shm")
    return Host(
        total_bytes=total if limit is None else min(total, limit),
        available_bytes=available if limit is None else min(available, max(0, limit - used)),
        cgroup_limit_bytes=limit,
        memlock_bytes=memlock_bytes(),
        shm_bytes=_disk(shm)[0] if shm.exists() else None,
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        **find_nvme(Path.cwd()),  # type: ignore[arg-type]
    )


def read_memory(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """(total, available) bytes of RAM, the two numbers of /proc/meminfo that psutil gives as well."""
    try:
        lines = (line.split() for line in meminfo.read_text().splitlines())
        kib = {words[0]: int(words[1]) for words in lines if words[-1] == "kB"}
        total, available = kib["MemTotal:"] << 10, kib["MemAvailable:"] << 10
    except (OSError, ValueError, KeyError, IndexError):
        total, available = 0, 1
    if available <= total:
        return total, available
    import psutil  # 10 ms, and only where /proc is missing, or distorted by LXC

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def read_cgroup(root: Path, membership: Path = Path("/proc/self/cgroup")) -> tuple[int | None, int]:
    """(limit, usage) in bytes of this process's cgroup or the ancestor that leaves least; (None, 0) without a limit.

    A container sees its own cgroup as the root; a SLURM job or a systemd slice is a folder below it.
    """
    tightest: tuple[int | None, int] = (None, 0)
    for hierarchy, limit_name, usage_name in _CGROUP_FILES:
        for folder in _ancestors(root / hierarchy, _own_cgroup(membership, hierarchy)):
            try:
                text = (folder / limit_name).read_text().strip()
                limit, usage = (_NO_LIMIT if text == "max" else int(text)), int((folder / usage_name).read_text())
            except (OSError, ValueError):
                continue
            if limit < _NO_LIMIT and (tightest[0] is None or limit - usage < tightest[0] - tightest[1]):
                tightest = limit, usage
    return tightest


def _own_cgroup(membership: Path, hierarchy: str) -> str:
    """The path of this process below a hierarchy: `0::/path` in v2, `4:memory:/path` in v1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return ""
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if (not hierarchy and number == "0") or (hierarchy and hierarchy in controllers.split(",")):
            return path.strip("/")
    return ""


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:depth])


def memlock_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """`ulimit -l` in bytes; None is unlimited, also for a process that may lock pages without limit."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    try:
        line = next(line for line in status.read_text().splitlines() if line.startswith("CapEff:"))
        unlimited = bool(int(line.split()[1], 16) & _IPC_LOCK)
    except (OSError, StopIteration, ValueError, IndexError):
        unlimited = False
    return None if unlimited or limit == resource.RLIM_INFINITY else limit


def find_nvme(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> dict[str, str | int]:
    """The folder's disk, if it is an NVMe drive: ZeRO-Infinity needs direct I/O on one."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return {}
    inmost, device = -1, ""
    for line in lines:
        source, point = line.split(" ")[:2]
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)  # a blank is \\040 (proc(5))
        if folder.is_relative_to(point) and len(point) >= inmost:  # the last one mounted there covers the others
            inmost, device = len(point), source
    return {"nvme_path": str(folder), "nvme_free_bytes": _disk(folder)[1]} if "nvme" in device else {}


def _disk(folder: Path) -> tuple[int, int]:
    """(total, free for users) bytes of the file system of a folder; shutil, which has this too, takes 3 ms to load."""
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def describe_cluster(
    gpu: Gpu, *, gpus_per_node: int, nodes: int, host_ram_bytes: int | None = None, nvme_bytes: int | None = None
) -> Cluster:
    """A cluster that nobody has to own. Host RAM defaults to 128 GiB per GPU of a node."""
    ram = host_ram_bytes if host_ram_bytes is not None else DESCRIBED_RAM_PER_GPU * gpus_per_node
    known = find_gpu(gpu.name)
    links = load_links(known) if known else None
    host = Host(
        total_bytes=ram,
        available_bytes=ram,
        num_cpus=16 * gpus_per_node,
        nvme_path=DESCRIBED_NVME if nvme_bytes else None,
        nvme_free_bytes=nvme_bytes,
    )
    return Cluster(
        gpu=gpu,
        host=host,
        gpus_per_node=gpus_per_node,
        nodes=nodes,
        intra_node_bytes_per_second=links.intra_node_bytes_per_second if links else None,
        inter_node_bytes_per_second=_port_bytes_per_second(gpu) if nodes > 1 else None,
        host_link_bytes_per_second=links.host_link_bytes_per_second if links else None,
        described=True,
    )


def _port_bytes_per_second(gpu: Gpu) -> float:
    is_new = gpu.compute_capability is None or float(gpu.compute_capability) >= 9.0
    return _PORT_BYTES_PER_SECOND if is_new else _OLDER_PORT_BYTES_PER_SECOND
