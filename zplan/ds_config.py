"""Any DeepSpeed JSON from the wild -> a Choice: "auto" filled in as transformers does, every problem at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zplan.ds_batch import read_batch, read_cutting, read_sharing
from zplan.ds_keys import HALF_MASTERS, REMOVED_KEYS, TOP_KEYS, ZERO_KEYS, Accepts, read_value
from zplan.ds_sections import CLOSE, check_sections
from zplan.ds_zero import Findings, read_zero_section
from zplan.errors import ConfigError
from zplan.files import load_json
from zplan.hardware import Cluster
from zplan.model_shape import ModelShape
from zplan.recipe import DTYPE_BYTES, DType, Recipe
from zplan.settings import apply_settings, hf_auto_zero, nearest
from zplan.values import dataclass
from zplan.zero_config import BatchSizes, Choice, Origin, ZeroConfig

__all__ = ["DsConfigReading", "apply_settings", "hf_auto_zero", "load_ds_config", "read_ds_config"]

_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "lion": "lion", "muon": "muon"}
"""DeepSpeed's optimizer types that a Recipe knows. DeepSpeed's Adam is AdamW (adam_w_mode is on by default)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DsConfigReading:
    """What a DeepSpeed JSON asks for."""

    choice: Choice
    recipe: Recipe
    """The given one with what the file decides: dtype, clipping, optimizer, learning rate, global batch."""
    origins: Mapping[str, Origin]
    """Key -> user | auto; keys that are not there have DeepSpeed's default."""
    warnings: tuple[str, ...]
    """What DeepSpeed accepts and then ignores, renames or will drop."""


def load_ds_config(
    path: Path | str, *, recipe: Recipe, shape: ModelShape, cluster: Cluster, micro_batch: int | None = None,
    gradient_checkpointing: bool | None = None,
) -> DsConfigReading:  # fmt: skip
    """Read a file; see `read_ds_config`. Raises ConfigError."""
    return read_ds_config(
        load_json(path), recipe=recipe, shape=shape, cluster=cluster, micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing, name=str(path),
    )  # fmt: skip


def read_ds_config(
    data: Any, *, recipe: Recipe, shape: ModelShape, cluster: Cluster, micro_batch: int | None = None,
    gradient_checkpointing: bool | None = None, name: str = "ds_config",
) -> DsConfigReading:  # fmt: skip
    """Read a DeepSpeed configuration as DeepSpeed 0.19.8 under transformers 5.23.0 would, on all ranks of the cluster.

    Args:
        micro_batch: for a micro-batch that the file leaves open (the Trainer's per_device_train_batch_size).
        gradient_checkpointing: not DeepSpeed's to say: the Trainer's; None is TRL's default, on.

    Raises:
        ConfigError: every problem of the file in one error, under the user's spelling of the keys.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{name} is not a DeepSpeed configuration",
            because=f"its top is a {type(data).__name__}, not an object", fix='{"zero_optimization": {"stage": 2}}',
        )  # fmt: skip
    found = Findings()
    _check_top_keys(data, found)
    recipe = _read_recipe(data, recipe, found)
    shared = read_sharing(data, shape, recipe, cluster.world_size, found)
    cut = read_cutting(data, shape, cluster.world_size, found)
    if shared > 1 and cut > 1:
        found.problems.append(
            "sequence_parallel_size and tensor_parallel: AutoTP's groups replace the others; delete one"
        )
        shared = 1
    one = BatchSizes(
        train_micro_batch_size_per_gpu=micro_batch or 1, gradient_accumulation_steps=1, world_size=cluster.world_size,
        sequence_parallel_size=shared, autotp_size=cut,
    )  # fmt: skip
    batch = read_batch(data, recipe, one, found)
    zero = read_zero_section(
        data.get("zero_optimization", {}), hidden_size=shape.hidden_size, device_kind=cluster.gpu.kind, found=found
    )
    if zero is not None:
        _check_together(data, zero, recipe, found)
    if found.problems or zero is None or batch is None:
        noticed = tuple(f"also: {line}" for line in found.warnings)
        raise ConfigError(
            f"{name} cannot be used", problems=(*found.problems, *noticed),
            because="DeepSpeed 0.19.8 refuses it, or zplan does not model it",
            fix="mend the lines above and ask again",
        )  # fmt: skip
    return DsConfigReading(
        choice=Choice(zero=zero, batch=batch, gradient_checkpointing=gradient_checkpointing is not False),
        recipe=replace(recipe, train_batch_size=batch.train_batch_size),
        origins=found.origins,
        warnings=tuple(found.warnings),
    )


def _check_top_keys(data: Mapping[str, Any], found: Findings) -> None:
    for key in data:
        if key in REMOVED_KEYS:
            found.problems.append(
                f"{key}: {REMOVED_KEYS[key]} has been removed, and DeepSpeed refuses the key; delete it"
            )
        elif key in ZERO_KEYS and key not in TOP_KEYS:
            found.warnings.append(f"{key} belongs in zero_optimization; at the top DeepSpeed ignores it")
        elif key not in TOP_KEYS:
            near = nearest(str(key), TOP_KEYS, cutoff=CLOSE)
            mend = f"; did you mean {near}?" if near else ""
            found.warnings.append(f"{key}: DeepSpeed has no such key and ignores it{mend}")
    check_sections(data, found)
    _check_unplanned(data, found)
    if "activation_checkpointing" in data:
        found.warnings.append("activation_checkpointing has no effect: transformers' models do not use DeepSpeed's")


def _check_unplanned(data: Mapping[str, Any], found: Findings) -> None:
    """Parallelism and dtypes that no part of the plan models: refused, not estimated as if they were not there."""
    section = data.get("expert_parallel")
    if isinstance(section, Mapping):
        size = section.get("expert_parallel_size", section.get("size", 1))
        if section.get("enabled") is True or (isinstance(size, int) and size > 1):
            found.problems.append("expert_parallel: expert parallelism is not modelled; delete the section")
    for name, switch in (("compile", "deepcompile"), ("torch_autocast", "enabled"), ("hybrid_engine", "enabled")):
        section = data.get(name)
        if isinstance(section, Mapping) and read_value(Accepts("bool"), section.get(switch, False))[0] is True:
            found.problems.append(f"{name}.{switch} is not modelled; delete the section")
    zero = data.get("zero_optimization")
    if isinstance(zero, Mapping) and isinstance(zero.get("zenflow"), Mapping):
        found.problems.append("zenflow is not modelled; delete the section")
    if isinstance(zero, Mapping) and isinstance(zero.get("leaf_module"), Mapping):
        found.warnings.append("leaf_module is not modelled: what is gathered whole may take more than is counted")
    value = data.get("seq_parallel_communication_data_type")
    if value is not None and _read_type("seq_parallel_communication_data_type", value, found) not in (None, "fp32"):
        found.warnings.append(
            "seq_parallel_communication_data_type is not modelled: gradients of shared sequences are counted in fp32"
        )


_TYPES: Mapping[str, DType] = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "torch.float32": "fp32", "fp16": "fp16", "float16": "fp16",
    "half": "fp16", "torch.float16": "fp16", "bf16": "bf16", "bfloat16": "bf16", "torch.bfloat16": "bf16",
}  # fmt: skip
"""DeepSpeed's names (runtime/config.py, DtypeEnum)."""


def _read_type(key: str, value: Any, found: Findings, *, all_names: bool = False) -> DType | None:
    """A dtype of gradients; communication takes the three short names only (get_communication_data_type)."""
    name = str(value) if all_names else str(value).lower()
    if name in _TYPES and (all_names or name in DTYPE_BYTES):
        found.origins[key] = "user"
        return _TYPES[name]
    found.problems.append(f'{key} is {value!r}, not fp32, fp16 or bf16; write "bf16"')
    return None


def _read_gradient_types(data: Mapping[str, Any], recipe: Recipe, found: Findings) -> Recipe:
    """Dtypes in which gradients are added: over micro-steps, and over ranks.

    Source: deepspeed 0.19.8, runtime/engine.py:1719, :1799, :2323 (stage 0 knows one dtype).
    """
    types, zero = data.get("data_types"), data.get("zero_optimization")
    accumulated = types.get("grad_accum_dtype") if isinstance(types, Mapping) else None
    if accumulated is not None:
        dtype = _read_type("data_types.grad_accum_dtype", accumulated, found, all_names=True)
        stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
        if dtype not in (None, recipe.dtype) and stage in (0, "0"):
            found.problems.append(
                f"data_types.grad_accum_dtype is {accumulated!r} at stage 0, and training is in {recipe.dtype};"
                " DeepSpeed refuses two dtypes there; delete it"
            )
        recipe = replace(recipe, grad_accum_dtype=dtype)
    value = data.get("communication_data_type")
    if value is not None:
        recipe = replace(recipe, communication_data_type=_read_type("communication_data_type", value, found))
    return recipe


def _read_recipe(data: Mapping[str, Any], recipe: Recipe, found: Findings) -> Recipe:
    recipe = replace(recipe, dtype=_read_dtype(data, recipe, found))
    recipe = _read_gradient_types(data, recipe, found)
    clipping = data.get("gradient_clipping", 1.0)
    if clipping != "auto":
        value, complaint = _number(clipping)
        if complaint:
            found.problems.append(f"gradient_clipping {complaint}")
        else:
            recipe = replace(recipe, max_grad_norm=value)
            if "gradient_clipping" in data:
                found.origins["gradient_clipping"] = "user"
    else:
        found.origins["gradient_clipping"] = "auto"
    return _read_optimizer(data.get("optimizer"), recipe, found)


def _number(value: Any) -> tuple[float, str | None]:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value), None
    return 0.0, f"is {value!r}, not a number from 0 up"


def _read_dtype(data: Mapping[str, Any], recipe: Recipe, found: Findings) -> DType:
    """bf16 or fp16 as enabled; without either section accelerate adds the Trainer's own.

    Source: accelerate 1.15, utils/dataclasses.py:1415 (set_mixed_precision); deepspeed, runtime/config.py:511.
    """
    states = {key: _enabled(data, key, found) for key in ("bf16", "fp16")}
    if states["bf16"] is True and states["fp16"] is True:
        found.problems.append("bf16 and fp16 are both enabled; DeepSpeed allows one; set fp16.enabled to false")
    if states["bf16"] is True:
        return "bf16"
    if states["fp16"] is True:
        return "fp16"
    open_to_trainer = "auto" in states.values() or not {"bf16", "bfloat16", "fp16"} & set(data)
    return recipe.dtype if open_to_trainer else "fp32"


def _enabled(data: Mapping[str, Any], key: str, found: Findings) -> bool | str:
    """true, false or "auto" of `bf16.enabled` and `fp16.enabled`."""
    section = data.get(key, data.get("bfloat16", {}) if key == "bf16" else {})
    if not isinstance(section, Mapping):
        return False  # named by check_sections
    value = section.get("enabled", False)
    if value == "auto":
        found.origins[f"{key}.enabled"] = "auto"
        return "auto"
    read, complaint = read_value(Accepts("bool"), value)
    if complaint:
        found.problems.append(f"{key}.enabled {complaint}")
        return False
    if "enabled" in section:
        found.origins[f"{key}.enabled"] = "user"
    return bool(read)


def _read_optimizer(section: Any, recipe: Recipe, found: Findings) -> Recipe:
    if section is None:
        return recipe
    if not isinstance(section, Mapping):
        return recipe  # named by check_sections
    kind = section.get("type")
    if isinstance(kind, str) and kind.lower() in _OPTIMIZERS:
        recipe = replace(recipe, optimizer=_OPTIMIZERS[kind.lower()])  # type: ignore[arg-type]
        found.origins["optimizer.type"] = "user"
    elif kind is not None:
        found.problems.append(
            f'optimizer.type {kind!r} is not modelled; write "AdamW", or delete the section and give --optimizer'
        )
    params = section.get("params", {})
    rate = params.get("lr", "auto") if isinstance(params, Mapping) else "auto"
    if rate != "auto":
        value, complaint = _number(rate)
        if complaint:
            found.problems.append(f"optimizer.params.lr {complaint}")
        else:
            recipe = replace(recipe, learning_rate=value)
    return recipe


def _check_together(data: Mapping[str, Any], zero: ZeroConfig, recipe: Recipe, found: Findings) -> None:
    """Combinations across sections. Source: deepspeed 0.19.8, runtime/config.py:696, stage_1_and_2.py:213."""
    section = data.get("zero_optimization")
    norm = section.get("compute_grad_norm", True) if isinstance(section, Mapping) else True
    if norm is False and zero.stage in (1, 2) and recipe.max_grad_norm > 0:
        found.problems.append("compute_grad_norm is false with gradient_clipping on; set gradient_clipping to 0")
    operation = str(data.get("gradient_allreduce_op", "mean")).lower()
    if operation not in ("mean", "sum"):
        found.problems.append(f'gradient_allreduce_op is {operation!r}, not mean or sum; write "mean"')
    if operation == "sum" and zero.stage == 3:
        found.problems.append('gradient_allreduce_op is "sum" at stage 3; DeepSpeed refuses it; write "mean"')
    if zero.stage >= 1 and recipe.dtype == "fp32" and zero.offloads_optimizer:
        found.warnings.append("neither bf16 nor fp16 is enabled: weights and gradients take 4 bytes an element")
    _check_half_masters(data, zero, found)


def _check_half_masters(data: Mapping[str, Any], zero: ZeroConfig, found: Findings) -> None:
    """Optimizer states in 16 bits. Source: deepspeed 0.19.8, runtime/config.py (_do_error_check)."""
    on = {
        key: f"{name}.{key}"
        for name in ("bf16", "fp16")
        for key in HALF_MASTERS
        if isinstance(data.get(name), Mapping) and read_value(Accepts("bool"), data[name].get(key, False))[0] is True
    }
    for path in on.values():
        if zero.stage == 0:
            found.problems.append(f"{path} is for stages 1, 2 and 3; DeepSpeed refuses it at stage 0; delete it")
        else:
            found.warnings.append(f"{path} is not modelled: states and gradients are counted in fp32, too high")
    if "bf16_optimizer_states" in on and "bf16_master_weights_and_grads" not in on:
        found.problems.append("bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads; set both")
