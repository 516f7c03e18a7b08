"""Any transformers config -> ModelShape, through the meta device: every parameter's shape, no weight, no network.

The one slow import of the planner (torch and transformers); its answers are cached by `catalog.cache`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from zplan.catalog.cache import save_shape
from zplan.catalog.config_file import check_config, load_config
from zplan.catalog.shapes import KEPT_DEFAULTS, make_shape
from zplan.errors import ConfigError
from zplan.model_shape import Block, BlockRole, ModelShape, ParameterKind, ParameterShape

_LARGEST_NUMEL = 1 << 47
"""Elements of one tensor beyond which a config.json is a mistake, not a model."""
_OLDER_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")
"""Keys of config.json that transformers 5 still reads, under other names of its own."""
_LONGEST_REASON = 300
"""Characters of a library's own message that are shown."""


def probe_config(source: Path | Mapping[str, Any], *, name: str) -> ModelShape:
    """Read a model's shape from its config.json (a path, a folder or its content) and cache it.

    Raises:
        ConfigError: missing or unreadable file, an architecture that transformers does not have, impossible sizes.
    """
    file = source / "config.json" if isinstance(source, Path) and source.is_dir() else source
    data = load_config(file) if isinstance(file, Path) else dict(file)
    shape = shape_of_config(data, name=name)
    if isinstance(source, Path):
        save_shape(source, shape)
    return shape


def shape_of_config(data: Mapping[str, Any], *, name: str) -> ModelShape:
    """Build the model on the meta device and describe it. Raises ConfigError as `probe_config`."""
    check_config(data, name=name)
    model = build_on_meta(data, name=name)
    blocks = tuple(_blocks(model))
    shape = make_shape(
        name=name,
        architecture=type(model).__name__,
        blocks=blocks,
        config=_own_config(data, model.config),
        resolved=_text_config(model.config).to_dict(),
        source=f"transformers {transformers.__version__}, {type(model).__name__} on the meta device",
    )
    assert shape.num_parameters == model.num_parameters(), "the blocks must add up to transformers' own count"
    return replace(shape, beside_numel=_beside_numel(data, shape))


def _beside_numel(data: Mapping[str, Any], tower: ModelShape) -> int | None:
    """Parameters that AutoModelForCausalLM loads beside the text tower; None if it loads nothing of the kind.

    Source: transformers 5.23.0, models/auto/auto_factory.py (_BaseAutoModelClass.from_pretrained).
    """
    if tower.model_type == data["model_type"]:
        return 0
    config = AutoConfig.for_model(**data)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters()) - tower.num_parameters


def build_on_meta(data: Mapping[str, Any], *, name: str) -> Any:
    """The model of a config.json without memory. `trust_remote_code` is never used."""
    model_type = data["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"{name}: model_type is {model_type!r}, which transformers {transformers.__version__} does not know",
            because="its code is not in transformers, and zplan never runs code from a model's folder",
            fix="--model custom --set-model model_type=llama --set-model hidden_size=4096 ...",
        )
    if name == "custom":
        _refuse_unknown_keys(data, model_type)
    values = {key: value for key, value in data.items() if key not in ("model_type", "transformers_version")}
    try:
        config = _text_config(AutoConfig.for_model(model_type, **values))
        auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
        if type(config) not in auto._model_mapping:
            raise _no_language_model(name, model_type, config.model_type)
        with torch.device("meta"):
            return auto.from_config(config)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises anything for an impossible config
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ConfigError(
            f"{name}: transformers cannot build a {model_type} from this config",
            because=f"{type(error).__name__}: {reason}",
            fix="compare it with a config.json that works",
        ) from error


def _no_language_model(name: str, model_type: str, tower_type: str) -> ConfigError:
    """The refusal of what is trained as something else, and of a wrapper whose text tower is no model of its own."""
    is_wrapper = tower_type != model_type
    what = f"wraps a {tower_type}, which is no model of its own" if is_wrapper else "is no language model"
    return ConfigError(
        f"{name}: a {model_type} {what}",
        because="zplan plans what transformers trains as a causal or an encoder-decoder language model",
        fix="--model qwen3-8b, or whichever language model it was made from" if is_wrapper else "--model mistral-7b",
    )


def _refuse_unknown_keys(data: Mapping[str, Any], model_type: str) -> None:
    """Keys that were typed, and that the architecture's configuration does not have."""
    kind = transformers.CONFIG_MAPPING[model_type]
    known = {*kind().to_dict(), *kind.attribute_map, *_OLDER_KEYS}
    wrong = []
    for key in sorted(set(data) - known):
        near = get_close_matches(key, known, n=1, cutoff=0.5)
        wrong.append(f"{key}: a {model_type} has no such key" + (f"; did you mean {near[0]}?" if near else ""))
    if wrong:
        raise ConfigError("--set-model cannot be applied", problems=tuple(wrong), fix="--set-model hidden_size=4096")


def _own_config(data: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What builds this very model again: config.json as it was, or what a wrapper's says of the text tower; with the
    defaults that the formulas read."""
    resolved = config.to_dict()
    defaults = {key: resolved[key] for key in KEPT_DEFAULTS if resolved.get(key) is not None}
    if config.model_type == data["model_type"]:
        return {**defaults, **data}
    tower = json.loads(config.to_json_string(use_diff=True))
    return {**defaults, **{key: value for key, value in tower.items() if key != "transformers_version"}}


def _text_config(config: Any) -> Any:
    """The language tower of a vision-language config; the config itself for a language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") and not config.is_encoder_decoder else config


def _blocks(model: nn.Module) -> Iterator[Block]:
    """Parameters in the order of `named_parameters()`, consecutive equal layers as one run."""
    modules = dict(model.named_modules())
    found: list[tuple[str, int, ParameterShape]] = []
    for full_name, parameter in model.named_parameters():
        if parameter.numel() > _LARGEST_NUMEL:
            raise ConfigError(f"{full_name} would have {parameter.numel()} elements", fix="mend config.json")
        path, layer, local = _split(full_name, modules)
        owner = modules[full_name.rpartition(".")[0]]
        kind = _kind(owner, full_name.rpartition(".")[2], parameter.dim())
        found.append((path, layer, ParameterShape(name=local, shape=tuple(parameter.shape), kind=kind)))
    runs: list[Block] = []
    for (path, layer), items in groupby(found, key=lambda item: item[:2]):
        parameters = tuple(item[2] for item in items)
        last = runs[-1] if runs else None
        if path and last is not None and last.path == path and last.parameters == parameters:
            runs[-1] = Block(role=last.role, path=path, parameters=parameters, first=last.first, repeat=last.repeat + 1)
        else:
            runs.append(Block(role=_role(path, parameters), path=path, parameters=parameters, first=max(layer, 0)))
    yield from runs


def _split(full_name: str, modules: Mapping[str, nn.Module]) -> tuple[str, int, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.{}`, 3, `mlp.up_proj.weight`); ("", -1, name) outside."""
    parts = full_name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit() and isinstance(modules[".".join(parts[:index])], nn.ModuleList):
            return ".".join([*parts[:index], "{}"]), int(part), ".".join(parts[index + 1 :])
    return "", -1, full_name


def _role(path: str, parameters: tuple[ParameterShape, ...]) -> BlockRole:
    if path:
        return "encoder_layer" if path.startswith("encoder") else "layer"
    if any(parameter.kind == "embedding" for parameter in parameters):
        return "embedding"
    return "head" if any(parameter.kind == "linear" for parameter in parameters) else "final"


def _kind(owner: nn.Module, local: str, dim: int) -> ParameterKind:
    class_name = type(owner).__name__
    if isinstance(owner, nn.Embedding) or "Embedding" in class_name:
        return "embedding"
    if "Norm" in class_name:
        return "norm"
    if local == "bias" or local.endswith("_bias"):
        return "bias"
    if isinstance(owner, nn.Conv1d | nn.Conv2d):
        return "conv"
    if dim == 3:
        return "experts"
    return "linear" if isinstance(owner, nn.Linear | Conv1D) else "other"
