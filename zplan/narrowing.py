"""What the user decided about knobs: fixed `KEY=1e8`, narrowed `KEY=true,false`, or bounded `KEY=1e6..1e9`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from zplan.errors import ConfigError
from zplan.planner import Fixed
from zplan.space import KNOB_NAMES, Elements, Options, Range, Value
from zplan.units import parse_size
from zplan.zero_config import ZeroConfig

_FLAGS = {
    "stage": "stage",
    "micro_batch": "train_micro_batch_size_per_gpu",
    "gradient_checkpointing": "gradient_checkpointing",
    "offload_optimizer": "offload_optimizer.device",
    "offload_param": "offload_param.device",
}
"""Field of Fixed -> knob."""
_OFFLOAD_KEYS = {"offload_optimizer", "offload_param"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowed:
    """The user's decisions, sorted by who has to respect them."""

    ranges: Mapping[str, Range]
    """Knob -> what the search may use."""
    base: ZeroConfig
    """DeepSpeed keys that are no knobs."""
    fixed: Fixed
    """What the planner's ranking has to respect: single values only."""


def narrow(fixed: Fixed) -> Narrowed:
    """Sort the flags and settings.

    Raises:
        ConfigError: a setting that is not KEY=VALUE, an unknown key, a value that cannot be read.
    """
    ranges: dict[str, Range] = {}
    base: dict[str, Any] = {}
    single: list[str] = []
    for field_name, knob in _FLAGS.items():
        value = getattr(fixed, field_name)
        if value is not None:
            ranges[knob] = Options((value,))
    for setting in fixed.settings:
        key, value = _split(setting)
        if key in KNOB_NAMES:
            ranges[key] = value
        else:
            base[key] = _only_value(key, value)
        if isinstance(value, Options) and len(value.values) == 1:
            single.append(setting)
    return Narrowed(ranges=ranges, base=_zero_with(base), fixed=replace(fixed, settings=tuple(single)))


def _split(setting: str) -> tuple[str, Range]:
    key, equals, text = setting.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key or not text:
        raise ConfigError(f"--set {setting!r} is not KEY=VALUE", fix="--set sub_group_size=1e8")
    if ".." in text:
        low, high = (parse_size(part, name=key) for part in text.split("..", 1))
        if not 1 <= low <= high:
            raise ConfigError(f"--set {setting!r} is no range", because="it needs 1 <= low <= high")
        return key, Elements(low, high)
    return key, Options(tuple(_value(key, part.strip()) for part in text.split(",")))


def _value(key: str, text: str) -> Value:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "cpu", "nvme"):
        return lowered
    return float(text) if key.endswith("ratio") else parse_size(text, name=key)


def _only_value(key: str, value: Range) -> Value:
    if isinstance(value, Options) and len(value.values) == 1:
        return value.values[0]
    raise ConfigError(
        f"--set {key} has several values, but {key} is not tuned", because=f"the knobs are {', '.join(KNOB_NAMES)}"
    )


def _zero_with(settings: Mapping[str, Any]) -> ZeroConfig:
    """ZeroConfig with the user's values for keys that are no knobs, `offload_param.fast_init` style for sections."""
    zero = ZeroConfig()
    hints = get_type_hints(ZeroConfig)
    known = {item.name for item in fields(ZeroConfig)} - _OFFLOAD_KEYS
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if section in _OFFLOAD_KEYS and name in {item.name for item in fields(hints[section])}:
            zero = replace(zero, **{section: replace(getattr(zero, section), **{name: value})})
        elif key in known:
            zero = replace(zero, **{key: value})
        else:
            raise ConfigError(
                f"--set {key}: DeepSpeed's zero_optimization section has no such key",
                because=f"the keys are {', '.join(sorted(known))}",
            )
    return zero
