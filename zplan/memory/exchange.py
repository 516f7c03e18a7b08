"""What recipe and cluster say to a replay, beside the choice: how ranks exchange weights and gradients, and states."""

from __future__ import annotations

from dataclasses import replace

from zplan.hardware import Cluster
from zplan.memory.states import first_state_bytes
from zplan.recipe import DTYPE_BYTES, DType, Recipe
from zplan.values import dataclass
from zplan.zero_config import BatchSizes


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the choice does not say."""

    is_fp16: bool = False
    """The training dtype is the quantizer's own."""
    accumulated: DType | None = None
    """Dtype of gradients between micro-steps; None: the training dtype."""
    communicated: DType | None = None
    """Dtype of gradients that are reduced; None: the training dtype."""
    gpus_per_node: int | None = None
    """None: one node has them all."""
    state_bytes: float = first_state_bytes("adamw")
    """What the first update makes for each element."""

    @classmethod
    def of(cls, recipe: Recipe, cluster: Cluster | None = None) -> Exchange:
        """Source: deepspeed 0.19.8, runtime/engine.py:1719 (communication_data_type), :1799 (get_data_types)."""
        return cls(
            is_fp16=recipe.dtype == "fp16",
            accumulated=_other(recipe.grad_accum_dtype, recipe.dtype),
            communicated=_other(recipe.communication_data_type, recipe.dtype),
            gpus_per_node=cluster.gpus_per_node if cluster else None,
            state_bytes=first_state_bytes(recipe.optimizer),
        )

    def for_batch(self, batch: BatchSizes, itemsize: int) -> Exchange:
        """Ranks that share sequences add gradients in fp32.

        Source: deepspeed 0.19.8, runtime/engine.py:2182 (seq_parallel_communication_data_type, "fp32"),
        stage_1_and_2.py (allreduce_bucket: sequence_parallel_size > 1).
        """
        shares = batch.sequence_parallel_size > 1 and itemsize != DTYPE_BYTES["fp32"]
        return replace(self, communicated="fp32") if shares else self

    def accumulated_bytes(self, itemsize: int) -> int:
        """Of one accumulated gradient; `itemsize` is the training dtype's."""
        return DTYPE_BYTES[self.accumulated] if self.accumulated else itemsize

    def communicated_bytes(self, itemsize: int) -> int:
        """Of one gradient while it is reduced."""
        return DTYPE_BYTES[self.communicated] if self.communicated else itemsize

    @property
    def converts_back(self) -> bool:
        """Reduced gradients have another dtype than accumulated ones."""
        return self.communicated != self.accumulated


def _other(dtype: DType | None, training: DType) -> DType | None:
    return None if dtype == training else dtype


PLAIN = Exchange()
"""bf16 in one node."""
