"""SimulationReport: what a dry run of the engine answers. Imports no torch, so that every command can read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from zplan.errors import ExitCode, ZplanError
from zplan.values import dataclass

MemoryKind = Literal["gpu", "host", "pinned"]
Cause = Literal["unsupported", "refused", "broken"]
Category = Literal["parameters", "gradients", "master", "optimizer", "activations", "buckets", "gathered", "temporary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One storage that was alive at the peak, or several of one call site."""

    bytes: int
    count: int
    category: Category
    site: str
    """File, line and function that asked for it, or the autograd node that did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTotal:
    """All calls of one collective on one rank."""

    name: str
    count: int
    bytes: int
    """Of the full (gathered or reduced) tensor, summed over the calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One point of the memory timeline."""

    operation: int
    """How many operations had been dispatched."""
    phase: str
    gpu_bytes: int
    host_bytes: int
    pinned_bytes: int
    categories: Mapping[Category, int]
    """What the GPU's bytes are for; adds up to `gpu_bytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """One rank's run of the installed engine on simulated devices."""

    gpu_allocated_bytes: int
    """Whole-run peak, as torch.cuda.max_memory_allocated counts (512-byte blocks)."""
    gpu_reserved_bytes: int
    """Whole-run peak of the replayed caching allocator, as torch.cuda.max_memory_reserved."""
    gpu_used_bytes: int
    """As nvidia-smi shows it: reserved, and the CUDA context and NCCL's buffers as the formula estimates them."""
    allocated_phases: Mapping[str, int]
    """Phase -> peak allocated bytes: load, init, forward, backward, step."""
    reserved_phases: Mapping[str, int]
    host_phases: Mapping[str, int]
    """Phase -> peak pageable host bytes of this rank's tensors."""
    pinned_phases: Mapping[str, int]
    categories: Mapping[Category, int]
    """What was alive at the allocated peak; adds up to `gpu_allocated_bytes`."""
    top_allocations: tuple[Allocation, ...]
    peak_phase: str
    collectives: tuple[CollectiveTotal, ...]
    host_to_device_bytes: int
    device_to_host_bytes: int
    nvme_read_bytes: int
    nvme_written_bytes: int
    flops: int
    """Matrix products and attention of the last optimizer step, multiply and add counted apart."""
    samples: tuple[Sample, ...]
    oom_message: str
    """PyTorch's wording when the simulated card was full; empty when it was not."""
    wall_seconds: float
    cpu_seconds: float
    """Of the run alone, in a worker that has imported everything; not of a model that it found built."""
    worker_rss_bytes: int
    num_operations: int
    """With those that were played."""
    versions: Mapping[str, str]
    replaced: tuple[str, ...]
    """The pieces of the trainer that did not run as they are, one line each."""
    notes: tuple[str, ...] = field(default=())
    num_played: int = 0
    """Micro-steps whose model was played from an earlier run's tape (tape.py)."""

    @property
    def host_tensor_bytes(self) -> int:
        """Peak of one rank's host tensors, pinned ones included, by phase; Python and libraries not included."""
        return max(
            (self.host_phases[phase] + self.pinned_phases.get(phase, 0) for phase in self.host_phases), default=0
        )


class SimulationError(ZplanError):
    """The dry run could not answer: the model, an operation or a version is in the way.

    It travels as text from the child process; `module` and `operation` say where, when that is known.

    Args:
        cause: `unsupported`, the run needs what a simulated tensor does not have, and the formula still answers;
            `refused`, a library refuses the question, and would refuse the training; `broken`, a version of this
            machine is in the way.
    """

    def __init__(
        self, what: str, *, module: str = "", operation: str = "", cause: Cause = "unsupported", fix: str | None = None
    ) -> None:
        super().__init__(what, because=_BECAUSE[cause], fix=fix or (None if cause == "refused" else "zplan estimate"))
        self.module = module
        self.operation = operation
        self.cause = cause
        self.exit_code = ExitCode.BROKEN_MACHINE if cause == "broken" else ExitCode.MALFORMED


_BECAUSE: dict[Cause, str] = {
    "unsupported": "the simulation runs the installed libraries on tensors without values",
    "refused": "the installed library refuses it, in training too",
    "broken": "the simulation changes parts of the installed libraries, which have to be where they were",
}
