"""The values that the speed model returns."""

from __future__ import annotations

from typing import Literal

from zplan.values import dataclass

BoundBy = Literal["compute", "memory_bandwidth", "communication", "host_link", "cpu_adam", "nvme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedEstimate:
    """One optimizer step of one configuration. None where the cluster's speeds are not known."""

    step_seconds: float | None
    tokens_per_second: float | None
    """All ranks, tokens of train_batch_size * max_length."""
    tokens_per_second_per_gpu: float | None
    bound_by: BoundBy | None
    parts: dict[str, float]
    """Seconds of each part before overlap: compute, communication, host_link, cpu_adam, nvme."""
