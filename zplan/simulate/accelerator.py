"""The DeepSpeed accelerator of the simulated GPU (answers as CUDA does) and of simulated or real CPU ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from zplan.simulate.device import DEVICE
from zplan.simulate.ops import StandInBuilder
from zplan.simulate.streams import SimulatedEvent, SimulatedStream
from zplan.simulate.tracker import Tracker


class TrackedCpuAccelerator(CPU_Accelerator):  # type: ignore[misc]
    """DeepSpeed's CPU accelerator with its memory questions answered by the tracker.

    Args:
        asynchronous: answer the three questions that choose code paths as CUDA does, not as a CPU does.
        communication: backend name that `init_distributed` expects.
    """

    def __init__(self, tracker: Tracker, *, asynchronous: bool, communication: str, total_bytes: int) -> None:
        super().__init__()
        self.tracker = tracker
        self.asynchronous = asynchronous
        self._communication_backend_name = communication
        self.total = self.free = total_bytes
        self.peak = 0

    def is_synchronized_device(self) -> bool:
        return not self.asynchronous

    def use_host_timers(self) -> bool:
        return True

    def resolves_data_dependency(self) -> bool:
        return not self.asynchronous

    def handles_memory_backpressure(self) -> bool:
        return not self.asynchronous

    @property
    def Stream(self) -> Any:
        return SimulatedStream if self.asynchronous else None

    @property
    def Event(self) -> Any:
        return SimulatedEvent if self.asynchronous else None

    def stream(self, stream: Any) -> Any:
        return self._on_stream(stream) if self.asynchronous else contextlib.nullcontext()

    @contextlib.contextmanager
    def _on_stream(self, stream: SimulatedStream | None) -> Iterator[None]:
        before = self.tracker.stream
        self.tracker.stream = stream.stream_id if stream is not None else before
        try:
            yield
        finally:
            self.tracker.stream = before

    def current_stream(self, device_index: Any = None) -> Any:
        return SimulatedStream.default if self.asynchronous else None

    def default_stream(self, device_index: Any = None) -> Any:
        return SimulatedStream.default if self.asynchronous else None

    def empty_cache(self) -> None:
        self.tracker.empty_cache()

    def memory_allocated(self, device_index: Any = None) -> int:
        self.peak = max(self.peak, self.tracker.current["gpu"])
        return self.tracker.current["gpu"]

    def reset_max_memory_allocated(self, device_index: Any = None) -> None:
        self.peak = self.tracker.current["gpu"]

    def max_memory_allocated(self, device_index: Any = None) -> int:
        self.memory_allocated()
        return self.peak

    memory_cached = memory_reserved = memory_allocated
    max_memory_cached = max_memory_reserved = max_memory_allocated
    reset_max_memory_cached = reset_peak_memory_stats = reset_max_memory_allocated

    def memory_stats(self, device_index: Any = None) -> dict[str, int]:
        allocated = self.memory_allocated()
        return {
            "num_alloc_retries": 0,
            "allocated_bytes.all.current": allocated,
            "allocated_bytes.all.peak": self.peak,
        }

    def total_memory(self, device_index: Any = None) -> int:
        return self.total

    def available_memory(self, device_index: Any = None) -> int:
        """What NVML calls free: DeepSpeed looks whether a copy has room."""
        return self.free - self.memory_allocated()


class SimulatedCpuAccelerator(TrackedCpuAccelerator):
    """CPU ranks of a simulated cluster: the CPU accelerator without its compiled ops."""

    def create_op_builder(self, op_name: str) -> StandInBuilder | None:
        return None if "Comm" in op_name else StandInBuilder(op_name)

    def get_op_builder(self, class_name: str) -> Any:
        return lambda *args, **kwargs: self.create_op_builder(class_name)


class SimulatedGpuAccelerator(SimulatedCpuAccelerator):
    """One simulated GPU, the way DeepSpeed's CUDA accelerator presents a real one."""

    def __init__(self, tracker: Tracker, *, num_devices: int, total_bytes: int) -> None:
        super().__init__(tracker, asynchronous=True, communication="fake", total_bytes=total_bytes)
        self._name = DEVICE
        self.num_devices = num_devices

    def device_name(self, device_index: Any = None) -> str:
        return DEVICE if device_index is None else f"{DEVICE}:{device_index}"

    def device(self, device_index: Any = None) -> Any:
        return contextlib.nullcontext()

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{DEVICE}:0"

    def device_count(self) -> int:
        return self.num_devices

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == DEVICE

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float, torch.half, torch.bfloat16]

    def get_rng_state(self, device_index: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, new_state: Any, device_index: Any = None) -> None:
        pass

    _torch_pins_host_memory = True

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True) -> Any:
        return DeepSpeedAccelerator.pin_memory(self, tensor, make_copy=make_copy, match_shape=match_shape)

    def _torch_pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    def _torch_empty_pinned(self, tensor: torch.Tensor, shape: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=tensor.dtype, pin_memory=True)

    def _torch_is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()
