"""`--set KEY=VALUE` and transformers' "auto": two ways to a ZeroConfig that do not go through a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from zplan.errors import ConfigError
from zplan.units import parse_size
from zplan.zero_config import OffloadDevice, OffloadOptimizer, OffloadParam, ZeroConfig

SECTIONS: dict[str, type[OffloadOptimizer] | type[OffloadParam]] = {
    "offload_optimizer": OffloadOptimizer,
    "offload_param": OffloadParam,
}
_TYPES: dict[str, Any] = {
    **{name: kind for name, kind in get_type_hints(ZeroConfig).items() if name not in SECTIONS},
    **{f"{section}.{name}": kind for section, cls in SECTIONS.items() for name, kind in get_type_hints(cls).items()},
}
SETTING_NAMES: tuple[str, ...] = tuple(_TYPES)
"""Every key that `--set` takes: DeepSpeed's own, with the section in front inside an offload section."""
STAGE3_KEYS: dict[str, str] = {
    name.removeprefix("stage3_"): name for name in SETTING_NAMES if name.startswith("stage3_")
}
"""DeepSpeed's field names, which it takes as well as the documented aliases."""
_TRUE_FALSE = {"true": True, "false": False, "1": True, "0": False}


def hf_auto_bucket_sizes(hidden_size: int) -> dict[str, int]:
    """What transformers puts in place of "auto", by key, in elements.

    Source: transformers 5.23.0, integrations/deepspeed.py (trainer_config_finalize).
    """
    return {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def hf_auto_zero(stage: Literal[0, 1, 2, 3], hidden_size: int) -> ZeroConfig:
    """DeepSpeed's defaults with every "auto" of transformers' documentation filled in: the usual starting point."""
    sizes = hf_auto_bucket_sizes(hidden_size)
    if stage < 3:
        sizes = {"reduce_bucket_size": sizes["reduce_bucket_size"]}
    return ZeroConfig(stage=stage, **sizes)  # type: ignore[arg-type]


def apply_settings(zero: ZeroConfig, settings: Iterable[str]) -> ZeroConfig:
    """`zero` with `KEY=VALUE` settings put in, the last one winning.

    Raises:
        ConfigError: not KEY=VALUE, an unknown key, a value of another type; all of them at once.
    """
    problems: list[str] = []
    alone: ConfigError | None = None
    for setting in settings:
        try:
            zero = _apply(zero, setting)
        except ConfigError as error:
            alone = error
            problems.append(f"{error.what} (try {error.fix})" if error.fix else error.what)
    if len(problems) == 1 and alone is not None:
        raise alone
    if problems:
        raise ConfigError("--set cannot be applied", problems=tuple(problems), fix="--set sub_group_size=1e8")
    return zero


def split_setting(setting: str) -> tuple[str, str]:
    """`KEY=VALUE` -> (key, value), the key as zplan spells it: section in front, stage3_ prefix restored."""
    key, equals, text = setting.partition("=")
    key, text = key.strip().removeprefix("zero_optimization.").removeprefix("tensor_parallel."), text.strip()
    if not equals or not key or not text:
        raise ConfigError(f"--set {setting!r} is not KEY=VALUE", fix="--set sub_group_size=1e8")
    return STAGE3_KEYS.get(key, key), text


def gives_one_value(setting: str) -> bool:
    """`KEY=1e8`, not `KEY=1,2` or `KEY=1e6..1e9`, which leave a choice to the tuner."""
    return ".." not in setting and "," not in setting


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The most similar of `names`, None if nothing is near (`cutoff` of difflib: 1 is equal)."""
    from difflib import get_close_matches  # only a wrong name needs it

    found = get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return found[0] if found else None


def setting_value(setting: str) -> tuple[str, Any]:
    """`KEY=VALUE` -> (key, value in the type of its field). Raises ConfigError as `apply_settings`."""
    key, text = split_setting(setting)
    if key not in _TYPES:
        near = nearest(key, SETTING_NAMES)
        raise ConfigError(
            f"--set {key}: DeepSpeed's zero_optimization section has no such key",
            because=None if near else f"its keys are {', '.join(SETTING_NAMES)}",
            fix=f"--set {near or 'reduce_bucket_size'}={text}",
        )
    return key, _read(key, text)


def _apply(zero: ZeroConfig, setting: str) -> ZeroConfig:
    key, value = setting_value(setting)
    section, _, name = key.partition(".")
    if name:
        return replace(zero, **{section: replace(getattr(zero, section), **{name: value})})
    return replace(zero, **{key: value})


def _read(key: str, text: str) -> Any:
    """A value in the type of its field."""
    kind = _TYPES[key]
    if kind is int:
        try:
            return parse_size(text, name=key)
        except ConfigError as error:
            raise ConfigError(error.what, because=error.because, fix=f"--set {key}=1e8") from error
    if key == "stage":
        return int(text) if text in ("0", "1", "2", "3") else _refuse(key, text, "0, 1, 2 or 3", "2")
    if kind is float:
        return _share(key, text)
    if kind == OffloadDevice:
        names = get_args(OffloadDevice)
        return text if text in names else _refuse(key, text, ", ".join(names), "cpu")
    if key.endswith("nvme_path"):
        return text
    return read_bool(key, text)


def read_bool(key: str, text: str) -> bool:
    """true or false, 1 or 0. Raises ConfigError for anything else."""
    if text.lower() not in _TRUE_FALSE:
        _refuse(key, text, "true or false", "true")
    return _TRUE_FALSE[text.lower()]


def _share(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        _refuse(key, text, "a share between 0 and 1", "0.5")
    return value


def _refuse(key: str, text: str, allowed: str, example: str) -> NoReturn:
    raise ConfigError(f"{key} is {text!r}, not {allowed}", fix=f"--set {key}={example}")
