"""Which parameters PEFT puts an adapter beside, and of what shape."""

from __future__ import annotations

from zplan.model_shape import Block, ParameterShape
from zplan.recipe import Recipe

Shapes = tuple[tuple[int, int], tuple[int, int]]
"""Of lora_A and lora_B."""


def adapter_shapes(parameter: ParameterShape, block: Block, recipe: Recipe, model_type: str) -> Shapes | None:
    """Shapes of lora_A and lora_B beside this parameter; None without an adapter.

        (r, in), (out, r)              a linear module or a router
        (E r, in), (out, E r)          E stacked experts; a fused gate and up have twice the rank

    Source: peft 0.21.2, tuners/lora/layer.py (update_layer, ParamWrapper.update_layer).
    """
    if recipe.method == "full":
        return None
    wraps = _adapts_parameter(parameter, model_type, recipe.lora_target)
    if _is_lora_target(parameter, block, recipe.lora_target, model_type) or (wraps and len(parameter.shape) == 2):
        out_features, in_features = parameter.shape
        return (recipe.lora_r, in_features), (out_features, recipe.lora_r)
    if not wraps:
        return None
    experts, out_features, in_features = parameter.shape
    rank = experts * recipe.lora_r * (2 if parameter.name.endswith("gate_up_proj") else 1)
    return (rank, in_features), (out_features, rank)


def _is_lora_target(parameter: ParameterShape, block: Block, targets: tuple[str, ...], model_type: str) -> bool:
    """Whether PEFT puts an adapter on the module of this weight.

    `all-linear` takes every linear module but the output head; a router or experts that hold their weight themselves
    are no linear modules.

    Source: peft 0.21.2, tuners/tuners_utils.py (_maybe_include_all_linear_layers).
    """
    last = parameter.module.rpartition(".")[2]
    is_matrix = parameter.kind == "linear" and len(parameter.shape) == 2 and parameter.name.endswith("weight")
    if not is_matrix or last in _renamed(model_type):
        return False
    if targets == ("all-linear",):
        return block.role in ("layer", "encoder_layer")
    return last in targets


_LIKE_MIXTRAL = frozenset({"mixtral", "minimax", "minimax_m2"})
_LIKE_QWEN2_MOE = frozenset(
    {
        "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite",
        "glm_moe_dsa", "olmoe", "flex_olmo", "ernie4_5_moe", "dots1", "hunyuan_v1_moe", "exaone_moe", "cohere2_moe",
        "solar_open", "longcat_flash", "afmoe", "mellum", "beam",
    }
)  # fmt: skip
"""Families of which PEFT adapts router and experts by what their modules were called in transformers 4; Qwen 2 MoE
itself is not among them.

Source: transformers 5.23.0, conversion_mapping.py (_MODEL_TO_CONVERSION_PATTERN: mixtral, qwen2_moe); peft 0.21.2,
utils/transformers_weight_conversion.py (_convert_peft_config_moe)."""


def _renamed(model_type: str) -> dict[str, str]:
    """Earlier name of a module -> the parameter that PEFT adapts instead; a dense or shared MLP of that name is passed
    over.

    Source: peft 0.21.2, utils/transformers_weight_conversion.py (_MOE_TARGET_MODULE_MAPPING).
    """
    if model_type in _LIKE_MIXTRAL:
        return {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
    if model_type in _LIKE_QWEN2_MOE:
        names = ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"), ("down_proj", "down_proj")
        return {"gate": "gate.weight", **dict(names)}
    return {}


def _adapts_parameter(parameter: ParameterShape, model_type: str, targets: tuple[str, ...]) -> bool:
    """Whether PEFT wraps this weight of a router or of stacked experts (ParamWrapper)."""
    renamed = _renamed(model_type)
    asked = renamed if targets == ("all-linear",) else targets
    return any(f".{parameter.name}".endswith(f".{renamed[name]}") for name in asked if name in renamed)
