"""Sections of a DeepSpeed JSON beside zero_optimization: the keys and the types of value that DeepSpeed takes there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zplan.ds_keys import SECTION_KEYS, Accepts, read_value
from zplan.ds_zero import Findings
from zplan.settings import nearest

CLOSE = 0.8
"""How alike a key of the file and one of DeepSpeed must be to be called a slip of the pen: at the top of a file
other tools keep sections of their own (`fp8`, `comms_config`)."""
_NUMBERS = frozenset((
    "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale", "max_out_tokens",
    "inference_tp_size", "tp_gather_partition_size", "samples_log_interval", "free_activation_threshold",
))  # fmt: skip
_TEXTS = frozenset((
    "output_path", "job_name", "group", "team", "project", "workspace", "api_key", "experiment_name",
    "experiment_key", "mode",
))  # fmt: skip
_VALIDATIONS = ("IGNORE", "WARN", "FAIL")
_LISTS = frozenset(("prof_ops", "passes"))
_MAY_BE_NULL = frozenset((*_TEXTS, "online", "passes", "aio", "bf16")) - {"output_path", "job_name"}
_OBJECTS = (
    "activation_checkpointing", "aio", "autotuning", "bfloat16", "checkpoint", "data_efficiency", "data_types",
    "expert_parallel", "flops_profiler", "optimizer", "pipeline", "scheduler", "tensor_parallel", "timers",
    "torch_autocast", "weight_quantization",
)  # fmt: skip
"""Sections whose inside nothing here reads, or elsewhere does; DeepSpeed stops at anything but an object."""


def check_sections(data: Mapping[str, Any], found: Findings) -> None:
    """Names unknown keys and values of another type, section by section. "auto" is dropped by DeepSpeed everywhere.

    Source: deepspeed 0.19.8, runtime/config_utils.py (DeepSpeedConfigModel), runtime/precision_config.py,
    compile/config.py, comm/config.py, monitor/config.py, runtime/config.py (HybridEngineConfig).
    """
    for name in (*_OBJECTS, *SECTION_KEYS):
        section = data.get(name, {})
        if isinstance(section, Mapping):
            _check_section(section, name, SECTION_KEYS.get(name, tuple(section)), found)
        elif section is not None or name not in _MAY_BE_NULL:
            found.problems.append(f"{name} is {section!r}, not a section; delete it")
    clock = data.get("wall_clock_breakdown", False)
    if not isinstance(clock, int):  # it is or-ed with the profiler's switch
        found.problems.append(f"wall_clock_breakdown is {clock!r}, not true or false; write false")
    _check_curriculum(data, found)
    optimizer, checkpoint = data.get("optimizer"), data.get("checkpoint")
    if isinstance(optimizer, Mapping) and not isinstance(optimizer.get("params", {}), Mapping):
        found.problems.append(f"optimizer.params is {optimizer['params']!r}, not a section; delete it")
    if isinstance(checkpoint, Mapping) and str(checkpoint.get("tag_validation", "warn")).upper() not in _VALIDATIONS:
        found.problems.append(
            f"checkpoint.tag_validation is {checkpoint['tag_validation']!r}, not Ignore, Warn or Fail; delete it"
        )


def _check_curriculum(data: Mapping[str, Any], found: Findings) -> None:
    """DeepSpeed reads it whether data efficiency is enabled or not.

    Source: deepspeed 0.19.8, runtime/data_pipeline/config.py (get_data_efficiency_config, get_curriculum_learning).
    """
    section: Any = data
    for name in ("data_efficiency", "data_sampling", "curriculum_learning"):
        section = section.get(name)
        if not isinstance(section, Mapping):
            return
    if section.get("enabled") and "curriculum_metrics" not in section:
        found.problems.append(
            "data_efficiency.data_sampling.curriculum_learning is enabled without curriculum_metrics, which"
            ' DeepSpeed asserts; write "enabled": false'
        )


def _check_section(section: Mapping[str, Any], name: str, known: tuple[str, ...], found: Findings) -> None:
    for key, value in section.items():
        if key not in known:
            near = nearest(str(key), known, cutoff=CLOSE)
            mend = f"did you mean {near}?" if near else "delete it"
            found.problems.append(f"{name}.{key}: DeepSpeed has no such key and refuses it; {mend}")
        elif name not in SECTION_KEYS or value == "auto" or (value is None and key in _MAY_BE_NULL):
            continue
        elif wrong := _wrong(key, value):
            found.problems.append(f"{name}.{key} is {value!r}, not {wrong}; delete it")


def _wrong(key: str, value: Any) -> str | None:
    """What the value of a key should be, if it is something else."""
    if key in _NUMBERS:
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if key in _TEXTS:
        return None if isinstance(value, str) else "a text"
    if key in _LISTS:
        return None if isinstance(value, list) else "a list"
    return "true or false" if read_value(Accepts("bool"), value)[1] else None
