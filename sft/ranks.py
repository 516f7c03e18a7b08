"""What makes a process a rank: its place in the world, its environment, its end when the parent ends."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from zplan import processes
from zplan.errors import MachineError
from zplan.hardware import DeviceKind

CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""DeepSpeed's CPU accelerator; one thread until a rank knows how many share the cores (`num_threads`), since spinning
threads of several ranks starve each other. With no more threads than cores, libgomp's own way to wait, a short spin, is
the faster one: threads that always sleep (OMP_WAIT_POLICY=PASSIVE) must be woken for every operator. Where the kernel
gives huge pages to those who ask (`madvise`, the default), torch asks for tensors of 2 MiB and more: touching a buffer
for the first time, which a step does with every gradient, takes half the time, and giving it back next to none.

Source: torch 2.13, c10/core/impl/alloc_cpu.cpp (THP_MEM_ALLOC_ENABLE, read at the first allocation)."""

COMMON_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""NVML instead of a CUDA call answers `is_available`, so that a parent can count GPUs and still fork."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One process's place among the others, in torch's words."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def environment(kind: DeviceKind) -> dict[str, str]:
    """The variables that must be set before torch and deepspeed are imported."""
    return {**COMMON_ENVIRONMENT, **(CPU_ENVIRONMENT if kind == "cpu" else {})}


def set_environment(kind: DeviceKind, target: MutableMapping[str, str] = os.environ) -> None:
    """Set what the user has not set; forget what accelerate launch decided, because the plan decides.

    `ACCELERATE_USE_CPU`, which `accelerate launch --cpu` sets, would make accelerate wrap the model in DDP and ignore
    the plan's DeepSpeed configuration without a word; FSDP or a mixed precision from its config file likewise.

    Source: accelerate 1.15, state.py:915 (AcceleratorState); utils/launch.py (ACCELERATE_*, FSDP_*).
    """
    for name in [name for name in target if name.startswith("ACCELERATE_")]:
        del target[name]
    for name, value in environment(kind).items():
        target.setdefault(name, value)
    if kind == "cpu":
        target["DS_ACCELERATOR"] = "cpu"


def rank_variables(*, rank: int, world_size: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    """torch.distributed's env:// variables of one rank of one node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def launched_by(variables: Mapping[str, str] = os.environ) -> str | None:
    """Which launcher started this process as a rank; None if nobody did."""
    if "RANK" in variables and "WORLD_SIZE" in variables:
        if "TORCHELASTIC_RUN_ID" in variables:
            return "torchrun"
        return "accelerate" if "ACCELERATE_MIXED_PRECISION" in variables else "deepspeed"
    if int(variables.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in variables:
        return "srun"
    return None


def adopt_slurm(target: MutableMapping[str, str] = os.environ) -> None:
    """srun's variables under torch's names.

    Raises:
        MachineError: MASTER_ADDR is not set, and the first node cannot be read from SLURM's list.
    """
    target["RANK"] = target["SLURM_PROCID"]
    target["LOCAL_RANK"] = target["SLURM_LOCALID"]
    target["WORLD_SIZE"] = target["SLURM_NTASKS"]
    target.setdefault("LOCAL_WORLD_SIZE", target.get("SLURM_NTASKS_PER_NODE", "1").partition("(")[0])
    target.setdefault("MASTER_PORT", str(20_000 + int(target.get("SLURM_JOB_ID", "0")) % 20_000))
    if "MASTER_ADDR" not in target:
        nodes = target.get("SLURM_NODELIST", "")
        if not nodes or "[" in nodes:
            raise MachineError(
                f"MASTER_ADDR is not set and SLURM_NODELIST is {nodes!r}",
                because="torch.distributed meets at one address, and a compressed node list does not name it",
                fix="export MASTER_ADDR=$(scontrol show hostnames $SLURM_NODELIST | head -n1)",
            )
        target["MASTER_ADDR"] = nodes.partition(",")[0]


def current_rank(variables: Mapping[str, str] = os.environ) -> Rank:
    """This process's place, from torch's env:// variables; alone without them."""
    rank = int(variables.get("RANK", "0"))
    world_size = int(variables.get("WORLD_SIZE", "1"))
    return Rank(
        rank=rank,
        local_rank=int(variables.get("LOCAL_RANK", str(rank))),
        world_size=world_size,
        local_world_size=int(variables.get("LOCAL_WORLD_SIZE", str(world_size))),
    )


def num_threads(place: Rank) -> int:
    """Threads that a CPU rank computes with: the cores of this node that this process may use, shared by its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // place.local_world_size)


def ensure_rank(target: MutableMapping[str, str] = os.environ) -> None:
    """Make a process that nobody launched a world of its own."""
    if "RANK" not in target:
        target.update(rank_variables(rank=0, world_size=1, port=processes.free_port()))


def die_with_parent(death_signal: signal.Signals = signal.SIGKILL) -> None:
    """As `zplan.processes`, and tracebacks are dumped on a crash."""
    faulthandler.enable()
    processes.die_with_parent(death_signal)
