"""What the user decided about knobs: fixed `KEY=1e8`, narrowed `KEY=true,false`, or bounded `KEY=1e6..1e9`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zplan.candidates import is_choice_setting, splits
from zplan.errors import ConfigError
from zplan.planner import Fixed
from zplan.settings import apply_settings, gives_one_value, read_bool, setting_value, split_setting
from zplan.tuner.ranges import Elements, Options, Range, Share, Value
from zplan.tuner.space import KNOB_NAMES
from zplan.units import parse_size
from zplan.values import dataclass
from zplan.zero_config import ZeroConfig

_FLAGS = {
    "stage": "stage",
    "micro_batch": "train_micro_batch_size_per_gpu",
    "gradient_checkpointing": "gradient_checkpointing",
    "offload_optimizer": "offload_optimizer.device",
    "offload_param": "offload_param.device",
    "world_size": "world_size",
}
"""Field of Fixed -> knob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowed:
    """The user's decisions, sorted by who has to respect them."""

    ranges: Mapping[str, Range]
    """Knob -> what the search may use."""
    base: ZeroConfig
    """Values of DeepSpeed keys that are no knobs."""
    fixed: Fixed
    """What the planner's ranking has to respect: single values only."""


def narrow(fixed: Fixed) -> Narrowed:
    """Sort the flags and settings.

    Raises:
        ConfigError: a setting that is not KEY=VALUE, an unknown key, a value that cannot be read.
    """
    split = [f"{name} is {size}" for name, size in splits(fixed).items() if size > 1]
    if split:
        raise ConfigError(
            f"{split[0]}, and the tuner searches data-parallel configurations",
            because="a trial trains as sft.train does, which does not split a model or its sequences",
            fix="zplan estimate or zplan simulate with the same flags",
        )
    ranges: dict[str, Range] = {
        knob: Options((getattr(fixed, name),)) for name, knob in _FLAGS.items() if getattr(fixed, name) is not None
    }
    single, untuned = [], []
    for setting in fixed.settings:
        key, text = split_setting(setting)
        is_single = gives_one_value(text)
        if key in KNOB_NAMES:
            ranges[key] = _range(key, text)
        elif is_single:
            untuned.append(setting)
        else:
            raise ConfigError(
                f"--set {setting} gives several values, but {key} is not tuned",
                because=f"the knobs are {', '.join(KNOB_NAMES)}",
                fix=f"--set {key}={text.partition(',')[0].partition('..')[0]}",
            )
        if is_single:
            single.append(setting)
    base = apply_settings(ZeroConfig(), untuned)
    return Narrowed(ranges=ranges, base=base, fixed=replace(fixed, settings=tuple(single)))


def _range(key: str, text: str) -> Range:
    if ".." not in text:
        return Options(tuple(_value(key, part.strip()) for part in text.split(",")))
    low, high = (_value(key, part.strip()) for part in text.split("..", 1))
    if isinstance(low, float) and isinstance(high, float) and 0.0 <= low <= high <= 1.0:
        return Share(low, high)
    if isinstance(low, bool | str | float) or isinstance(high, bool | str | float) or not 1 <= low <= high:
        example = "0.3..0.8" if key.endswith("ratio") else "1e6..1e9"
        what = f"--set {key}={text} is no range"
        raise ConfigError(what, because="it needs 1 <= low <= high", fix=f"--set {key}={example}")
    return Elements(low, high)


def _value(key: str, text: str) -> Value:
    """In the type of the knob's own values: what a study stores is read back strictly."""
    setting = f"{key}={text}"
    if key == "gradient_checkpointing":
        return read_bool(key, text)
    if is_choice_setting(setting):
        return parse_size(text, name=key)
    value: Value = setting_value(setting)[1]
    return value
