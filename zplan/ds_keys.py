"""Every key that DeepSpeed 0.19.8 reads, what it accepts there, and what it has dropped.

Source: deepspeed 0.19.8, runtime/zero/config.py, runtime/zero/offload_config.py, runtime/config.py,
runtime/precision_config.py; transformers 5.23.0, integrations/deepspeed.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from zplan.values import dataclass

Kind = Literal["int", "bool", "optional bool", "share", "stage", "device", "path", "object"]


@dataclass(frozen=True, slots=True)
class Accepts:
    """What DeepSpeed's config model takes for one key."""

    kind: Kind
    low: int = 0
    modelled: bool = True
    """ZeroConfig has it; otherwise it changes nothing that zplan counts."""


_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "int": TypeAdapter(int), "bool": TypeAdapter(bool), "optional bool": TypeAdapter(bool | None),
    "share": TypeAdapter(float), "stage": TypeAdapter(int),
}  # fmt: skip
"""pydantic in its lax mode, as DeepSpeed uses it: 5e8 and "500000000" are ints, "5e8" is not; 1 and "yes" are true."""
_MOST = (1 << 63) - 1


def read_value(accepts: Accepts, value: Any) -> tuple[Any, str | None]:
    """The value as DeepSpeed's parser reads it, and the complaint where it refuses."""
    if accepts.kind == "device":
        return value, None if value in ("none", "cpu", "nvme") else f"is {value!r}, not none, cpu or nvme"
    if accepts.kind == "path":
        is_path = value is None or isinstance(value, str)
        return value, None if is_path else f"is {value!r}, not a path"
    if accepts.kind == "object":
        return value, None
    try:
        read = _ADAPTERS[accepts.kind].validate_python(value)
    except ValidationError:
        return None, f"is {value!r}, not {_WORDS[accepts.kind]}{_whole_number(value)}"
    if accepts.kind == "stage" and read not in (0, 1, 2, 3):
        return None, f"is {value!r}; ZeRO has the stages 0, 1, 2 and 3"
    if accepts.kind == "share" and not 0.0 <= read <= 1.0:
        return None, f"is {value!r}, not between 0 and 1"
    if accepts.kind == "int" and not accepts.low <= read <= _MOST:
        return (
            None,
            f"is {value!r}, not between {accepts.low} and 2**63 - 1; write {max(accepts.low, min(read, _MOST))}",
        )
    return read, None


_WORDS = {
    "int": "a whole number", "bool": "true or false", "optional bool": "true or false", "share": "a number",
    "stage": "0, 1, 2 or 3",
}  # fmt: skip


def _whole_number(value: Any) -> str:
    """A hint for "5e8" in quotes, which JSON would have taken without them."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        number = None
    whole = number is not None and isfinite(number) and number.is_integer()
    return f"; write {int(number)} without quotes" if number is not None and whole else ""


_INT, _BOOL = Accepts("int"), Accepts("bool")
_UNMODELLED = Accepts("bool", modelled=False)

STAGE3_ALIASES: Mapping[str, str] = {
    name: f"stage3_{name}"
    for name in (
        "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
        "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
        "use_all_reduce_for_fetch_params", "allgather_sequential",
    )
}  # fmt: skip
"""Un-prefixed names, which DeepSpeed takes as well (populate_by_name), but transformers' "auto" does not know."""

ZERO_KEYS: Mapping[str, Accepts] = {
    "stage": Accepts("stage"),
    "contiguous_gradients": _BOOL,
    "reduce_scatter": _BOOL,
    "reduce_bucket_size": Accepts("int", low=1),
    "allgather_partitions": _BOOL,
    "allgather_bucket_size": _INT,
    "overlap_comm": Accepts("optional bool"),
    "round_robin_gradients": _BOOL,
    "sub_group_size": _INT,
    "stage3_prefetch_bucket_size": _INT,
    "stage3_param_persistence_threshold": _INT,
    "stage3_model_persistence_threshold": _INT,
    "stage3_max_live_parameters": _INT,
    "stage3_max_reuse_distance": _INT,
    "stage3_gather_16bit_weights_on_model_save": _BOOL,
    "stage3_module_granularity_threshold": _INT,
    "stage3_use_all_reduce_for_fetch_params": _BOOL,
    "stage3_allgather_sequential": _BOOL,
    "zero_hpz_partition_size": _INT,
    "zero_quantized_weights": _BOOL,
    "zero_quantized_nontrainable_weights": _BOOL,
    "zero_quantized_gradients": _BOOL,
    "offload_optimizer": Accepts("object"),
    "offload_param": Accepts("object"),
    "cpu_offload": Accepts("optional bool"),
    "cpu_offload_param": Accepts("optional bool"),
    "cpu_offload_use_pin_memory": Accepts("optional bool", modelled=False),
    "stage3_gather_fp16_weights_on_model_save": _BOOL,
    "compute_grad_norm": _UNMODELLED,
    "use_multi_rank_bucket_allreduce": _UNMODELLED,
    "load_from_fp32_weights": _UNMODELLED,
    "elastic_checkpoint": _UNMODELLED,
    "ignore_unused_parameters": _UNMODELLED,
    "legacy_stage1": _UNMODELLED,
    "parameter_alignment": _UNMODELLED,
    "memory_efficient_linear": _UNMODELLED,
    "pipeline_loading_checkpoint": _UNMODELLED,
    "override_module_apply": _UNMODELLED,
    "log_trace_cache_warnings": _UNMODELLED,
    "enable_sanity_checks": _UNMODELLED,
    "save_muon_momentum_buffer_in_memory": _UNMODELLED,
    "leaf_module": Accepts("object", modelled=False),
    "zenflow": Accepts("object", modelled=False),
}
OFFLOAD_KEYS: Mapping[str, Mapping[str, Accepts]] = {
    "offload_optimizer": {
        "device": Accepts("device"), "nvme_path": Accepts("path"), "buffer_count": _INT, "pin_memory": _BOOL,
        "pipeline_read": _BOOL, "pipeline_write": _BOOL, "fast_init": _BOOL, "ratio": Accepts("share"),
        "super_offload": _BOOL, "cpuadam_cores_perc": Accepts("share", modelled=False),
    },
    "offload_param": {
        "device": Accepts("device"), "nvme_path": Accepts("path"), "buffer_count": _INT, "buffer_size": _INT,
        "max_in_cpu": _INT, "pin_memory": _BOOL,
    },
}  # fmt: skip
DEPRECATED = {
    "cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip
"""Still read, with a warning; refused next to its replacement."""
REMOVED_ZERO_KEYS = {
    "mics_shard_size": "MiCS has been removed from DeepSpeed; zero_hpz_partition_size keeps a copy within the node",
    "mics_hierarchical_params_gather": "MiCS has been removed from DeepSpeed",
    "zeropp_loco_param": "LoCo has been removed from DeepSpeed",
}
REMOVED_KEYS = {
    "nebula": "Nebula checkpointing", "compression_training": "the compression library",
    "amp": "Apex AMP (use fp16 or bf16)", "quantize_training": "MoQ", "sparse_gradients": "sparse gradients",
    "eigenvalue": "MoQ", "sparse_attention": "DeepSpeed Sparse Attention",
    "elasticity": "elastic training", "graph_harvesting": "graph harvesting",
    "curriculum_learning": "legacy curriculum learning", "progressive_layer_drop": "progressive layer dropping",
}  # fmt: skip
"""Top-level keys that DeepSpeed refuses because the feature is gone."""
SECTION_KEYS: Mapping[str, tuple[str, ...]] = {
    "bf16": (
        "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ),
    "fp16": (
        "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
        "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads",
    ),
    "compile": (
        "deepcompile", "autoep_non_moe", "free_activation", "free_activation_threshold", "offload_activation",
        "offload_activation_pin_memory", "offload_opt_states", "double_buffer", "symmetric_memory", "debug_log",
        "offload_parameters", "sync_before_reduce", "sync_after_reduce", "sync_before_allgather",
        "sync_after_allgather", "keep_int_input_tensors", "keep_all_input_tensors", "passes",
    ),
    "comms_logger": ("enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "tensorboard": ("enabled", "output_path", "job_name"),
    "wandb": ("enabled", "group", "team", "project"),
    "csv_monitor": ("enabled", "output_path", "job_name"),
    "comet": (
        "enabled", "samples_log_interval", "project", "workspace", "api_key", "experiment_name", "experiment_key",
        "online", "mode",
    ),
    "hybrid_engine": (
        "enabled", "max_out_tokens", "inference_tp_size", "release_inference_cache", "pin_parameters",
        "tp_gather_partition_size", "enable_cuda_graph",
    ),
}  # fmt: skip
"""Sections whose unknown keys DeepSpeed refuses, with all the keys it knows there."""
HALF_MASTERS = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")
"""Keys of bf16 and fp16 that keep optimizer states in 16 bits; at stages 1 to 3 only."""
TOP_KEYS = frozenset((
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "managed_gradient_accumulation", "gradient_clipping", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "optimizer", "scheduler", "fp16", "bf16", "bfloat16", "torch_autocast",
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type",
    "seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "gradient_allreduce_op", "disable_allgather", "disable_python_gc", "activation_checkpointing", "aio",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "autotuning",
    "data_efficiency", "data_types", "checkpoint", "compile", "pipeline", "hybrid_engine",
    "dataloader_drop_last", "log_level", "timers", "tensor_parallel", "expert_parallel", "sequence_parallel_size",
    "use_data_before_expert_parallelism", "vocabulary_size", "check_overflow",
    "weight_quantization", "allgather_size",
))  # fmt: skip
"""Top-level keys that are read; DeepSpeed ignores any other without a word."""
