"""Which parameters train, in which dtype, in which optimizer group: full, LoRA, QLoRA, modules_to_save."""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import Any

from zplan.errors import ConfigError
from zplan.model_shape import Block, ModelShape, ParameterShape
from zplan.recipe import Recipe
from zplan.saved_modules import copied_blocks, is_saved
from zplan.values import dataclass

NF4_BLOCK = 64
"""Weights per absmax value. Source: bitsandbytes, functional.py (quantize_4bit, blocksize=64)."""
NF4_NESTED_BLOCK = 256
"""absmax values per second-level fp32 absmax under double quantisation (bitsandbytes, compress_statistics)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of one layer as the run holds it."""

    name: str
    module: str
    numel: int
    shape: tuple[int, ...]
    itemsize: int
    """Bytes of one element; 0 for quantised weights, whose bytes are `stored_bytes`."""
    stored_bytes: int
    trainable: bool
    group: int
    """0: weight decay, 1: none (norms and biases), as transformers' Trainer splits them."""
    packed: tuple[int, int] | None = None
    """(elements, bytes of one) of a quantised weight as a parameter; its scales are no part of it."""

    @property
    def held(self) -> tuple[int, int]:
        """(elements, bytes of one) of the parameter, as an engine sees it."""
        return self.packed or (self.numel, self.itemsize)

    @property
    def states_bytes(self) -> int:
        """Scales of a quantised weight, which no engine takes apart."""
        return self.stored_bytes - self.packed[0] * self.packed[1] if self.packed else 0


@dataclass(frozen=True, kw_only=True)
class LaidBlock:
    """A block of the model with its adapters."""

    block: Block
    weights: tuple[Weight, ...]
    repeat: int

    @cached_property
    def trainable_numel(self) -> tuple[int, int]:
        """Trainable elements of one layer, per optimizer group."""
        return tuple(  # type: ignore[return-value]
            sum(weight.numel for weight in self.weights if weight.trainable and weight.group == group)
            for group in (0, 1)
        )

    @cached_property
    def stored_bytes(self) -> int:
        return sum(weight.stored_bytes for weight in self.weights)

    @cached_property
    def frozen_bytes(self) -> int:
        return sum(weight.stored_bytes for weight in self.weights if not weight.trainable)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All parameters of the run, repeated layers stored once."""

    blocks: tuple[LaidBlock, ...]
    muon: bool = False
    """The optimizer's groups are Muon's: its matrices, and what it leaves to AdamW."""
    in_fp16: bool = False
    """Weights and gradients are in fp16, under a loss scale."""
    tied_head: int = 0
    """Elements of a head that is made and then tied to the embeddings; 0 if it is its own."""

    @cached_property
    def group_numel(self) -> tuple[int, int]:
        """Trainable elements per optimizer group."""
        return tuple(  # type: ignore[return-value]
            sum(laid.trainable_numel[group] * laid.repeat for laid in self.blocks) for group in (0, 1)
        )

    @cached_property
    def trainable_numel(self) -> int:
        return sum(self.group_numel)

    @cached_property
    def stored_bytes(self) -> int:
        return sum(laid.stored_bytes * laid.repeat for laid in self.blocks)

    @cached_property
    def frozen_bytes(self) -> int:
        return sum(laid.frozen_bytes * laid.repeat for laid in self.blocks)

    @cached_property
    def largest_trainable(self) -> int:
        """Elements of the largest trainable parameter; 0 if none trains."""
        return max((weight.numel for laid in self.blocks for weight in laid.weights if weight.trainable), default=0)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(weight.numel for laid in self.blocks for weight in laid.weights)

    @cached_property
    def largest_folded(self) -> int:
        """Elements of the largest stack of experts that an adapter is folded into; 0 if there is none."""
        most = 0
        for laid in self.blocks:
            names = {weight.name for weight in laid.weights}
            folded = (weight.numel for weight in laid.weights if f"{weight.name}.{EXPERT_ADAPTERS[0]}" in names)
            most = max(most, *folded, 0)
        return most


_LAYOUTS: dict[tuple[Any, ...], tuple[ModelShape, Layout]] = {}


def layout(shape: ModelShape, recipe: Recipe) -> Layout:
    """The parameters of `recipe` on `shape`; kept, because a search asks for the same ones again and again.

    Raises:
        ConfigError: a LoRA target that no module of the model bears.
    """
    key = (
        id(shape),
        recipe.method,
        recipe.lora_r,
        recipe.lora_target,
        recipe.modules_to_save,
        recipe.dtype,
        recipe.load_in_8bit,
        recipe.use_dora,
        recipe.optimizer == "muon",
    )
    known = _LAYOUTS.get(key)
    if known is not None and known[0] is shape:
        return known[1]
    laid = Layout(
        blocks=tuple(_lay(block, recipe, shape.model_type) for block in copied_blocks(shape, recipe)), muon=key[-1],
        in_fp16=recipe.dtype == "fp16", tied_head=_tied_head(shape),
    )  # fmt: skip
    if laid.trainable_numel == 0:
        raise ConfigError(
            f"lora_target {', '.join(recipe.lora_target)} names no module of {shape.name}",
            because="PEFT raises when no target module is found (peft, tuners_utils.inject_adapter)",
            fix="--lora-target all-linear",
        )
    _LAYOUTS[key] = (shape, laid)
    return laid


def _tied_head(shape: ModelShape) -> int:
    embeddings = (p.numel for block in shape.blocks if block.role == "embedding" for p in block.parameters)
    return max(embeddings, default=0) if shape.tie_word_embeddings else 0


def _lay(block: Block, recipe: Recipe, model_type: str) -> LaidBlock:
    weights: list[Weight] = []
    for parameter in block.parameters:
        saved = is_saved(parameter, recipe)
        quantised = recipe.method == "qlora" and not saved and is_quantised(parameter, block, model_type)
        trains = recipe.method == "full" or (saved and block.role != "original")
        weights.append(_weight(parameter, recipe, trains=trains, quantised=quantised))
        if recipe.method == "full" or saved:
            continue
        wraps = adapts_parameter(parameter, model_type, recipe.lora_target)
        if is_lora_target(parameter, block, recipe.lora_target, model_type) or (wraps and len(parameter.shape) == 2):
            weights.extend(_adapter(parameter, recipe))
        elif wraps:
            weights.extend(_expert_adapter(parameter, recipe))
    return LaidBlock(block=block, weights=tuple(weights), repeat=block.repeat)


def _weight(parameter: ParameterShape, recipe: Recipe, *, trains: bool, quantised: bool) -> Weight:
    itemsize = recipe.weight_bytes
    return Weight(
        name=parameter.name,
        module=parameter.module,
        numel=parameter.numel,
        shape=parameter.shape,
        itemsize=0 if quantised else itemsize,
        stored_bytes=_quantised_bytes(parameter, recipe) if quantised else itemsize * parameter.numel,
        trainable=trains,
        group=1 if parameter.kind in ("norm", "bias") else 0,
        packed=_packed(parameter, recipe) if quantised else None,
    )


def is_quantised(parameter: ParameterShape, block: Block, model_type: str) -> bool:
    """Matrices of linear modules, the output head aside; experts stacked in one tensor are no linear modules, and
    Falcon's are of a class of their own, which is passed over.

    Source: transformers 5.23.0, integrations/bitsandbytes.py (replace_with_bnb_linear: type(module) is nn.Linear),
    quantizers/base.py (get_keys_to_not_convert), models/falcon/modeling_falcon.py (FalconLinear).
    """
    is_linear = parameter.kind == "linear" and len(parameter.shape) == 2 and model_type != "falcon"
    return is_linear and block.role != "head"


def _packed(parameter: ParameterShape, recipe: Recipe) -> tuple[int, int]:
    """int8, or two 4-bit weights a byte in elements of the training dtype, as the trainer asks for
    (bnb_4bit_quant_storage).

    Source: bitsandbytes 0.50.2, _ops.py (quantize_4bit).
    """
    if recipe.load_in_8bit:
        return parameter.numel, 1
    return (parameter.numel + 1) // (2 * recipe.weight_bytes), recipe.weight_bytes


def _quantised_bytes(parameter: ParameterShape, recipe: Recipe) -> int:
    return int8_bytes(parameter.shape) if recipe.load_in_8bit else nf4_bytes(parameter.numel)


def int8_bytes(shape: tuple[int, ...]) -> int:
    """A linear weight in LLM.int8(): one byte an element and an fp32 absmax per row.

    Source: bitsandbytes 0.49, functional.py (int8_vectorwise_quant), nn/modules.py (Int8Params.CB, SCB).
    """
    numel = prod(shape)
    return numel + 4 * (numel // shape[-1])


def nf4_bytes(numel: int) -> int:
    """A linear weight in 4-bit NormalFloat with double quantisation.

        numel / 2 + one byte per block of 64 + one fp32 per 256 blocks

    Source: bitsandbytes, functional.py (quantize_4bit, compress_statistics=True).
    """
    blocks = -(-numel // NF4_BLOCK)
    return -(-numel // 2) + blocks + 4 * -(-blocks // NF4_NESTED_BLOCK)


def is_lora_target(parameter: ParameterShape, block: Block, targets: tuple[str, ...], model_type: str) -> bool:
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


def adapts_parameter(parameter: ParameterShape, model_type: str, targets: tuple[str, ...]) -> bool:
    """Whether PEFT wraps this weight of a router or of stacked experts (ParamWrapper)."""
    renamed = _renamed(model_type)
    asked = renamed if targets == ("all-linear",) else targets
    return any(f".{parameter.name}".endswith(f".{renamed[name]}") for name in asked if name in renamed)


def _expert_adapter(parameter: ParameterShape, recipe: Recipe) -> tuple[Weight, Weight]:
    """lora_A (E r x in) and lora_B (out x E r) beside E stacked weights; a fused gate and up have twice the rank.

    Source: peft 0.21.2, tuners/lora/layer.py (ParamWrapper.update_layer).
    """
    experts, out_features, in_features = parameter.shape
    rank = experts * recipe.lora_r * (2 if parameter.name.endswith("gate_up_proj") else 1)
    return tuple(  # type: ignore[return-value]
        Weight(
            name=f"{parameter.name}.{part}",
            module=parameter.module,
            numel=rows * columns,
            shape=(rows, columns),
            itemsize=recipe.weight_bytes,
            stored_bytes=recipe.weight_bytes * rows * columns,
            trainable=True,
            group=0,
        )
        for part, rows, columns in ((EXPERT_ADAPTERS[0], rank, in_features), (EXPERT_ADAPTERS[1], out_features, rank))
    )


EXPERT_ADAPTERS = ("expert_lora_A", "expert_lora_B")


def experts_refused(laid: Layout, recipe: Recipe) -> str | None:
    """Why PEFT refuses these adapters, if it does: its wrapper of stacked weights can neither DoRA nor dropout.

    Source: peft 0.21.2, tuners/lora/layer.py:2366 (ParamWrapper.__init__).
    """
    option = "DoRA" if recipe.use_dora else "lora_dropout" if recipe.lora_dropout else None
    if option is None:
        return None
    adapted = any(weight.name.endswith(EXPERT_ADAPTERS) for block in laid.blocks for weight in block.weights)
    return f"{option} on the stacked weights of experts: peft raises (lora.ParamWrapper)" if adapted else None


def _adapter(parameter: ParameterShape, recipe: Recipe) -> tuple[Weight, ...]:
    """lora_A (r x in), lora_B (out x r) and DoRA's magnitude (out), in the training dtype: the engine casts the whole
    module.

    Source: deepspeed 0.19.8, runtime/engine.py (_configure_distributed_model: module.bfloat16()); peft 0.21.2,
    tuners/lora/dora.py (DoraLinearLayer.update_layer).
    """
    out_features, in_features = parameter.shape
    parts: list[tuple[str, tuple[int, ...]]] = [
        ("lora_A", (recipe.lora_r, in_features)),
        ("lora_B", (out_features, recipe.lora_r)),
        *([("lora_magnitude_vector", (out_features,))] if recipe.use_dora else []),
    ]
    return tuple(
        Weight(
            name=f"{parameter.module}.{part}.default.weight",
            module=f"{parameter.module}.{part}.default",
            numel=prod(size),
            shape=size,
            itemsize=recipe.weight_bytes,
            stored_bytes=recipe.weight_bytes * prod(size),
            trainable=True,
            group=0,
        )
        for part, size in parts
    )
