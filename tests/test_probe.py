"""The probe, with recorded NVML answers, cgroup files and environment variables in place of a machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from zplan import probe
from zplan.catalog import load_gpu, load_links
from zplan.errors import ConfigError
from zplan.probe import (
    CPU_RANKS_VARIABLE,
    DriverNvml,
    NvmlGpu,
    describe_cluster,
    find_nvme,
    probe_hardware,
    probe_host,
    read_cgroup,
    read_memory,
    visible_devices,
)
from zplan.units import GIB

_H100_TOTAL = 85_520_809_984
"""nvmlDeviceGetMemoryInfo().total of an H100 80GB HBM3."""


def h100(free_bytes: int = 84 * GIB) -> NvmlGpu:
    return NvmlGpu(
        name="NVIDIA H100 80GB HBM3", total_bytes=_H100_TOTAL, free_bytes=free_bytes, compute_capability="9.0"
    )


class RecordedNvml:
    def __init__(self, *devices: NvmlGpu) -> None:
        self._devices = devices

    def devices(self) -> Sequence[NvmlGpu]:
        return self._devices


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", CPU_RANKS_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_gpus_are_as_alike_as_the_one_with_least_free_memory(tmp_path: Path) -> None:
    cluster = probe_hardware(nvml=RecordedNvml(h100(), h100(free_bytes=20 * GIB)), cgroup_root=tmp_path)
    assert (cluster.gpus_per_node, cluster.nodes, cluster.described) == (2, 1, False)
    assert cluster.gpu.free_bytes == 20 * GIB
    assert cluster.gpu.total_bytes == _H100_TOTAL


def test_a_gpu_that_the_catalogue_knows_gets_its_published_speeds(tmp_path: Path) -> None:
    cluster = probe_hardware(nvml=RecordedNvml(h100()), cgroup_root=tmp_path)
    assert cluster.gpu.dense_flops == load_gpu("h100-80gb").dense_flops
    assert cluster.host_link_bytes_per_second == load_links("h100-80gb").host_link_bytes_per_second
    assert cluster.gpu.source.startswith("NVML; speeds: ")


def test_the_speed_of_an_unknown_gpu_is_unknown_not_zero(tmp_path: Path) -> None:
    unheard = NvmlGpu(name="Unheard Of 9000", total_bytes=8 * GIB, free_bytes=7 * GIB, compute_capability="7.5")
    cluster = probe_hardware(nvml=RecordedNvml(unheard), cgroup_root=tmp_path)
    assert cluster.gpu.dense_flops is None
    assert cluster.intra_node_bytes_per_second is None


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1, 2]), ("", []), ("-1", []), ("2", [2]), ("2,0", [2, 0]), ("0,7,1", [0])],
)
def test_cuda_visible_devices_chooses_as_cuda_does(visible: str | None, indices: list[int]) -> None:
    devices = [h100(free_bytes=index * GIB) for index in range(3)]
    assert visible_devices(devices, visible) == [devices[index] for index in indices]


def test_cuda_visible_devices_by_uuid_counts_them() -> None:
    assert len(visible_devices([h100()] * 4, "GPU-1a2b,GPU-3c4d")) == 2


def test_cuda_visible_devices_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES is 'first'"):
        visible_devices([h100()], "first")


def test_without_gpus_the_ranks_share_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_RANKS_VARIABLE, "4")
    cluster = probe_hardware(nvml=RecordedNvml(), cgroup_root=tmp_path)
    assert (cluster.gpu.kind, cluster.gpus_per_node) == ("cpu", 4)
    assert cluster.gpu.free_bytes == cluster.host.available_bytes // 4


@pytest.mark.parametrize("text", ["0", "two", "-1", ""])
def test_a_number_of_ranks_that_means_nothing_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_RANKS_VARIABLE, text)
    with pytest.raises(ConfigError, match=CPU_RANKS_VARIABLE):
        probe_hardware(nvml=RecordedNvml(), cgroup_root=tmp_path)


def test_ram_is_what_psutil_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\nHugePages_Total:       0\n")
    assert read_memory(meminfo) == (16 << 20, 8 << 20)
    assert read_memory()[0] == psutil.virtual_memory().total
    meminfo.write_text("MemTotal: 1 kB\nMemAvailable: 2 kB\n")  # LXC shows the host's
    assert read_memory(meminfo)[0] == read_memory(tmp_path / "no such file")[0] == psutil.virtual_memory().total


def test_a_drive_is_that_of_the_inmost_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"overlay / overlay rw 0 0\n/dev/nvme0n1p1 {tmp_path.parent} ext4 rw 0 0\n"
        f"/dev/sda1 {tmp_path}/slow\\040one ext4 rw 0 0\n/dev/nvme9n1 /elsewhere ext4 rw 0 0\n"
    )
    (tmp_path / "slow one").mkdir()
    found = find_nvme(tmp_path, mounts)
    assert found["nvme_path"] == str(tmp_path)
    assert found["nvme_free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)
    assert find_nvme(tmp_path / "slow one", mounts) == {}
    assert find_nvme(Path("/etc"), mounts) == {}
    with mounts.open("a") as stream:
        stream.write(f"tmpfs {tmp_path.parent} tmpfs rw 0 0\n")
    assert find_nvme(tmp_path, mounts) == {}


def test_cgroup_v2_and_v1_limits_are_read(tmp_path: Path) -> None:
    v2, v1 = tmp_path / "v2", tmp_path / "v1"
    (v1 / "memory").mkdir(parents=True)
    v2.mkdir()
    (v2 / "memory.max").write_text(f"{8 * GIB}\n")
    (v2 / "memory.current").write_text(f"{3 * GIB}\n")
    (v1 / "memory" / "memory.limit_in_bytes").write_text(f"{6 * GIB}\n")
    (v1 / "memory" / "memory.usage_in_bytes").write_text(f"{1 * GIB}\n")
    assert read_cgroup(v2) == (8 * GIB, 3 * GIB)
    assert read_cgroup(v1) == (6 * GIB, 1 * GIB)


@pytest.mark.parametrize("text", ["max", str(2**63 - 4096)])
def test_a_cgroup_without_limit_limits_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(text)
    (tmp_path / "memory.current").write_text("4096")
    assert read_cgroup(tmp_path) == (None, 0)


def test_the_limit_of_a_slurm_job_is_found_below_the_root(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("5:memory,cpu:/slurm/job_7/step_0\n0::/slice/job\n")
    step = tmp_path / "v1" / "memory" / "slurm" / "job_7" / "step_0"
    step.mkdir(parents=True)
    for folder, limit in ((step, 2**63 - 4096), (step.parent, 6 * GIB), (step.parent.parent, 9 * GIB)):
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        (folder / "memory.usage_in_bytes").write_text(str(GIB))
    assert read_cgroup(tmp_path / "v1", membership) == (6 * GIB, GIB)
    slice_ = tmp_path / "v2" / "slice"
    slice_.mkdir(parents=True)
    (slice_ / "memory.max").write_text(str(4 * GIB))
    (slice_ / "memory.current").write_text("0")
    assert read_cgroup(tmp_path / "v2", membership) == (4 * GIB, 0)
    assert read_cgroup(tmp_path / "v2", tmp_path / "no such file") == (None, 0)


@pytest.mark.parametrize(("capabilities", "limit"), [("000001ffffffffff", None), ("00000000a80425fb", 8 << 20)])
def test_a_process_that_may_lock_pages_has_no_memlock(
    capabilities: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tpython\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr(probe.resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    assert probe.memlock_bytes(status) == limit


def test_a_cgroup_smaller_than_the_machine_is_the_host(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(str(GIB))
    (tmp_path / "memory.current").write_text(str(GIB // 4))
    host = probe_host(tmp_path)
    assert host.total_bytes == GIB
    assert host.available_bytes <= GIB - GIB // 4


def test_the_driver_is_asked_through_nvml_and_left_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    recorded = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=_H100_TOTAL, free=84 * GIB),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetName=lambda handle: b"NVIDIA H100 80GB HBM3",  # bytes before nvidia-ml-py 12
    )
    monkeypatch.setitem(sys.modules, "pynvml", recorded)
    monkeypatch.setattr(probe, "has_driver", lambda: False)
    assert DriverNvml().devices() == ()
    monkeypatch.setattr(probe, "has_driver", lambda: True)
    assert DriverNvml().devices() == [h100()]
    assert calls == ["init", "shutdown"]


def test_a_described_cluster_has_the_catalogues_links_and_ram_by_gpu() -> None:
    cluster = describe_cluster(load_gpu("h100-80gb"), gpus_per_node=8, nodes=2, nvme_bytes=4 << 40)
    assert (cluster.world_size, cluster.described) == (16, True)
    assert cluster.host.total_bytes == 8 * 128 * GIB
    assert cluster.host.nvme_free_bytes == 4 << 40
    assert cluster.intra_node_bytes_per_second == load_links("h100-80gb").intra_node_bytes_per_second
    assert cluster.inter_node_bytes_per_second is not None
