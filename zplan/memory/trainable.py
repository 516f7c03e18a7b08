"""Which parameters train, in which dtype, in which optimizer group: full, LoRA, QLoRA, modules_to_save."""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import Any

from zplan.adapted_modules import Shapes, adapter_shapes
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
        shapes = adapter_shapes(parameter, block, recipe, model_type)
        if shapes is not None and len(parameter.shape) == 2:
            weights.extend(_adapter(parameter, recipe, shapes))
        elif shapes is not None:
            weights.extend(_expert_adapter(parameter, recipe, shapes))
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


def _expert_adapter(parameter: ParameterShape, recipe: Recipe, shapes: Shapes) -> tuple[Weight, ...]:
    """lora_A and lora_B beside stacked weights."""
    return tuple(
        _trained(f"{parameter.name}.{part}", parameter.module, shape, recipe)
        for part, shape in zip(EXPERT_ADAPTERS, shapes, strict=True)
    )


def _trained(name: str, module: str, shape: tuple[int, ...], recipe: Recipe) -> Weight:
    """A parameter of PEFT's own."""
    numel = prod(shape)
    return Weight(
        name=name, module=module, numel=numel, shape=shape, itemsize=recipe.weight_bytes,
        stored_bytes=recipe.weight_bytes * numel, trainable=True, group=0,
    )  # fmt: skip


def is_expert_adapter(weight: Weight) -> bool:
    """lora_A or lora_B beside the stacked weights of experts."""
    return weight.name.endswith(EXPERT_ADAPTERS)


def is_adapter(weight: Weight) -> bool:
    """A parameter of PEFT's own."""
    return ".lora_" in weight.module or is_expert_adapter(weight)


EXPERT_ADAPTERS = ("expert_lora_A", "expert_lora_B")


def experts_refused(laid: Layout, recipe: Recipe) -> str | None:
    """Why PEFT refuses these adapters, if it does: its wrapper of stacked weights can neither DoRA nor dropout.

    Source: peft 0.21.2, tuners/lora/layer.py:2366 (ParamWrapper.__init__).
    """
    option = "DoRA" if recipe.use_dora else "lora_dropout" if recipe.lora_dropout else None
    if option is None:
        return None
    adapted = any(is_expert_adapter(weight) for block in laid.blocks for weight in block.weights)
    return f"{option} on the stacked weights of experts: peft raises (lora.ParamWrapper)" if adapted else None


def _adapter(parameter: ParameterShape, recipe: Recipe, shapes: Shapes) -> tuple[Weight, ...]:
    """lora_A (r x in), lora_B (out x r) and DoRA's magnitude (out), in the training dtype: the engine casts the whole
    module.

    Source: deepspeed 0.19.8, runtime/engine.py (_configure_distributed_model: module.bfloat16()); peft 0.21.2,
    tuners/lora/dora.py (DoraLinearLayer.update_layer).
    """
    parts: list[tuple[str, tuple[int, ...]]] = [
        ("lora_A", shapes[0]),
        ("lora_B", shapes[1]),
        *([("lora_magnitude_vector", parameter.shape[:1])] if recipe.use_dora else []),
    ]
    return tuple(
        _trained(f"{parameter.module}.{part}.default.weight", f"{parameter.module}.{part}.default", shape, recipe)
        for part, shape in parts
    )
