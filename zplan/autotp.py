"""A model as one rank holds it under DeepSpeed's AutoTP: its matrices cut over `autotp_size` ranks.

Source: deepspeed 0.19.8, runtime/engine.py:1009 (_apply_autotp_partitioning), module_inject/tp_plan_converter.py and
layers.py; transformers 5.23.0, models/llama/configuration_llama.py (base_model_tp_plan) and modeling_llama.py
(_tp_plan): q, k, v, gate, up and the head by rows, o and down by columns; embeddings and norms are whole on every rank,
and so is a head that is tied to them (vocab_parallel_lm_head false).
"""

from __future__ import annotations

from dataclasses import replace

from zplan.errors import ConfigError
from zplan.model_shape import Block, ModelShape, ParameterShape
from zplan.recipe import Recipe

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_BY_COLUMNS = ("o_proj", "down_proj")
PLANNED = ("llama", "mistral", "qwen2", "qwen3", "granite")
"""Families whose plan (base_model_tp_plan) cuts these modules and no others."""


def cannot_cut(shape: ModelShape, recipe: Recipe, autotp_size: int, *, stage: int) -> str | None:
    """Why the parts of a rank are not modelled, if they are not."""
    head = 0 if shape.tie_word_embeddings else shape.vocab_size
    sizes = (shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size, head)
    if autotp_size == 1:
        return None
    if shape.model_type not in PLANNED:
        return f"AutoTP of {shape.model_type}: another plan than {', '.join(PLANNED)}"
    if recipe.method != "full":
        return (
            f"AutoTP with {recipe.method}: it puts its layers in the place of the adapted ones, and the optimizer that"
            " was built before no longer finds its parameters (KeyError in DeepSpeed's initialize)"
        )
    if stage == 3:
        return (
            "AutoTP at stage 3: embeddings and norms stay cut over all ranks, as zero.Init has cut them, the parts of"
            " matrices over the ranks that hold the same part (auto_tp.py:512, _gather_zero3_params)"
        )
    if any(size % autotp_size for size in sizes):
        return f"AutoTP over {autotp_size} ranks: uneven parts of heads, MLP or vocabulary {sizes}"
    return None


def loss_refused(shape: ModelShape, recipe: Recipe, autotp_size: int) -> str | None:
    """Why a run would not train what it is asked to, if so: TRL's losses take the weight of a head that is cut.

    Source: trl 1.16.0, trainer/utils.py:1633 (lm_head.weight); deepspeed 0.19.8, module_inject/layers.py (LinearLayer).
    """
    if autotp_size == 1 or recipe.loss == "full" or shape.tie_word_embeddings:
        return None
    return f"the loss {recipe.loss} reads the rows of the head that a rank of AutoTP holds, and scores no other words"


def refuse_uncut_loss(shape: ModelShape, recipe: Recipe, autotp_size: int) -> None:
    """Raises ConfigError for a loss that AutoTP makes another one."""
    refused = loss_refused(shape, recipe, autotp_size)
    if refused:
        raise ConfigError(
            f"autotp_size is {autotp_size}, and {refused}",
            because="TRL's fused head takes the weight itself, past the module that gathers logits (trainer/utils.py)",
            fix="--loss full",
        )


def cut_shape(shape: ModelShape, autotp_size: int) -> ModelShape:
    """The shape of one rank's part. `vocab_size` stays whole: logits are gathered before the loss."""
    if autotp_size == 1:
        return shape
    key = (id(shape), autotp_size)
    known = _KNOWN.get(key)
    if known is None or known[0] is not shape:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[key] = (shape, _cut_shape(shape, autotp_size))
    return known[1]


_KNOWN: dict[tuple[int, int], tuple[ModelShape, ModelShape]] = {}
_MOST_KNOWN = 64


def _cut_shape(shape: ModelShape, autotp_size: int) -> ModelShape:
    return replace(
        shape,
        blocks=tuple(_cut_block(block, autotp_size) for block in shape.blocks),
        num_attention_heads=shape.num_attention_heads // autotp_size,
        num_key_value_heads=shape.num_key_value_heads // autotp_size,
        intermediate_size=shape.intermediate_size // autotp_size,
    )


def _cut_block(block: Block, autotp_size: int) -> Block:
    return replace(block, parameters=tuple(_cut(parameter, autotp_size) for parameter in block.parameters))


def _cut(parameter: ParameterShape, autotp_size: int) -> ParameterShape:
    """A parameter's part; what is cut in no known way is whole, as is the bias of what is cut by columns."""
    owner = parameter.module.rpartition(".")[2]
    if owner in _BY_ROWS:
        rows, *rest = parameter.shape
        return replace(parameter, shape=(rows // autotp_size, *rest))
    if owner in _BY_COLUMNS and len(parameter.shape) == 2:
        rows, columns = parameter.shape
        return replace(parameter, shape=(rows, columns // autotp_size))
    return parameter
