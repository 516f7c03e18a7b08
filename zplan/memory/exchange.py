"""What recipe and cluster say about how ranks exchange weights and gradients, beside the choice."""

from __future__ import annotations

from zplan.hardware import Cluster
from zplan.recipe import Recipe
from zplan.values import dataclass


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the choice does not say."""

    is_fp16: bool = False
    """The training dtype is the quantizer's own."""
    gpus_per_node: int | None = None
    """None: one node has them all."""

    @classmethod
    def of(cls, recipe: Recipe, cluster: Cluster) -> Exchange:
        return cls(is_fp16=recipe.dtype == "fp16", gpus_per_node=cluster.gpus_per_node)


PLAIN = Exchange()
"""bf16 in one node."""
