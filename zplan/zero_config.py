"""ZeroConfig, BatchSizes and Choice <-> DeepSpeed JSON, key for key, under DeepSpeed's own names and defaults.

Defaults and bounds: deepspeed 0.19.8, runtime/zero/config.py and runtime/zero/offload_config.py. Buckets, thresholds
and live limits are in elements, as in DeepSpeed.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any, Literal

from zplan.errors import ConfigError
from zplan.recipe import Optimizer, Recipe
from zplan.values import dataclass

OffloadDevice = Literal["none", "cpu", "nvme"]
Origin = Literal["user", "auto", "default", "tuned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadParam:
    """`zero_optimization.offload_param`; acts at stage 3 only."""

    device: OffloadDevice = "none"
    nvme_path: str | None = None
    buffer_count: int = 5
    buffer_size: int = 100_000_000
    max_in_cpu: int = 1_000_000_000
    pin_memory: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptimizer:
    """`zero_optimization.offload_optimizer`; acts at stages 1, 2, 3 (nvme: 3 only, plain cpu below)."""

    device: OffloadDevice = "none"
    nvme_path: str | None = None
    buffer_count: int = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = 1.0
    super_offload: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroConfig:
    """The `zero_optimization` section. `overlap_comm=None` is DeepSpeed's own default: true at stage 3 only."""

    stage: Literal[0, 1, 2, 3] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = 500_000_000
    allgather_partitions: bool = True
    allgather_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    round_robin_gradients: bool = False
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    offload_param: OffloadParam = OffloadParam()
    sub_group_size: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_model_persistence_threshold: int = sys.maxsize
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: int = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    zero_hpz_partition_size: int = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(f"stage is {self.stage}", because="ZeRO has the stages 0, 1, 2 and 3", fix="--stage 2")
        for name in _COUNTS:
            value = getattr(self, name)
            low = 1 if name == "reduce_bucket_size" else 0
            if not low <= value <= sys.maxsize:
                raise ConfigError(
                    f"{name} is {value}, below {low}",
                    because="DeepSpeed's config model refuses it (runtime/zero/config.py)",
                    fix=f"--set {name}=5e8",
                )

    @property
    def overlaps_comm(self) -> bool:
        """overlap_comm with DeepSpeed's default filled in (config.py, overlap_comm_valid)."""
        return self.stage == 3 if self.overlap_comm is None else self.overlap_comm

    @property
    def offloads_optimizer(self) -> bool:
        return self.stage >= 1 and self.offload_optimizer.device != "none"

    @property
    def offloads_param(self) -> bool:
        """offload_param is accepted and ignored below stage 3."""
        return self.stage == 3 and self.offload_param.device != "none"

    @property
    def super_offloads(self) -> bool:
        """super_offload acts at stage 3 and swaps nothing (runtime/superoffload/superoffload_stage3.py)."""
        return self.stage == 3 and self.offload_optimizer.device == "cpu" and self.offload_optimizer.super_offload


_COUNTS = tuple(item.name for item in fields(ZeroConfig) if item.type == "int")
"""Every key that is a number of something; a search makes thousands of configurations, so they are listed once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data_parallel_size.

    It is what is trained: DeepSpeed's key of that name counts the ranks of AutoTP as if each had sequences of its own.
    """

    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    world_size: int
    sequence_parallel_size: int = 1
    """Ulysses: ranks that share one micro-batch, each with its part of every sequence. ZeRO cuts over all ranks."""
    autotp_size: int = 1
    """AutoTP (tensor_parallel.autotp_size): ranks that hold one copy of the model; ZeRO cuts each one's part of it."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 1:
                raise ConfigError(f"{item.name} is {getattr(self, item.name)}, below 1", fix="--micro-batch 1")
        _refuse_unequal_groups(self.world_size, self.sequence_parallel_size, self.autotp_size)

    @property
    def data_parallel_size(self) -> int:
        """Micro-batches that are trained at the same time."""
        return self.world_size // (self.sequence_parallel_size * self.autotp_size)

    @property
    def zero_ranks(self) -> int:
        """Ranks over which ZeRO cuts states, gradients and parameters."""
        return self.world_size // self.autotp_size

    @property
    def train_batch_size(self) -> int:
        return self.train_micro_batch_size_per_gpu * self.gradient_accumulation_steps * self.data_parallel_size


def _refuse_unequal_groups(world_size: int, sequence_parallel_size: int, autotp_size: int) -> None:
    for name, size in (("sequence_parallel_size", sequence_parallel_size), ("autotp_size", autotp_size)):
        if size < 1 or world_size % size:
            raise ConfigError(
                f"{name} {size} does not divide {world_size} ranks",
                because="DeepSpeed makes groups of equal size (parallel_state_sp.py, utils/groups.py)",
                fix=f"--set {name}=1",
            )
    if sequence_parallel_size > 1 and autotp_size > 1:
        raise ConfigError(
            f"sequence_parallel_size {sequence_parallel_size} and autotp_size {autotp_size} together",
            because="AutoTP puts its groups in the place of Ulysses' (runtime/engine.py:957)",
            fix="--set autotp_size=1",
        )


def ranks_in_words(world_size: int, sequence_parallel_size: int, autotp_size: int = 1) -> str:
    """What a micro-batch is multiplied by, for messages."""
    shared = f" / sequence_parallel_size {sequence_parallel_size}" if sequence_parallel_size > 1 else ""
    return f"world_size {world_size}{shared}" + (f" / autotp_size {autotp_size}" if autotp_size > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What tuning may change: the ZeRO section, how the global batch is cut, and recomputation."""

    zero: ZeroConfig
    batch: BatchSizes
    gradient_checkpointing: bool = True


CPU_ADAM: frozenset[Optimizer] = frozenset({"adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"})
"""What DeepSpeedCPUAdam does with offload, 8-bit states in fp32 then."""
KEPT_ON_HOST: frozenset[Optimizer] = frozenset({"sgd", "adafactor"})
"""accelerate would put DeepSpeedCPUAdam in the place of these, too, which is another optimizer; they run as they are.

Source: accelerate 1.15.0, utils/deepspeed.py:43 (map_pytorch_optim_to_deepspeed)."""


def batch_sizes(
    recipe: Recipe, *, micro_batch: int, world_size: int, sequence_parallel_size: int = 1, autotp_size: int = 1
) -> BatchSizes:
    """Cut the global batch into micro-batches.

    Raises:
        ConfigError: micro_batch * data_parallel_size does not divide train_batch_size.
    """
    _refuse_unequal_groups(world_size, sequence_parallel_size, autotp_size)
    sequences = micro_batch * world_size // (sequence_parallel_size * autotp_size)
    accumulation, rest = divmod(recipe.train_batch_size, max(sequences, 1))
    if rest or accumulation < 1:
        raise ConfigError(
            f"train_batch_size is {recipe.train_batch_size}, but micro-batch {micro_batch} x"
            f" {ranks_in_words(world_size, sequence_parallel_size, autotp_size)} = {sequences} does not divide it",
            because="DeepSpeed asserts train_batch_size = micro-batch x accumulation x world_size (runtime/config.py)",
            fix=f"--train-batch-size {max(accumulation, 1) * sequences}",
        )
    return BatchSizes(
        train_micro_batch_size_per_gpu=micro_batch, gradient_accumulation_steps=accumulation, world_size=world_size,
        sequence_parallel_size=sequence_parallel_size, autotp_size=autotp_size,
    )  # fmt: skip


def _section(value: OffloadParam | OffloadOptimizer) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in fields(value) if getattr(value, item.name) is not None}


def zero_section(zero: ZeroConfig) -> dict[str, Any]:
    """The `zero_optimization` dictionary, complete: every key that zplan knows, no "auto"."""
    section: dict[str, Any] = {}
    for item in fields(zero):
        value = getattr(zero, item.name)
        if isinstance(value, OffloadParam | OffloadOptimizer):
            if value.device != "none":
                section[item.name] = _section(value)
        elif item.name == "overlap_comm":
            section[item.name] = zero.overlaps_comm
        else:
            section[item.name] = value
    return section


def flat_section(zero: ZeroConfig) -> dict[str, Any]:
    """`zero_section` with offload sections flattened to `offload_param.device`."""
    flat: dict[str, Any] = {}
    for key, value in zero_section(zero).items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def deepspeed_config(recipe: Recipe, choice: Choice, *, cpu_adam: bool) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run, as the trainer hands it to the engine.

    The optimizer is transformers' (no "optimizer" section), so every optimizer of the Trainer works; Muon, which
    transformers has not, is DeepSpeed's, and at stage 3 that one refuses reduce_scatter. With offload,
    `zero_force_ds_cpu_optimizer` decides whether accelerate replaces it by DeepSpeedCPUAdam (Lion by DeepSpeedCPULion).

    Args:
        cpu_adam: use DeepSpeedCPUAdam under offload (needs a compiled op); False keeps torch's AdamW on the host.
    """
    zero = zero_section(choice.zero)
    config: dict[str, Any] = {
        "train_batch_size": choice.batch.train_batch_size,
        "train_micro_batch_size_per_gpu": choice.batch.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": choice.batch.gradient_accumulation_steps,
        "gradient_clipping": recipe.max_grad_norm,
        "bf16": {"enabled": recipe.dtype == "bf16"},
        "fp16": {"enabled": recipe.dtype == "fp16"},
        "zero_force_ds_cpu_optimizer": cpu_adam
        and choice.zero.offloads_optimizer
        and recipe.optimizer not in KEPT_ON_HOST,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    if choice.batch.sequence_parallel_size > 1:
        config["sequence_parallel_size"] = choice.batch.sequence_parallel_size
    if recipe.grad_accum_dtype is not None:
        config["data_types"] = {"grad_accum_dtype": recipe.grad_accum_dtype}
    if recipe.communication_data_type is not None:
        config["communication_data_type"] = recipe.communication_data_type
    if choice.batch.autotp_size > 1:
        config["tensor_parallel"] = {"autotp_size": choice.batch.autotp_size, "vocab_parallel_lm_head": False}
        config["train_batch_size"] *= choice.batch.autotp_size
    if recipe.optimizer == "muon":
        config["optimizer"] = {"type": "Muon", "params": {"lr": recipe.learning_rate}}
        if choice.zero.stage == 3:
            zero["reduce_scatter"] = False
    return config
