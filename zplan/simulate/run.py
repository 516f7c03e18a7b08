"""simulate_run: one configuration, start to end, in this process. The worker does the parts of it (DryRun) in forks."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import logging
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from torch._subclasses.fake_tensor import FakeTensorMode

from zplan.memory.outside import outside_allocator
from zplan.simulate import analysis, trainer
from zplan.simulate.accelerator import SimulatedCpuAccelerator, SimulatedGpuAccelerator
from zplan.simulate.allocator import CachingAllocator, parse_options
from zplan.simulate.collectives import CollectiveRecorder, join_fake_group
from zplan.simulate.device import DEVICE, register_device
from zplan.simulate.errors import explained
from zplan.simulate.ops import NVME_TRAFFIC
from zplan.simulate.optimizer_process import OptimizerProcesses
from zplan.simulate.patches import (
    Patches,
    install_deepspeed_patches,
    install_fake_tensor_patches,
    install_gpu_patches,
    install_process_patches,
)
from zplan.simulate.playing import Tapes
from zplan.simulate.report import CollectiveTotal, SimulationReport
from zplan.simulate.request import SimulationRequest
from zplan.simulate.selfcheck import VERIFIED, check_seams
from zplan.simulate.tape import tape_key
from zplan.simulate.trace import write_trace
from zplan.simulate.tracker import Tracker
from zplan.simulate.trainer import Run, replaced
from zplan.units import format_bytes
from zplan.zero_config import deepspeed_config


def installed_versions() -> dict[str, str]:
    """Of the libraries whose code a simulation runs."""
    return {name: importlib.metadata.version(name) for name in VERIFIED}


def simulate_run(request: SimulationRequest) -> SimulationReport:
    """Run the engine on simulated devices, start to end.

    Raises:
        SimulationError: names the module and the operation that could not run, or the seam that moved.
    """
    with DryRun(request) as run:
        run.load()
        return run.finish(request)


class DryRun:
    """One run, in two parts: the model, and what a configuration makes of it, which may be another request's.

    The machine stands from `with` on. What the engine holds at the end stays allocated until the run is dropped, as it
    does on a real device: the report says nothing of a process that ends.
    """

    def __init__(self, request: SimulationRequest) -> None:
        check_seams()
        self.request = request
        gpu = request.cluster.gpu.kind == "cuda"
        self.device = DEVICE if gpu else "cpu"
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Tracker({DEVICE: "gpu", "cpu": "host"} if gpu else {"cpu": "gpu"}, fake_mode=self.fake_mode)
        NVME_TRAFFIC.read_bytes = NVME_TRAFFIC.written_bytes = 0
        self.recorder = CollectiveRecorder()
        self.recorder.clock = lambda: self.tracker.num_operations
        self.model: Any = None
        self.engine: Any = None
        self._machine = contextlib.ExitStack()

    def __enter__(self) -> DryRun:
        processes = OptimizerProcesses(self.tracker, (self.fake_mode, self.tracker))
        self._machine.enter_context(simulated_machine(self.request, self.tracker, self.recorder, processes))
        return self

    def __exit__(self, *exc: object) -> None:
        self._machine.close()

    def load(self) -> None:
        """The model, as every question of one `loading_key` has it."""
        with self._simulated():
            self.model = trainer.load_model(self._run(self.request), self.tracker)
        gc.freeze()  # a million objects that live as long as the run: searching them for garbage took a tenth of it

    def finish(self, request: SimulationRequest) -> SimulationReport:
        """The rest of the run, for a request whose `loading_key` is that of the model's."""
        started = time.monotonic()
        ranks = request.choice.batch.world_size
        if ranks != self.request.choice.batch.world_size:
            leave_group()
            join_fake_group(world_size=ranks, local_size=min(request.cluster.gpus_per_node, ranks))
        if self.device == DEVICE:
            get_accelerator().free = request.cluster.gpu.free_bytes - bytes_beside_tensors(request)
        with self._simulated():
            key = tape_key(request)
            tapes = Tapes(key, self.tracker) if key is not None else None
            self.engine = trainer.train_model(self._run(request), self.model, self.tracker, tapes)
        report = make_report(request, self.tracker, self.recorder, wall_seconds=time.monotonic() - started)
        if request.trace:
            write_trace(request.trace, self.tracker, self.recorder)
        return report

    @contextlib.contextmanager
    def _simulated(self) -> Iterator[None]:
        with explained(self.tracker), self.fake_mode, self.tracker:
            yield

    def _run(self, request: SimulationRequest) -> Run:
        gpu = request.cluster.gpu.kind == "cuda"
        config = deepspeed_config(request.recipe, request.choice, cpu_adam=request.cpu_adam and gpu)
        return Run(
            model_config=dict(request.config),
            recipe=request.recipe,
            choice=request.choice,
            deepspeed_config=self._on_drive(config),
            device=self.device,
            steps=request.steps,
            initialise=request.initialise,
        )

    def _on_drive(self, config: dict[str, Any]) -> dict[str, Any]:
        """Swap folders in a folder of our own: the engine empties and makes them, and they are the user's."""
        for name in ("offload_optimizer", "offload_param"):
            section = config["zero_optimization"].get(name, {})
            if section.get("device") == "nvme":
                section["nvme_path"] = self._drive
        return config

    @cached_property
    def _drive(self) -> str:
        return self._machine.enter_context(tempfile.TemporaryDirectory(prefix="zplan-nvme-"))


@contextlib.contextmanager
def simulated_machine(
    request: SimulationRequest, tracker: Tracker, recorder: CollectiveRecorder, processes: OptimizerProcesses
) -> Iterator[None]:
    """Device, accelerator, process group and patches of a simulated cluster; all but the device's name is undone."""
    cluster = request.cluster
    world_size = request.choice.batch.world_size
    gpu = cluster.gpu.kind == "cuda"
    before, silenced = get_accelerator(), logging.root.manager.disable
    with Patches() as patches, warnings.catch_warnings(), restored_environment():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        if gpu:
            register_device()
            accelerator: SimulatedCpuAccelerator = SimulatedGpuAccelerator(
                tracker, num_devices=cluster.gpus_per_node, total_bytes=cluster.gpu.total_bytes
            )
        else:
            accelerator = SimulatedCpuAccelerator(
                tracker, asynchronous=request.cuda_answers, communication="fake", total_bytes=cluster.gpu.total_bytes
            )
        set_accelerator(accelerator)
        install_fake_tensor_patches(patches, tracker)
        install_deepspeed_patches(patches, recorder)
        if gpu:
            install_gpu_patches(patches, tracker)
            install_process_patches(patches, processes)
        join_fake_group(world_size=world_size, local_size=min(cluster.gpus_per_node, world_size))
        try:
            yield
        finally:
            processes.close()
            leave_group()
            set_accelerator(before)
            logging.disable(silenced)


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Ranks and addresses are told by variables; afterwards they are what they were."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def leave_group() -> None:
    """Forget the process group, and DeepSpeed's handle of it."""
    import deepspeed.comm.comm as deepspeed_comm

    deepspeed_comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()


def bytes_beside_tensors(request: SimulationRequest) -> int:
    """CUDA contexts and NCCL buffers of one rank: the formula's, since nothing simulates them."""
    return outside_allocator(request.choice, request.cluster).expected


def reserved_bytes_of(
    request: SimulationRequest, tracker: Tracker, peaks: analysis.Peaks
) -> tuple[int, Mapping[str, int]]:
    """What the caching allocator holds, at most and in each phase. A CPU rank has none: it holds its tensors."""
    if request.cluster.gpu.kind != "cuda":
        return peaks.gpu_bytes, peaks.phases["gpu"]
    unlimited = CachingAllocator(options=parse_options(request.alloc_conf))
    phases, _ = analysis.replay(tracker, unlimited)
    return unlimited.peak_reserved_bytes, phases


def find_oom(request: SimulationRequest, tracker: Tracker, reserved_bytes: int) -> str:
    """PyTorch's words if the card is smaller than `reserved_bytes` and what lies beside them; else nothing.

    The tensors of a CPU rank must fit into its share of the host.
    """
    gpu, other = request.cluster.gpu, bytes_beside_tensors(request)
    if gpu.kind != "cuda":
        held, share = format_bytes(reserved_bytes), format_bytes(gpu.free_bytes)
        return f"a CPU rank holds {held} of tensors, its share is {share}" if reserved_bytes > gpu.free_bytes else ""
    if reserved_bytes + other <= gpu.free_bytes:
        return ""
    card = CachingAllocator(
        capacity_bytes=max(0, gpu.free_bytes - other),
        total_bytes=gpu.total_bytes,
        other_bytes=other,
        options=parse_options(request.alloc_conf),
    )
    return analysis.replay(tracker, card)[1]


def make_report(
    request: SimulationRequest, tracker: Tracker, recorder: CollectiveRecorder, *, wall_seconds: float
) -> SimulationReport:
    """Everything that the run left in the tracker and the recorder."""
    peaks = analysis.find_peaks(tracker)
    alive = analysis.alive_at(tracker, peaks.gpu_index)
    reserved_bytes, reserved_phases = reserved_bytes_of(request, tracker, peaks)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return SimulationReport(
        gpu_allocated_bytes=peaks.gpu_bytes,
        gpu_reserved_bytes=reserved_bytes,
        gpu_used_bytes=reserved_bytes + bytes_beside_tensors(request),
        allocated_phases=peaks.phases["gpu"],
        reserved_phases=reserved_phases,
        host_phases=peaks.phases["host"],
        pinned_phases=peaks.phases["pinned"],
        categories=analysis.categories(alive),
        top_allocations=analysis.top_allocations(alive),
        peak_phase=peaks.gpu_phase,
        collectives=tuple(
            CollectiveTotal(name=name, count=count, bytes=total)
            for name, (count, total) in sorted(recorder.totals.items())
        ),
        host_to_device_bytes=analysis.copied_bytes(tracker, "cpu", DEVICE),
        device_to_host_bytes=analysis.copied_bytes(tracker, DEVICE, "cpu"),
        nvme_read_bytes=NVME_TRAFFIC.read_bytes,
        nvme_written_bytes=NVME_TRAFFIC.written_bytes,
        flops=tracker.flops.get(request.steps - 1, 0),
        samples=peaks.samples,
        oom_message=find_oom(request, tracker, reserved_bytes),
        wall_seconds=wall_seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        worker_rss_bytes=usage.ru_maxrss * 1024,
        num_operations=tracker.num_operations,
        num_played=tracker.num_played,
        versions=installed_versions(),
        replaced=replaced(request.recipe, request.choice),
        notes=(f"the allocator is replayed under PYTORCH_CUDA_ALLOC_CONF={request.alloc_conf}",)
        if request.alloc_conf
        else (),
    )
