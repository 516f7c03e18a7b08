"""A model's config.json, looked at before anything slow reads it: what cannot be a model is refused in no time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zplan.errors import ConfigError

_MOST_LAYERS = 10_000
"""Layers beyond which a config.json is a mistake: each one is built, and a billion would never end."""
_MOST = (1 << 31) - 1
_EXPERTS = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
"""Sizes that dense members of a family set to 0."""
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "d_model", "num_layers",
    "num_decoder_layers", *_EXPERTS,
)  # fmt: skip
"""Keys of config.json that are whole numbers from 1 up, or absent."""
_OF_EACH_LAYER = ("intermediate_size", "num_experts_per_tok", "num_key_value_heads", "moe_intermediate_size")
"""Sizes that some families give as a list, a number for each layer (Gemma 3n, Hunyuan MoE)."""


def load_config(path: Path) -> dict[str, Any]:
    """The content of a config.json. Raises ConfigError: unreadable, not JSON, not an object, no model."""
    from zplan.files import load_json  # pydantic, for a file that nobody has probed yet

    data = load_json(path)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} is not a model's config.json",
            because=f"it holds a {type(data).__name__}",
            fix="--model mistral-7b",
        )
    check_config(data, name=str(path))
    return data


def check_config(data: Mapping[str, Any], *, name: str) -> None:
    """Raises ConfigError: no model_type, sizes that no model has; all of them at once."""
    if not isinstance(data.get("model_type"), str):
        what = f"model_type is {data['model_type']!r}" if "model_type" in data else "it has no model_type"
        raise ConfigError(
            f"{name} is not a model's config.json: {what}",
            because="model_type names the architecture, such as llama or qwen2",
            fix="--model custom --set-model model_type=llama --set-model hidden_size=4096 ...",
        )
    wrong = [line for tower in (data, data.get("text_config")) for line in _impossible(tower)]
    if wrong:
        raise ConfigError(f"{name}: impossible sizes in config.json", problems=tuple(wrong), fix="mend config.json")


def _impossible(tower: Any) -> Iterator[str]:
    """What is wrong with the sizes of one tower of the model."""
    if not isinstance(tower, Mapping):
        return
    whole = True
    for key in SIZES:
        least, most = (0 if key in _EXPERTS else 1), (_MOST_LAYERS if "layer" in key else _MOST)
        value = tower.get(key)
        each = value if isinstance(value, list) and value and key in _OF_EACH_LAYER else [value]
        if any(one is not None and (type(one) is not int or not least <= one <= most) for one in each):
            whole = False
            yield f"{key} is {value!r}, not a whole number between {least} and {most:,}"
    heads, groups = tower.get("num_attention_heads"), tower.get("num_key_value_heads")
    if whole and heads and isinstance(groups, int) and groups and heads % groups:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
