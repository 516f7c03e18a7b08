"""Choice flags over a DeepSpeed JSON or a plan: what is typed beside a file wins over the file."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from zplan.candidates import Fixed, check_stage, splits
from zplan.recipe import Recipe
from zplan.settings import apply_settings, setting_value
from zplan.zero_config import Choice, batch_sizes, flat_section


def over_file(data: Any, fixed: Fixed, recipe: Mapping[str, Any]) -> Any:
    """The content of a DeepSpeed JSON with the flags written into it, so that all of it is checked as one file.

    Args:
        recipe: the recipe flags that were given, by name.

    Raises:
        ConfigError: a setting that cannot be read.
    """
    if not isinstance(data, Mapping):
        return data
    data = deepcopy(dict(data))
    given = dict(setting_value(setting) for setting in fixed.settings)
    for name in ("stage", "offload_optimizer.device", "offload_param.device"):
        value = getattr(fixed, name.partition(".")[0])
        if value is not None:
            given[name] = value
    if given and isinstance(data.setdefault("zero_optimization", {}), Mapping):
        _write(data["zero_optimization"], given)
    if fixed.autotp_size > 1 and isinstance(data.setdefault("tensor_parallel", {}), Mapping):
        data["tensor_parallel"]["autotp_size"] = fixed.autotp_size
    for key, value in (
        ("sequence_parallel_size", fixed.sequence_parallel_size if fixed.sequence_parallel_size > 1 else None),
        ("train_micro_batch_size_per_gpu", fixed.micro_batch),
        ("train_batch_size", recipe.get("train_batch_size")),
    ):
        if value is not None:
            data[key] = value
    if "dtype" in recipe:
        for name in ("bf16", "fp16"):
            data[name] = {"enabled": recipe["dtype"] == name}
    if "optimizer" in recipe:
        data.pop("optimizer", None)
    if "learning_rate" in recipe:
        _write_rate(data.get("optimizer"), recipe["learning_rate"])
    return data


def _write_rate(optimizer: Any, learning_rate: float) -> None:
    """Over the file's rate, where it has one; otherwise it is the Trainer's to give."""
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if isinstance(params, dict) and "lr" in params:
        params["lr"] = learning_rate


def fixed_by_file(choice: Choice, origins: Mapping[str, str], fixed: Fixed) -> Fixed:
    """What a DeepSpeed JSON decides, for a search: the keys that it writes stay, the others are tuned."""
    section = flat_section(choice.zero)
    written = {key: section[key] for key, origin in origins.items() if origin == "user" and key in section}
    given = {
        name: written.pop(key, None)
        for name, key in (
            ("stage", "stage"),
            ("offload_optimizer", "offload_optimizer.device"),
            ("offload_param", "offload_param.device"),
        )
    }
    settings = tuple(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in written.items()
        if value is not None
    )
    batch = "train_micro_batch_size_per_gpu"
    micro = choice.batch.train_micro_batch_size_per_gpu if origins.get(batch) == "user" else fixed.micro_batch
    return replace(
        fixed, **given, settings=settings, micro_batch=micro, autotp_size=choice.batch.autotp_size,
        sequence_parallel_size=choice.batch.sequence_parallel_size,
    )  # fmt: skip


def _write(section: dict[str, Any], given: Mapping[str, Any]) -> None:
    for path, value in given.items():
        name, _, inner = path.partition(".")
        if not inner:
            section.pop(name.removeprefix("stage3_"), None)  # the un-prefixed spelling says the same
            section[name] = value
        elif isinstance(section.setdefault(name, {}), dict):
            section[name][inner] = value


def over_plan(choice: Choice, fixed: Fixed, recipe: Recipe) -> Choice:
    """A plan's choice with the flags put in.

    Raises:
        ConfigError: a setting that cannot be read, sizes that do not divide.
    """
    zero = choice.zero
    if fixed.stage is not None:
        zero = replace(zero, stage=check_stage(fixed.stage))
    for name in ("offload_optimizer", "offload_param"):
        if (device := getattr(fixed, name)) is not None:
            zero = apply_settings(zero, [f"{name}.device={device}"])
    micro_batch = fixed.micro_batch or choice.batch.train_micro_batch_size_per_gpu
    world_size = fixed.world_size or choice.batch.world_size
    split = {name: size if size > 1 else getattr(choice.batch, name) for name, size in splits(fixed).items()}
    checkpointing = fixed.gradient_checkpointing
    return Choice(
        zero=apply_settings(zero, fixed.settings),
        batch=batch_sizes(recipe, micro_batch=micro_batch, world_size=world_size, **split),
        gradient_checkpointing=choice.gradient_checkpointing if checkpointing is None else checkpointing,
    )
