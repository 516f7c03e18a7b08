"""Does the plan agree with itself and with its model folder? Files are edited by hand: what differs is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from sft.disk import weight_shapes
from zplan.catalog.find import find_model
from zplan.ds_keys import TOP_KEYS, ZERO_KEYS
from zplan.errors import ConfigError
from zplan.model_shape import ModelShape
from zplan.plan import Plan
from zplan.recipe import Recipe
from zplan.zero_config import Choice, deepspeed_config

_OF_THE_MACHINE = "zero_force_ds_cpu_optimizer"
"""True on GPUs, False on CPU ranks: no contradiction."""


def check_agreement(recipe: Recipe, choice: Choice, deepspeed: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration that contradicts its recipe and choice, or has keys that nobody reads.

    The engine obeys the configuration; batches, data and checkpoints obey recipe and choice.

    Raises:
        ConfigError: naming every such key.
    """
    split = {name: getattr(choice.batch, name) for name in ("sequence_parallel_size", "autotp_size")}
    if max(split.values()) > 1:
        raise ConfigError(
            f"the plan has {', '.join(f'{name} {size}' for name, size in split.items() if size > 1)}",
            because="sft.train trains data-parallel: it splits neither sequences nor matrices",
            fix="a plan of zplan tune",
        )
    expected = dict(_flat(deepspeed_config(recipe, choice, cpu_adam=False)))
    given = dict(_flat(deepspeed))
    problems = [
        f"{key} is {given[key]} in the DeepSpeed configuration and {value} in the recipe or choice"
        for key, value in expected.items()
        if key in given and given[key] != value and key != _OF_THE_MACHINE
    ]
    problems += [f"{key}: unknown key" for key in _unknown(deepspeed)]
    if problems:
        raise ConfigError(
            "the plan contradicts itself",
            because="the engine obeys the DeepSpeed configuration, everything else obeys recipe and choice",
            fix="make the plan again: zplan tune (--backend formula needs no GPU)",
            problems=tuple(problems),
        )


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _unknown(deepspeed: Mapping[str, Any]) -> list[str]:
    zero = deepspeed.get("zero_optimization", {})
    return sorted(deepspeed.keys() - TOP_KEYS) + [f"zero_optimization.{key}" for key in sorted(zero.keys() - ZERO_KEYS)]


def check_weights(plan: Plan) -> None:
    """The folder has safetensors, as many elements as the model that the plan was made for.

    Raises:
        ConfigError: no weights; another model's weights.
    """
    folder = Path(plan.model_path)
    shapes = weight_shapes(folder)
    if not shapes:
        raise ConfigError(
            f"{folder} holds no *.safetensors",
            because="pickled weights (*.bin, *.pt) are not loaded: they can run any code",
            fix="model.save_pretrained(FOLDER) writes safetensors",
        )
    planned = planned_numel(plan.recipe.model)
    there = sum(prod(shape) for shape in shapes.values())
    if planned is not None and planned != there:
        raise ConfigError(
            f"the plan is for {plan.recipe.model}, {planned:,} parameters; {folder} has {there:,}",
            because="its batches and memory were measured for that model",
            fix="a plan made with --model on this folder, or --force",
        )


def planned_numel(model: str) -> int | None:
    """Parameters of the model that a plan names; None if it is nowhere to be seen."""
    if Path(model).is_dir():
        return sum(prod(shape) for shape in weight_shapes(Path(model)).values()) or None
    try:
        found = find_model(model)
    except ConfigError:
        return None
    return found.num_parameters if isinstance(found, ModelShape) else None
