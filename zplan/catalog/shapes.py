"""ModelShape <-> JSON, without torch and without pydantic: the catalogue is read at every start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zplan.errors import ConfigError
from zplan.model_shape import Block, ModelShape, ParameterShape

_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "seq_length"),
    "num_local_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"),
    "num_shared_experts": ("n_shared_experts",),
    "hidden_act": ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj"),
}
"""Our field (Llama's spelling) <- the spellings of older families."""
KEPT_DEFAULTS = (
    "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "new_decoder_architecture",
    "parallel_attn", "use_parallel_residual", "alibi", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
"""Keys that the formulas read in a model's config; a config.json that leaves one out means transformers' default."""
_HEADS = ("lm_head.weight", "output.weight", "transformer.output_layer.weight")
"""The output projection, where it is a tensor of its own: transformers, InternLM2, ChatGLM3."""


def _first(values: Mapping[str, Any], field: str, default: Any) -> Any:
    for key in _ALIASES.get(field, (field,)):
        value = values.get(key)
        if value is not None:
            return max(value) if isinstance(value, list) else value  # one for each layer
    return default


def make_shape(
    *,
    name: str,
    architecture: str,
    blocks: tuple[Block, ...],
    config: Mapping[str, Any],
    resolved: Mapping[str, Any],
    source: str,
) -> ModelShape:
    """Fill the sizes from `resolved` (config.json with its defaults filled in).

    Raises:
        ConfigError: no hidden size, no layers or no heads.
    """
    hidden, heads = _first(resolved, "hidden_size", 0), _first(resolved, "num_attention_heads", 0)
    layers = _first(resolved, "num_hidden_layers", 0)
    if min(hidden, heads, layers) < 1:
        raise ConfigError(
            f"{name}: hidden_size {hidden}, num_hidden_layers {layers}, num_attention_heads {heads}",
            because=f"{architecture} has none of one of them, or another name for it: only attention is modelled",
            fix="--model mistral-7b",
        )
    return ModelShape(
        name=name,
        model_type=str(config.get("model_type", "")),
        architecture=architecture,
        blocks=blocks,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_key_value_heads(resolved, heads),
        head_dim=_first(resolved, "head_dim", None) or _first(resolved, "d_kv", None) or hidden // heads,
        intermediate_size=_first(resolved, "intermediate_size", 4 * hidden),
        vocab_size=_first(resolved, "vocab_size", 0),
        max_position_embeddings=_first(resolved, "max_position_embeddings", 2048),
        tie_word_embeddings=not any(parameter.name in _HEADS for parameter in _outside(blocks)),
        sliding_window=resolved.get("sliding_window") if resolved.get("use_sliding_window", True) else None,
        layer_types=tuple(resolved.get("layer_types") or ()),
        num_local_experts=_first(resolved, "num_local_experts", 0),
        num_experts_per_tok=_first(resolved, "num_experts_per_tok", 0),
        moe_intermediate_size=_expert_size(blocks, hidden),
        num_shared_experts=_first(resolved, "num_shared_experts", 0),
        kv_lora_rank=resolved.get("kv_lora_rank") or 0,
        hidden_act=str(_first(resolved, "hidden_act", "silu")),
        is_encoder_decoder=bool(resolved.get("is_encoder_decoder", False)),
        source=source,
        config=dict(config),
    )


def _key_value_heads(resolved: Mapping[str, Any], heads: int) -> int:
    if resolved.get("num_key_value_heads"):
        return int(resolved["num_key_value_heads"])
    if resolved.get("new_decoder_architecture"):
        return int(resolved["num_kv_heads"])
    return 1 if resolved.get("multi_query") else heads


def _outside(blocks: Iterable[Block]) -> Iterable[ParameterShape]:
    return (parameter for block in blocks if not block.path for parameter in block.parameters)


def _expert_size(blocks: Iterable[Block], hidden_size: int) -> int:
    """Width of one expert, from its down projection's tensor: (experts, hidden, width), or the other way round."""
    for block in blocks:
        for parameter in block.parameters:
            if parameter.kind == "experts" and "down" in parameter.name:
                *_, rows, columns = parameter.shape
                return rows if columns == hidden_size else columns
    return 0


def to_json(shape: ModelShape) -> dict[str, Any]:
    """Plain data, parameters as [name, kind, sizes...]."""
    data: dict[str, Any] = {
        name: getattr(shape, name) for name in ModelShape.__dataclass_fields__ if name not in ("blocks", "config")
    }
    data["config"] = dict(shape.config)
    data["blocks"] = [
        {
            "role": block.role,
            "path": block.path,
            "first": block.first,
            "repeat": block.repeat,
            "parameters": [[item.name, item.kind, *item.shape] for item in block.parameters],
        }
        for block in shape.blocks
    ]
    return data


def from_json(data: Mapping[str, Any]) -> ModelShape:
    """The inverse of `to_json`."""
    blocks = tuple(
        Block(
            role=block["role"],
            path=block["path"],
            first=block["first"],
            repeat=block["repeat"],
            parameters=tuple(
                ParameterShape(name=item[0], kind=item[1], shape=tuple(item[2:])) for item in block["parameters"]
            ),
        )
        for block in data["blocks"]
    )
    values = {**data, "blocks": blocks, "layer_types": tuple(data["layer_types"])}
    return ModelShape(**values)
