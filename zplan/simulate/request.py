"""SimulationRequest: one question to the worker, as it travels on a line of JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationRequest:
    """Dry-run `recipe` as `choice` says on `cluster`."""

    config: Mapping[str, Any]
    """config.json of the model."""
    recipe: Recipe
    choice: Choice
    cluster: Cluster
    steps: int = 2
    """Optimizer steps; two, because ZeRO-3 prefetches and Adam has states only from the second one on."""
    trace: str | None = None
    """File to write the Chrome trace to."""
    cpu_adam: bool = True
    """Optimizer offload runs DeepSpeedCPUAdam; False keeps torch's AdamW on the host."""
    cuda_answers: bool = False
    """CPU ranks answer DeepSpeed's questions about asynchrony as CUDA does."""
    alloc_conf: str = ""
    """As PYTORCH_CUDA_ALLOC_CONF: the options that the replayed allocator runs under."""
    initialise: bool = False
    """Fill the weights as from_config does; from_pretrained does not, and neither does a simulation unless asked."""
    replay: bool = True
    """Play what an earlier run of the same model recorded, where it fits (tape.py); else every operation runs."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, below 1", fix="--steps 2")
