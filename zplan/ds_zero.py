"""The zero_optimization section of any DeepSpeed JSON: read as DeepSpeed reads it, with what it would not tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from zplan.combinations import refused_combinations
from zplan.ds_keys import (
    DEPRECATED,
    OFFLOAD_KEYS,
    REMOVED_ZERO_KEYS,
    STAGE3_ALIASES,
    TOP_KEYS,
    ZERO_KEYS,
    Accepts,
    read_value,
)
from zplan.settings import hf_auto_bucket_sizes, nearest
from zplan.values import dataclass
from zplan.zero_config import OffloadOptimizer, OffloadParam, Origin, ZeroConfig


@dataclass(slots=True)
class Findings:
    """What a reading collects: everything that is wrong or odd at once, and where each value came from."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)


def read_zero_section(section: Any, *, hidden_size: int, device_kind: str, found: Findings) -> ZeroConfig | None:
    """ZeroConfig of the section; None if problems leave nothing to build."""
    if isinstance(section, bool):
        found.problems.append(
            f"zero_optimization is {section}, an old form that transformers cannot read;"
            f' write {{"stage": {int(section)}}}'
        )
        return None
    if not isinstance(section, Mapping):
        found.problems.append(f"zero_optimization is {section!r}, not a section")
        return None
    before = len(found.problems)
    values = _read_keys(section, ZERO_KEYS, "", hidden_size, found)
    for name in ("offload_optimizer", "offload_param"):
        values[name] = _offload(section.get(name), name, hidden_size, found)
    _apply_deprecated(values, section, found)
    if len(found.problems) > before:
        return None
    values = {key: value for key, value in values.items() if value is not None and _modelled(key)}
    values["offload_optimizer"] = OffloadOptimizer(**values.get("offload_optimizer", {}))
    values["offload_param"] = OffloadParam(**values.get("offload_param", {}))
    zero = ZeroConfig(**values)
    found.problems += refused_combinations(zero, device_kind=device_kind)
    found.problems += _refused_in_file(section, zero)
    found.warnings += dead_knobs(zero, tuple(found.origins))
    return zero


def _modelled(key: str) -> bool:
    return ZERO_KEYS[key].modelled and key not in DEPRECATED


def _read_keys(
    section: Mapping[str, Any], known: Mapping[str, Accepts], prefix: str, hidden_size: int, found: Findings
) -> dict[str, Any]:
    """Key by key: unknown ones, values of another type, "auto"."""
    values: dict[str, Any] = {}
    for given, value in section.items():
        key = STAGE3_ALIASES.get(given, given) if not prefix else given
        path = f"{prefix}{given}"
        if not prefix and given in REMOVED_ZERO_KEYS:
            found.problems.append(f"{path}: {REMOVED_ZERO_KEYS[given]}; delete it")
        elif key not in known:
            found.problems.append(_unknown(given, path, known))
        elif key != given and key in section:
            found.problems.append(f"{path}: DeepSpeed refuses it next to {key}; keep one of the two")
        elif value == "auto":
            values[key] = _auto(given, prefix, section, hidden_size, found)
        elif key in ("leaf_module", "zenflow") and value is not None and not isinstance(value, Mapping):
            found.problems.append(f"{path} is {value!r}, not a section; delete it")
        elif known[key].kind != "object":
            read, complaint = read_value(known[key], value)
            if complaint:
                found.problems.append(f"{path} {complaint}")
            values[key] = read
            found.origins[f"{prefix}{key}"] = "user"
            if key != given:
                found.warnings.append(
                    f'{path}: DeepSpeed reads it as {key}; spell it so, or "auto" and other tools do not see it'
                )
    return values


def _unknown(given: str, path: str, known: Mapping[str, Accepts]) -> str:
    if given in TOP_KEYS and given not in known:
        return f"{path} belongs at the top of the file, not in zero_optimization"
    for section, keys in OFFLOAD_KEYS.items():
        if known is not keys and given in keys:
            return f"{path} belongs in {section}"
    near = nearest(given, (*known, *STAGE3_ALIASES) if known is ZERO_KEYS else known)
    mend = f"did you mean {near}?" if near else "delete it"
    return f"{path}: DeepSpeed has no such key and refuses it; {mend}"


_FILLED_BY_ACCELERATE = {
    "stage": 2,
    "stage3_gather_16bit_weights_on_model_save": None,
    "offload_optimizer.device": None,
    "offload_param.device": None,
}
"""Key -> what accelerate writes in place of "auto" when its own settings are untouched; None: DeepSpeed's default too.

Source: accelerate 1.15, utils/dataclasses.py:1280 (plugin_to_config_mapping).
"""


def _auto(given: str, prefix: str, section: Mapping[str, Any], hidden_size: int, found: Findings) -> Any:
    """transformers fills in three sizes, accelerate a few more; it stops at any other "auto", DeepSpeed alone drops it.

    Source: transformers 5.23, integrations/deepspeed.py (trainer_config_finalize); accelerate 1.15,
    utils/dataclasses.py:1371 (fill_match); deepspeed 0.19.8, runtime/config_utils.py (DeepSpeedConfigModel).
    """
    sizes = hf_auto_bucket_sizes(hidden_size)
    path = f"{prefix}{given}"
    if path in sizes:
        if path.startswith("stage3_") and read_value(ZERO_KEYS["stage"], section.get("stage"))[0] != 3:
            return None
        found.origins[path] = "auto"
        return sizes[path]
    if path in _FILLED_BY_ACCELERATE:
        found.origins[path] = "auto"
        if path == "stage":
            found.warnings.append(
                'stage: accelerate fills in 2 for this "auto", DeepSpeed alone runs without ZeRO; write 2'
            )
        return _FILLED_BY_ACCELERATE[path]
    prefixed = STAGE3_ALIASES.get(given, given)
    where = f" under {prefixed} only" if prefixed in sizes and prefixed != given else ""
    what = f"is filled in{where}" if where else "is filled in by nothing"
    found.warnings.append(
        f'{path}: "auto" {what}: accelerate stops at it, DeepSpeed alone takes its default; delete it'
    )
    return None


def _offload(section: Any, name: str, hidden_size: int, found: Findings) -> dict[str, Any] | None:
    if section is None:
        return None
    if not isinstance(section, Mapping):
        found.problems.append(f'{name} is {section!r}, not a section; write {{"device": "cpu"}}')
        return None
    known = OFFLOAD_KEYS[name]
    values = _read_keys(section, known, f"{name}.", hidden_size, found)
    return {key: value for key, value in values.items() if value is not None and known[key].modelled}


def _apply_deprecated(values: dict[str, Any], section: Mapping[str, Any], found: Findings) -> None:
    """cpu_offload and its like: still read, refused next to what replaced them."""
    for old, new in DEPRECATED.items():
        if old not in section:
            continue
        short = new.removeprefix("stage3_")
        if new in section or short in section:
            found.problems.append(f"{old}: DeepSpeed refuses it next to {new}; delete {old}")
            continue
        mend = f'"{new}": {{"device": "cpu"}}' if new.startswith("offload") else new
        found.warnings.append(f"{old} is deprecated; write {mend}")
        if new.startswith("offload"):
            values[new] = {"device": "cpu"} if values.get(old) else None
            found.origins[f"{new}.device"] = "user"
        else:
            values[new] = values.get(old)
            found.origins[new] = "user"


def _refused_in_file(section: Mapping[str, Any], zero: ZeroConfig) -> Iterator[str]:
    """Combinations with keys that ZeroConfig does not have. Source: runtime/zero/config.py, stage_1_and_2.py:213."""
    computes, _ = read_value(ZERO_KEYS["compute_grad_norm"], section.get("compute_grad_norm", True))
    if computes is False and section.get("compute_grad_norm") != "auto":
        if zero.stage not in (1, 2):
            yield f"compute_grad_norm is false at stage {zero.stage}; DeepSpeed allows it at stages 1 and 2"
        elif zero.offloads_optimizer:
            yield "compute_grad_norm is false with offload_optimizer; DeepSpeed refuses the two together"


_NEEDS_STAGE3 = (
    "sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)  # fmt: skip
_BELOW_STAGE3 = ("round_robin_gradients", "allgather_partitions", "allgather_bucket_size")
_NVME_ONLY = ("buffer_count", "buffer_size", "max_in_cpu", "nvme_path", "pipeline_read", "pipeline_write", "fast_init")


def dead_knobs(zero: ZeroConfig, given: tuple[str, ...]) -> Iterator[str]:
    """Keys that someone wrote and that change nothing in this configuration."""
    for path in given:
        section, _, name = path.rpartition(".")
        if (section or path) not in ZERO_KEYS or path == "stage":
            continue
        if zero.stage == 0 or (zero.stage < 3 and _stage3_only(path, section)):
            yield f"{path} has no effect at stage {zero.stage}"
        elif zero.stage == 3 and path in _BELOW_STAGE3:
            yield f"{path} has no effect at stage 3"
        elif path == "allgather_bucket_size":
            yield "allgather_bucket_size has no effect: torch has all_gather_into_tensor (runtime/utils.py)"
        elif section:
            yield from _dead_offload_knob(zero, section, name)
    if zero.stage in (1, 2) and zero.offload_optimizer.device == "nvme":
        yield f"offload_optimizer.device nvme acts as cpu at stage {zero.stage}: no file is written"


def _stage3_only(path: str, section: str) -> bool:
    return section == "offload_param" or path.startswith("stage3_") or path in _NEEDS_STAGE3


def _dead_offload_knob(zero: ZeroConfig, section: str, name: str) -> Iterator[str]:
    device = zero.offload_optimizer.device if section == "offload_optimizer" else zero.offload_param.device
    if name == "device":
        return
    if device == "none":
        yield f"{section}.{name} has no effect: {section}.device is none"
    elif name in _NVME_ONLY and device != "nvme":
        yield f"{section}.{name} has no effect: {section}.device is {device}"
    elif name == "super_offload" and zero.stage < 3:
        yield f"{section}.{name} has no effect at stage {zero.stage}"
