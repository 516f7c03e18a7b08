"""The simulated GPU as a torch device: a Python PrivateUse1 backend without kernels, for fake tensors only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from zplan.simulate.streams import SimulatedStream

DEVICE = "simgpu"


class SimulatedDeviceModule(_DummyBackendModule):  # type: ignore[misc]
    """`torch.simgpu`: what torch, transformers and PEFT ask `torch.cuda` for."""

    Stream = SimulatedStream

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    @contextlib.contextmanager
    def device(self, index: Any) -> Iterator[None]:
        yield

    def current_stream(self, device: Any = None) -> SimulatedStream:
        return SimulatedStream.default

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


@cache
def register_device() -> None:
    """Name PrivateUse1 `simgpu`, once per process: torch offers no way back, and no other code sees the name."""
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=SimulatedDeviceModule())
