"""What is broken on this machine, and how to mend it. Imports no torch: it has to answer when torch does not import."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from zplan.hardware import Cluster
from zplan.units import GIB, MIB, format_bytes
from zplan.values import dataclass
from zplan.versions import installed_version

Severity = Literal["ok", "warning", "broken"]
TESTED_VERSIONS = {
    "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2",
    "datasets": "5.2.0", "accelerate": "1.15.0", "optuna": "5.0.0",
}  # fmt: skip
"""The set that the tests and the reports were made with."""
_LEAST_SHM_BYTES = 1 * GIB
"""NCCL exchanges through /dev/shm between the GPUs of a node; Docker's default of 64 MiB is too small for it."""
_LEAST_DISK_BYTES = 10 * GIB
_STALE_LOCK = "lock"
"""File that torch's extension builder holds while it compiles; one left behind makes every later build wait for ever
(torch/utils/cpp_extension.py, FileBaton)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check: what was found, because of what it matters, what to type."""

    severity: Severity
    what: str
    because: str = ""
    fix: str = ""


def diagnose(cluster: Cluster) -> tuple[Finding, ...]:
    """Every check, in the order in which a run would meet the problem."""
    return (
        *_packages(),
        *_cuda(cluster),
        *_compiler(cluster),
        *_environment(),
        *_stale_locks(),
        *_limits(cluster),
        *_nvme(),
        *_disk(),
    )


def installed_versions() -> dict[str, str | None]:
    """Installed version of each tested package; None where it is missing."""
    return {name: installed_version(name) for name in TESTED_VERSIONS}


def _packages() -> Iterator[Finding]:
    yield Finding(severity="ok", what=f"Python {sys.version.split()[0]}")
    for name, found in installed_versions().items():
        tested = TESTED_VERSIONS[name]
        if found is None:
            yield Finding(
                severity="broken", what=f"{name} is not installed", because="a run needs it",
                fix=f"pip install {name}=={tested}",
            )  # fmt: skip
        elif found.partition("+")[0] != tested:
            yield Finding(
                severity="warning", what=f"{name} {found}; tested with {tested}",
                because="the formulas mirror the tested version; the simulation follows the installed one",
                fix=f"pip install {name}=={tested}",
            )  # fmt: skip
        else:
            yield Finding(severity="ok", what=f"{name} {found}")


def _cuda(cluster: Cluster) -> Iterator[Finding]:
    """torch's CUDA against the GPUs and the compiler. DeepSpeed refuses to build its ops with another minor version.

    Source: deepspeed 0.19.8, ops/op_builder/builder.py:107 (assert_no_cuda_mismatch).
    """
    if cluster.gpu.kind != "cuda" or installed_version("torch") is None:
        return
    torch_cuda = torch_cuda_version()
    if torch_cuda is None:
        yield Finding(
            severity="broken", what="torch is a CPU build, and this machine has GPUs",
            because="a run would use the CPUs", fix=f"pip install --force-reinstall torch=={TESTED_VERSIONS['torch']}",
        )  # fmt: skip
        return
    yield Finding(severity="ok", what=f"torch is built for CUDA {torch_cuda}")
    compiler = nvcc_version()
    if compiler is not None and compiler != ".".join(torch_cuda.split(".")[:2]):
        yield Finding(
            severity="warning", what=f"nvcc is CUDA {compiler}, torch is built for {torch_cuda}",
            because="DeepSpeed compiles CPU Adam and its fused optimizers only with torch's version",
            fix=f"install the CUDA toolkit {torch_cuda}, or export DS_SKIP_CUDA_CHECK=1 at your own risk",
        )  # fmt: skip


def torch_cuda_version() -> str | None:
    """The CUDA that torch was built for, read from its version.py: torch need not import. None is a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda[^=]*= *'([^']+)'", text, re.MULTILINE)
    return found.group(1) if found else None


def nvcc_version() -> str | None:
    """Major and minor version of the CUDA compiler on PATH or in CUDA_HOME; None without one."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False, timeout=10)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found.group(1) if found else None


def _compiler(cluster: Cluster) -> Iterator[Finding]:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        yield Finding(
            severity="warning", what="no C++ compiler",
            because="DeepSpeed compiles CPU Adam on first use: optimizer offload on a GPU machine fails without it",
            fix="apt-get install g++",
        )  # fmt: skip
    else:
        yield Finding(severity="ok", what=f"C++ compiler {compiler}")
    if installed_version("ninja") is None and shutil.which("ninja") is None:
        yield Finding(
            severity="warning", what="ninja is not installed", because="torch builds extensions with it",
            fix="pip install ninja",
        )  # fmt: skip
    if cluster.gpu.kind == "cuda" and shutil.which("nvcc") is None:
        yield Finding(
            severity="warning", what="nvcc is not on PATH",
            because="DeepSpeed's fused optimizers and CPU Adam on a CUDA machine are compiled with it",
            fix="install the CUDA toolkit of torch's CUDA version, or train without optimizer offload",
        )  # fmt: skip


def _environment() -> Iterator[Finding]:
    """Source: torch 2.13.0, utils/cpp_extension.py (_prepare_ldflags: `-L{TORCH_LIB_PATH}`, without quotes)."""
    if any(character.isspace() for character in sys.prefix):
        yield Finding(
            severity="warning", what=f"the environment's path has a space: {sys.prefix}",
            because="torch hands it to the linker without quotes: CPU Adam and DeepSpeed's other ops cannot be built",
            fix="make the environment in a folder without a space in its path",
        )  # fmt: skip


def _stale_locks() -> Iterator[Finding]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in sorted(root.glob(f"**/{_STALE_LOCK}")):
        yield Finding(
            severity="warning", what=f"{lock} is left behind by a build, unless one is running now",
            because="every later build of this op waits for it without a word", fix=f"rm {lock}",
        )  # fmt: skip


def _limits(cluster: Cluster) -> Iterator[Finding]:
    host = cluster.host
    if host.memlock_bytes is not None and host.memlock_bytes < 64 * MIB and cluster.gpu.kind == "cuda":
        yield Finding(
            severity="warning", what=f"memlock is {format_bytes(host.memlock_bytes)}",
            because="native pinned buffers and asynchronous I/O lock pages; DeepSpeed pins offload buffers by default",
            fix="ulimit -l unlimited, or --set offload_optimizer.pin_memory=false",
        )  # fmt: skip
    if host.shm_bytes is not None and host.shm_bytes < _LEAST_SHM_BYTES and cluster.gpus_per_node > 1:
        yield Finding(
            severity="warning", what=f"/dev/shm has {format_bytes(host.shm_bytes)}",
            because="NCCL and data loader workers share memory through it", fix="docker run --shm-size=8g ...",
        )  # fmt: skip
    if cluster.gpu.kind == "cpu":
        yield Finding(
            severity="ok", what="no NVIDIA GPU: runs here use CPU ranks; describe GPUs with --gpu to plan for them"
        )
    if host.cgroup_limit_bytes is not None:
        yield Finding(severity="ok", what=f"cgroup limit {format_bytes(host.cgroup_limit_bytes)} counts as host RAM")


def _nvme() -> Iterator[Finding]:
    folders = ("/usr/include", "/usr/local/include")
    if not any(Path(folder, "libaio.h").exists() for folder in folders):
        yield Finding(severity="ok", what="libaio headers are not installed; only NVMe offload needs them (libaio-dev)")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    if free < _LEAST_DISK_BYTES:
        yield Finding(
            severity="warning", what=f"{format_bytes(free)} free in this folder",
            because="a checkpoint of full fine-tuning takes 14 to 16 bytes per parameter", fix="free some space",
        )  # fmt: skip


def inspect_data(cluster: Cluster, findings: Sequence[Finding]) -> Mapping[str, Any]:
    """`zplan inspect --json`: the cluster, the findings, the versions."""
    return {
        "schema": "zplan.inspect/1",
        "cluster": {**asdict(cluster), "world_size": cluster.world_size},
        "findings": [asdict(finding) for finding in findings],
        "versions": installed_versions(),
    }
